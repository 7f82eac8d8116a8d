"""Any classifier of timm by name, with weights from a local file; nothing is ever downloaded."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from torch import nn

from glassarmor.lightning_modules.networks.build import load_weights
from glassarmor.lightning_modules.networks.check import without_inplace
from glassarmor.lightning_modules.networks.normalize import Normalize
from glassarmor.lightning_modules.networks.torchvision_net import LibraryNet

# Arguments of timm that name weights or say where to fetch them.
FETCHING: Final = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def timm_net(
    *,
    num_classes: int,
    in_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    name: str,
    weights: str | None = None,
    image_size: int | None = None,
    normalization: Literal["data", "published"] | None = None,
    args: Mapping[str, object] | None = None,
) -> LibraryNet:
    """The timm classifier ``name`` for ``num_classes`` classes, without in-place modules.

    Args:
        weights: local file of a state dict (:func:`.load_weights`); the head is left out (and stays randomly initialised)
            where the file has another number of classes.
        image_size: pixels a side that images are resized to inside the net; nets of a fixed size (vision transformers and
            mixers) are built for it, and get what timm says (mostly 224) unless it is given.
        normalization: "data" uses ``mean`` and ``std``, "published" those that timm records for the net's own weights; None
            takes "published" with ``weights`` and "data" without.
        args: more arguments of ``timm.create_model``, e.g. ``{"drop_path_rate": 0.1}``.

    Raises:
        ValueError: timm is not installed, an unknown name, an option that it refuses, or weights that :func:`.load_weights`
            refuses.
    """
    timm = _timm()
    allowed = timm.list_models()
    if not isinstance(name, str) or name.partition(".")[0] not in allowed:
        close = ", ".join(difflib.get_close_matches(str(name), allowed) or allowed[:3])
        raise ValueError(f"network.name: expected one of timm's {len(allowed)} models, e.g. {close}; found {name!r}")
    if in_channels not in (1, 3):
        raise ValueError(f"network.name: timm's nets take images with 1 or 3 channels here, found {in_channels}")
    if normalization not in ("data", "published", None):
        raise ValueError(f"network.normalization: expected data, published or null, found {normalization!r}")
    built = dict(args or {})
    if downloads := FETCHING & built.keys():
        raise ValueError(
            f"network.args: nothing is downloaded; expected weights in network.weights, found {sorted(downloads)}"
        )
    if image_size is not None and timm.get_pretrained_cfg(name).fixed_input_size:
        built["img_size"] = image_size
    try:
        net: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, **built)
    except Exception as error:  # each family checks its own arguments
        raise ValueError(f"network: timm cannot build {name} with {built}: {' '.join(str(error).split())}") from error
    about: Mapping[str, Any] = getattr(net, "pretrained_cfg", None) or {}
    if image_size is None and about.get("fixed_input_size"):
        image_size = about["input_size"][-1]
    if weights is not None:
        load_weights(net, weights, "network.weights", new_head=True)
    if normalization == "published" or (normalization is None and weights is not None):
        mean, std = about["mean"], about["std"]
    elif in_channels == 1:
        mean, std = tuple(mean) * 3, tuple(std) * 3
    return LibraryNet(Normalize(mean, std), without_inplace(net), image_size)


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ValueError("network: network=timm needs timm, found none; install it with: pip install timm") from error
    return timm
