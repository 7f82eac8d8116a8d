"""The eleven basic colour names (Berlin & Kay 1969) of pixels; the prototypes are ours."""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
from torch import Tensor

# sRGB of a few typical colours of each name, the most typical first.
_PROTOTYPES: Final[dict[str, tuple[tuple[int, int, int], ...]]] = {
    "black": ((0, 0, 0), (25, 25, 25)),
    "blue": ((0, 40, 230), (0, 0, 255), (0, 0, 139), (70, 110, 200), (120, 180, 240), (0, 200, 230)),
    "brown": ((130, 70, 20), (100, 65, 35), (150, 105, 60), (75, 40, 20)),
    "green": ((20, 150, 30), (0, 255, 0), (20, 80, 20), (140, 220, 120), (110, 130, 40), (0, 160, 120)),
    "grey": ((128, 128, 128), (85, 85, 85), (170, 170, 170), (60, 60, 60), (205, 205, 205)),
    "orange": ((255, 135, 0), (255, 110, 20), (230, 125, 45), (255, 170, 60)),
    "pink": ((255, 160, 190), (255, 105, 180), (240, 190, 200), (230, 110, 140)),
    "purple": ((130, 0, 150), (160, 32, 240), (85, 20, 110), (180, 100, 210), (200, 0, 200)),
    "red": ((225, 10, 15), (255, 0, 0), (170, 0, 0), (110, 0, 5), (215, 60, 50)),
    "white": ((255, 255, 255), (238, 238, 238)),
    "yellow": ((250, 230, 20), (255, 255, 0), (225, 200, 40), (255, 245, 140)),
}
COLOURS: Final = tuple(_PROTOTYPES)
TYPICAL: Final = torch.tensor([shades[0] for shades in _PROTOTYPES.values()], dtype=torch.uint8)  # (11, 3)


def luminance(images: Tensor) -> Tensor:
    """Rec. 601 luma of (N, 1 or 3, H, W), (N, H, W)."""
    if images.shape[1] == 1:
        return images[:, 0]
    return torch.einsum("nchw,c->nhw", images, images.new_tensor([0.299, 0.587, 0.114]))


def name_colours(images: Tensor) -> Tensor:
    """Index into ``COLOURS`` of every pixel of RGB images (N, 3, H, W) uint8; (N, H, W) int64.

    The name of the prototype nearest in CIELAB, looked up by the first five bits of each channel.
    """
    red, green, blue = (images.long() >> 3).unbind(1)
    return _names().to(images.device)[(red << 10) | (green << 5) | blue]


@cache
def _names() -> Tensor:
    """Name of each of the 32³ cells of the colour cube, at the cell's centre; the ends stand for pure black and white."""
    level = torch.linspace(0, 1, 32)
    cells = _lab(torch.cartesian_prod(level, level, level))
    shades = _lab(torch.tensor([shade for shades in _PROTOTYPES.values() for shade in shades]) / 255)
    owner = torch.tensor([name for name, shades in enumerate(_PROTOTYPES.values()) for _ in shades])
    return owner[torch.cdist(cells, shades).argmin(1)]


def _lab(srgb: Tensor) -> Tensor:
    """sRGB in [0,1] → CIELAB under D65, (P, 3) (IEC 61966-2-1, CIE 15)."""
    linear = torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = linear @ to_xyz.T / to_xyz.sum(1)
    f = torch.where(ratio > (6 / 29) ** 3, ratio.clamp(min=1e-9) ** (1 / 3), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return torch.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
