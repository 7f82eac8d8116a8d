"""Any torchvision classifier by name, with weights from a local file; nothing is ever downloaded."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from glassarmor.lightning_modules.networks.check import without_inplace
from glassarmor.lightning_modules.networks.normalize import Normalize

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INCEPTIONS = ("googlenet", "inception_v3")


class TorchvisionNet(nn.Module):
    """Images (N, 1 or 3, H, W) in [0,1] -> logits (N, num_classes) of ``net``.

    Grey images become three equal channels, then all are normalised and, with ``image_size``, resized to that many
    pixels a side: every step is differentiable, so attacks act on the image as it was given.  Layers are named
    "net....", e.g. "net.layer4".

    Some torchvision nets add ``+=`` or call ``F.relu(inplace=True)`` in their own ``forward`` (the last BatchNorm of
    a residual block; ``norm5`` of DenseNet; the BatchNorms of the Inceptions): those layers' outputs are overwritten
    and cannot be recorded, the blocks and stages around them can.
    """

    def __init__(self, normalize: Normalize, net: nn.Module, image_size: int | None) -> None:
        super().__init__()
        self.normalize = normalize
        self.net = net
        self.image_size = image_size

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return self.net(self._resize(self.normalize(images)))

    def _resize(self, images: Tensor) -> Tensor:
        side = self.image_size
        if side is None or images.shape[-2:] == (side, side):
            return images
        # Smoothing is for shrinking only: enlarging needs none, and has a deterministic gradient on a GPU without it.
        antialias = max(images.shape[-2:]) > side
        return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=antialias)


def torchvision_net(
    *,
    num_classes: int,
    in_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    name: str,
    weights: str | None = None,
    image_size: int | None = None,
    normalization: Literal["data", "imagenet"] | None = None,
) -> TorchvisionNet:
    """The torchvision classifier ``name`` for ``num_classes`` classes, without in-place modules.

    Args:
        weights: local file of a state dict, as torchvision publishes them; the head is left out (and stays randomly
            initialised) where the file has another number of classes.
        image_size: pixels a side that images are resized to inside the net; vision transformers and MaxViT are built
            for this size (224 unless given).
        normalization: "data" uses ``mean`` and ``std``, "imagenet" the statistics behind torchvision's own weights;
            None takes "imagenet" with ``weights`` and "data" without.

    Raises:
        ValueError: for an unknown name, an option out of range, or a weights file that is corrupt or does not fit.
        FileNotFoundError: if ``weights`` is no file.
    """
    allowed = torchvision.models.list_models(module=torchvision.models)
    if name not in allowed:
        close = difflib.get_close_matches(name, allowed) or allowed
        raise ValueError(
            f"network.name must be one of torchvision's {len(allowed)} classifiers, e.g. {', '.join(close)}  Got: {name!r}"
        )
    if in_channels not in (1, 3) or len(mean) != in_channels:
        raise ValueError(
            "network.name: torchvision nets take images with 1 or 3 channels, with as many mean and std values"
            f"  Got: {in_channels} channels, {len(mean)} mean values"
        )
    if image_size is not None and image_size < 1:
        raise ValueError(f"network.image_size must satisfy image_size >= 1 (pixels a side), or null  Got: {image_size}")
    if normalization not in ("data", "imagenet", None):
        raise ValueError(f"network.normalization must be 'data', 'imagenet' or null  Got: {normalization!r}")
    imagenet = normalization == "imagenet" or (normalization is None and weights is not None)
    net = _build(name, num_classes, image_size, imagenet)
    if weights is not None:
        _load(net, name, Path(weights))
    if imagenet:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    elif in_channels == 1:
        mean, std = tuple(mean) * 3, tuple(std) * 3
    return TorchvisionNet(Normalize(mean, std), without_inplace(net), image_size)


def _build(name: str, num_classes: int, image_size: int | None, imagenet: bool) -> nn.Module:
    options: dict[str, object] = {}
    if name in INCEPTIONS:
        # Auxiliary heads make the training output a tuple.  The published weights were trained on images in [-1,1]:
        # `transform_input` turns ImageNet-normalised ones into those.
        options = {"aux_logits": False, "init_weights": True, "transform_input": imagenet}
    elif image_size is not None and name.startswith("vit_"):
        options = {"image_size": image_size}
    elif image_size is not None and name.startswith("maxvit_"):
        options = {"input_size": (image_size, image_size)}
    try:
        net: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    except (AssertionError, ValueError) as error:  # a size that is no multiple of the patch or window
        raise ValueError(f"network.image_size must fit {name}  Got: {image_size} ({error})") from error
    return net


def _load(net: nn.Module, name: str, path: Path) -> None:
    """Fill ``net`` from the state dict in ``path``: every key must fit, but for a head of other classes."""
    state = _read(path)
    expected = net.state_dict()
    for key in list(state):
        if name in INCEPTIONS and key.startswith(("aux1.", "aux2.", "AuxLogits.")):
            del state[key]
        elif name.startswith("densenet") and (old := re.fullmatch(r"(.*denselayer\d+\.(?:norm|conv))\.(\d\..*)", key)):
            state["".join(old.groups())] = state.pop(key)  # published before module names could not hold a dot
    head = {f"{_head(net)}.{kind}" for kind in ("weight", "bias")} & state.keys() & expected.keys()
    other_classes = {
        key for key in head if state[key].shape[1:] == expected[key].shape[1:] and len(state[key]) != len(expected[key])
    }
    for key in other_classes:
        del state[key]

    problems = [
        f"{key} has shape {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in state
        if key in expected and state[key].shape != expected[key].shape
    ]
    if not problems:
        keys = net.load_state_dict(state, strict=False)
        problems = [f"{key} is missing" for key in keys.missing_keys if key not in other_classes]
        problems += [f"{key} is not in the net" for key in keys.unexpected_keys]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"network.weights must hold a state dict of network.name={name} (the head may have other classes)"
            f"  Got: {path}: {'; '.join(problems[:5])}{more}"
        )


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"network.weights must be a local file; nothing is downloaded  Got: {path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its first wrong byte leads to
        reason = str(error).splitlines()[0] if str(error) else "no message"
        raise ValueError(
            "network.weights must be a file that torch.load(..., weights_only=True) reads, damaged or other files are not"
            f"  Got: {path}: {type(error).__name__}: {reason}"
        ) from error
    is_dict = isinstance(state, dict)
    if not is_dict or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        found = f"a dict with keys {', '.join(map(str, list(state)[:5]))}" if is_dict else type(state).__name__
        raise ValueError(
            "network.weights must hold a state dict, parameter names to tensors, as net.state_dict() gives"
            f"  Got: {path}: {found}"
        )
    return state


def _head(net: nn.Module) -> str:
    """Name of the last linear or convolutional layer (SqueezeNet ends in one): the one with a row for each class."""
    return [name for name, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
