"""Any torchvision classifier by name, with weights from a local file; nothing is ever downloaded."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from glassarmor.lightning_modules.networks.build import load_weights
from glassarmor.lightning_modules.networks.check import without_inplace
from glassarmor.lightning_modules.networks.normalize import Normalize

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INCEPTIONS = ("googlenet", "inception_v3")
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads of the published files, which help training alone


class LibraryNet(nn.Module):
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
) -> LibraryNet:
    """The torchvision classifier ``name`` for ``num_classes`` classes, without in-place modules.

    Args:
        weights: local file of a state dict (:func:`.load_weights`); the head is left out (and stays randomly initialised)
            where the file has another number of classes.
        image_size: pixels a side that images are resized to inside the net; vision transformers and MaxViT are built
            for this size (224 unless given).
        normalization: "data" uses ``mean`` and ``std``, "imagenet" the statistics behind torchvision's own weights;
            None takes "imagenet" with ``weights`` and "data" without.

    Raises:
        ValueError: for an unknown name, an option out of range, or weights that :func:`.load_weights` refuses.
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
        load_weights(net, weights, "network.weights", new_head=True, ignored=AUXILIARY if name in INCEPTIONS else ())
    if imagenet:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    elif in_channels == 1:
        mean, std = tuple(mean) * 3, tuple(std) * 3
    return LibraryNet(Normalize(mean, std), without_inplace(net), image_size)


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
