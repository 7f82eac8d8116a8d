"""A network of the user's own: any ``module:callable`` that can be imported, from the working directory too."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence

from torch import nn

from glassarmor.lightning_modules.networks.check import without_inplace
from glassarmor.lightning_modules.networks.normalize import normalised

LISTED = 12  # callables, where the one that was named is not there


def imported(
    *,
    num_classes: int,
    in_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    target: str | None = None,
    args: Mapping[str, object] | None = None,
    normalize: bool | Mapping[str, Sequence[float]] = True,
) -> nn.Module:
    """The network that ``target`` = "module:callable" returns for ``callable(**args)``, without in-place modules.

    It must map images (N, in_channels, H, W) to logits (N, num_classes), which ``check_network`` verifies on a pass.
    With ``normalize`` it sits behind :class:`Normalize` as submodule ``net`` (its layers are then named "net...."), by the
    statistics of the data or by a ``mean`` and ``std`` of its own; without, it is returned as it is, for images in [0,1].

    Raises:
        ValueError: if ``target`` has another form, its module is missing or fails to import, has no such callable, or
            the callable fails or returns no ``nn.Module``.
    """
    net = without_inplace(_call(target, args or {}))
    if not normalize:
        return net
    if isinstance(normalize, bool):
        return normalised(net, mean, std)
    if normalize.keys() != {"mean", "std"}:
        raise ValueError(f"network.normalize: expected true, false, or mean and std, found {dict(normalize)}")
    return normalised(net, normalize["mean"], normalize["std"])


def _call(target: str | None, args: Mapping[str, object]) -> nn.Module:
    module_name, colon, path = (target or "").partition(":")
    if not (module_name and colon and path):
        raise ValueError(f"network.target must be 'module:callable', e.g. my_models:make_net  Got: {target!r}")
    found = _import(module_name)
    for name in path.split("."):
        if not hasattr(found, name):
            own = sorted(
                name
                for name, value in getattr(found, "__dict__", {}).items()
                if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module_name
            )
            more = f" and {len(own) - LISTED} more" if len(own) > LISTED else ""
            raise ValueError(
                f"network.target: {target!r} must name a callable in {module_name!r}, which has"
                f" {', '.join(own[:LISTED]) or 'none of its own'}{more}  Got: no attribute {name!r}"
            )
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(f"network.target: {target!r} must be callable  Got: {type(found).__name__}")
    try:
        net = found(**args)
    except Exception as error:  # the user's code may raise anything; what matters is which config keys led there
        raise ValueError(
            f"network.target: {target!r} must return a network for network.args = {dict(args)}"
            f"  Got: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"network.target: {target!r} must return a torch.nn.Module  Got: {type(net).__name__}")
    return net


def _import(name: str) -> object:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # stays: the module may import its neighbours later, in a loader's worker too
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except Exception as error:  # a module may raise anything while it is imported
        missing = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        reason = "no such module" if missing else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"network.target: module {name!r} must be importable, from {os.getcwd()} or the installed packages"
            f"  Got: {reason}"
        ) from error
