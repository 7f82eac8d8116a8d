"""Which parts of a network learn, and how fast."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from glassarmor.defenses.training.defense import require_learning


def freeze(net: nn.Module, patterns: Sequence[str]) -> str:
    """Hold parameters still, and BatchNorms whose parameters all are: in training they then normalise as they will in use.

    Args:
        patterns: names of modules or parameters, with ``*`` and ``?`` as in file names, e.g. ``["stem", "layer[12].*"]``.

    Returns:
        What learns, in a sentence.

    Raises:
        ValueError: a pattern that is none or names nothing, or nothing left that learns.
    """
    for names in named_by(net, patterns, "freeze").values():
        for name in names:
            net.get_parameter(name).requires_grad_(False)
    require_learning(net, f"freeze: {list(patterns)} leaves")
    still = [module for module in net.modules() if isinstance(module, _BatchNorm) and _is_frozen(module)]
    for module in still:
        module.eval()
    learns = [(parameter.requires_grad, parameter.numel()) for parameter in net.parameters()]
    count = sum(size for learning, size in learns if learning)
    return (
        f"{sum(learning for learning, _ in learns)} of {len(learns)} tensors learn ({count:,} of "
        f"{sum(size for _, size in learns):,} weights)" + f"; {len(still)} BatchNorms keep their statistics" * bool(still)
    )


def _is_frozen(norm: nn.Module) -> bool:
    flags = [parameter.requires_grad for parameter in norm.parameters()]
    return bool(flags) and not any(flags)


def named_by(net: nn.Module, patterns: Iterable[str], key: str) -> dict[str, list[str]]:
    """Pattern → names of the parameters that it stands for: of those, or of a module around them.

    Raises:
        ValueError: a pattern that is no text, or that no parameter answers to; says which names come close.
    """
    if isinstance(patterns, str):
        raise ValueError(f"{key}: expected a list of names, found {patterns!r}; write [{patterns}]")
    parameters = [name for name, _ in net.named_parameters()]
    found = {}
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"{key}: expected names of layers, found {pattern!r}")
        found[pattern] = [name for name in parameters if any(fnmatchcase(each, pattern) for each in _around(name))]
        if not found[pattern]:
            modules = [name for name, _ in net.named_modules() if name]
            close = difflib.get_close_matches(pattern, modules, n=5, cutoff=0.3) or modules[:12]
            raise ValueError(f"{key}: no parameter answers to {pattern!r}; close names: {', '.join(close)}")
    return found


def _around(name: str) -> list[str]:
    """ "a.b.weight" → "a", "a.b", "a.b.weight"."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def rate_factors(net: nn.Module, factors: Mapping[str, float]) -> dict[float, list[nn.Parameter]]:
    """Factor → parameters whose learning rate it scales; of several patterns that name a parameter, the last counts.

    Raises:
        ValueError: a factor that is no finite number above 0, or as :func:`named_by`.
    """
    if not isinstance(factors, Mapping):
        raise ValueError(f"lr_factors: expected names of layers with a factor each, e.g. {{head: 10}}; found {factors!r}")
    for pattern, factor in factors.items():
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise ValueError(f"lr_factors.{pattern}: expected a number above 0, found {factor!r}; freeze={[pattern]} for 0")
    by_name = {name: 1.0 for name, _ in net.named_parameters()}
    for pattern, names in named_by(net, factors, "lr_factors").items():
        by_name |= dict.fromkeys(names, float(factors[pattern]))
    found: dict[float, list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        found.setdefault(by_name[name], []).append(parameter)
    return found


def scale_rates(optimizer: Optimizer, factors: Iterable[float]) -> None:
    """Multiply the learning rate of each parameter group by its factor."""
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        group["lr"] *= factor
