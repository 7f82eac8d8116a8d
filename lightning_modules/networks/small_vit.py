"""A vision transformer for small images, which trains on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchvision.models import VisionTransformer

from glassarmor.lightning_modules.networks.normalize import normalised


def small_vit(
    *,
    num_classes: int,
    in_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int = 32,
    patch_size: int = 4,
    depth: int = 4,
    heads: int = 4,
    width: int = 64,
    dropout: float = 0.0,
) -> nn.Module:
    """Square images in [0,1] -> logits (N, num_classes) of torchvision's VisionTransformer, for any number of channels.

    Args:
        image_size: pixels a side of the images.
        patch_size: pixels a side of a token.
        depth, heads, width: blocks, attention heads a block, channels of a token; inside a block 4 times as many.

    Raises:
        ValueError: sizes that do not divide one another.
    """
    if image_size % patch_size:
        raise ValueError(f"network.patch_size must divide image_size={image_size}  Got: {patch_size}")
    if width % heads:
        raise ValueError(f"network.heads must divide width={width}  Got: {heads}")
    net = VisionTransformer(image_size, patch_size, depth, heads, width, 4 * width, dropout=dropout, num_classes=num_classes)
    if in_channels != 3:
        net.conv_proj = nn.Conv2d(in_channels, width, patch_size, patch_size)
    nn.init.trunc_normal_(net.heads[-1].weight, std=0.02)  # zero as built: the first attack would see no gradient
    return normalised(net, mean, std)
