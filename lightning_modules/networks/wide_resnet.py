"""Wide residual networks, table 1 of Zagoruyko and Komodakis 2016, "Wide Residual Networks"."""

from __future__ import annotations

from collections.abc import Sequence

from glassarmor.lightning_modules.networks.resnet import PreActResNet


def wide_resnet(
    *,
    num_classes: int,
    in_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    depth: int = 28,
    widen_factor: int = 10,
    dropout: float = 0.0,
) -> PreActResNet:
    """WRN-``depth``-``widen_factor``: images (N, in_channels, H, W) in [0,1] -> logits (N, num_classes).

    Three layers of (depth - 4) / 6 blocks, 16, 32 and 64 times ``widen_factor`` channels wide; ``dropout`` is the
    probability between the two convolutions of a block.  Last feature map ``final``.

    Raises:
        ValueError: if ``depth`` is not 6n + 4, or ``widen_factor`` or ``dropout`` is out of range.
    """
    blocks, remainder = divmod(depth - 4, 6)
    if remainder or blocks < 1:
        raise ValueError(f"network.depth must be 6n + 4, n >= 1 (10, 16, 22, 28, 34, 40, ...)  Got: {depth}")
    if widen_factor < 1:
        raise ValueError(f"network.widen_factor must satisfy widen_factor >= 1  Got: {widen_factor}")
    if not 0 <= dropout < 1:
        raise ValueError(f"network.dropout must satisfy 0 <= dropout < 1  Got: {dropout}")
    return PreActResNet(
        (blocks,) * 3,
        (16 * widen_factor, 32 * widen_factor, 64 * widen_factor),
        stem_width=16,
        num_classes=num_classes,
        in_channels=in_channels,
        mean=mean,
        std=std,
        dropout=dropout,
    )
