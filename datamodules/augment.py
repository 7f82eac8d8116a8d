"""Augmentation of a whole batch at once: one gather, no loop over samples.

An augmentation is any callable ``(images (N, C, H, W), torch.Generator) -> images``; shape, dtype and device stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``.  A GPU gets it from pinned memory: from any other the copy waits for all that is queued."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, pad: int) -> Tensor:
    """Zero-pad by ``pad`` on every side, cut out one window of the original size per sample, mirror where asked.

    Args:
        images: (N, C, H, W), uint8 or float.
        top, left: (N,) int64 in [0, 2·pad], the corner of each sample's window in the padded image; ``pad`` leaves it.
        flip: (N,) bool, mirror the window left to right.
        pad: pixels.
    """
    n, channels, height, width = images.shape
    padded_width = width + 2 * pad
    columns = torch.arange(width, device=images.device).expand(n, -1)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)
    rows = top[:, None] + torch.arange(height, device=images.device)
    pixels = (rows[:, :, None] * padded_width + columns[:, None, :]).flatten(1)  # (N, H·W), shared by the channels
    padded = F.pad(images, (pad, pad, pad, pad)).flatten(2)
    return padded.gather(2, pixels[:, None].expand(-1, channels, -1)).view_as(images)


@dataclass(frozen=True)
class Augment:
    """Random crop after zero padding (a shift by at most ``pad`` pixels), and a mirror image with probability ½.

    ``Augment(pad=4, flip=True)`` is the usual recipe for CIFAR (He et al. 2015, section 4.2); ``Augment(pad=2)`` suits
    digits, of which a mirror image is another sign or none.

    Raises:
        ValueError: ``pad`` is negative.
    """

    pad: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise ValueError(f"data.augment.pad must be a number of pixels ≥ 0, got {self.pad}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n = len(images)
        # Both are drawn whatever the settings: switching the flip off leaves the crops as they were.
        offsets = torch.randint(0, 2 * self.pad + 1, (2, n), generator=generator, device=generator.device)
        flip = torch.rand(n, generator=generator, device=generator.device) < (0.5 if self.flip else 0.0)
        top, left, mirrored = send(torch.cat((offsets, flip[None])), images.device)
        return crop_and_flip(images, top, left, mirrored.bool(), self.pad)
