"""Scenes of one object before a background, drawn to order: what decides the class is known, and so is every mask (ours)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from glassarmor.datamodules.colours import COLOURS, TYPICAL, luminance
from glassarmor.datamodules.images import ImageDataModule, Images, require_whole
from glassarmor.datamodules.loader import seeded

SHAPES: Final = ("disc", "square", "triangle", "ring", "cross")
PARTS: Final = ("rim", "centre", "corner")
TEXTURES: Final = ("plain", "stripes", "checks", "dots", "noise")
FREQUENCIES: Final = ("fine", "medium", "coarse")
PERIODS: Final = (2.5, 5.0, 10.0)  # pixels, whatever the size of the image
ORIENTATIONS: Final = ("vertical", "rising", "horizontal", "falling")  # by the angle of the wave vector: 0°, 45°, 90°, 135°
CHROMATIC: Final = tuple(COLOURS.index(name) for name in ("blue", "green", "purple", "red", "yellow"))
LABELS: Final = ("shape", "colour", "texture")
_TRAIN, _TEST = 31, 32
_CHUNK = 1000


@dataclass(frozen=True, eq=False)
class Scenes:
    """``images`` (N, 3, S, S) uint8; the other fields say what is in them.

    ``inside`` (N, S, S) bool: the object.  ``part`` (N, S, S) int64 index into ``PARTS``, −1 outside.  ``shape`` (N,).
    ``colour``, ``texture``, ``frequency``, ``orientation`` (N, 2): of background and object.  Frequency is −1 where the
    texture has no period, orientation −1 where it has no direction.
    """

    images: Tensor
    inside: Tensor
    part: Tensor
    shape: Tensor
    colour: Tensor
    texture: Tensor
    frequency: Tensor
    orientation: Tensor


def draw_scenes(
    count: int, size: int, generator: torch.Generator, object_colours: tuple[int, ...] = tuple(range(len(COLOURS)))
) -> Scenes:
    """Random scenes; shape, colour and texture are drawn independently of each other.

    The object lies wholly in the image, is hard-edged, so that its mask is exact, and differs from the background in the
    name of its colour.  Patterns have their period in pixels.

    Args:
        size: height and width, at least 8.
        object_colours: indices into ``COLOURS`` that objects may have.
    """

    def pick(options: int, *shape: int) -> Tensor:
        return torch.randint(options, (count, *shape), generator=generator)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    shape = pick(len(SHAPES))
    colour = torch.tensor(object_colours)[pick(len(object_colours))]
    background = (colour + 1 + pick(len(COLOURS) - 1)) % len(COLOURS)
    colours, textures = torch.stack([background, colour], 1), pick(len(TEXTURES), 2)
    periodic = (textures >= TEXTURES.index("stripes")) & (textures <= TEXTURES.index("dots"))
    directed = textures == TEXTURES.index("stripes")
    frequencies = torch.where(periodic, pick(len(FREQUENCIES), 2), -1)
    orientations = torch.where(directed, pick(len(ORIENTATIONS), 2), -1)

    radius = uniform(0.25, 0.42) * size
    centre = radius[:, None] + uniform(0, 1, 2) * (size - 2 * radius[:, None])
    depth, corner = _outline(shape, centre, radius, uniform(-math.pi / 12, math.pi / 12), size)
    inside = depth > 0
    rim = depth < 0.4 * torch.tensor([1.0, 0.8, 0.5, 0.3, 0.33])[shape][:, None, None]
    part = torch.where(corner, PARTS.index("corner"), torch.where(rim, PARTS.index("rim"), PARTS.index("centre")))

    pattern = _pattern(textures, frequencies, orientations, uniform(0.9, 1.1, 2), uniform(0, 2 * math.pi, 2, 2), size)
    noise = torch.rand(count, 2, size, size, generator=generator)
    pattern = torch.where((textures == TEXTURES.index("noise"))[..., None, None], noise, pattern)
    ink = (TYPICAL[colours].float() + uniform(-10, 10, 2, 3)).clamp(0, 255) / 255  # (N, 2, 3)
    dark = luminance(ink.permute(0, 2, 1)[..., None])[..., 0] < 0.35  # towards white: on black a pattern must show too
    shade = torch.lerp(ink[..., None, None], dark.float()[..., None, None, None], 0.5 * pattern[:, :, None])
    images = torch.where(inside[:, None], shade[:, 1], shade[:, 0])
    return Scenes(
        images=(images * 255).round().to(torch.uint8),
        inside=inside,
        part=torch.where(inside, part, -1),
        shape=shape,
        colour=colours,
        texture=textures,
        frequency=frequencies,
        orientation=orientations,
    )


def _outline(shape: Tensor, centre: Tensor, radius: Tensor, angle: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Depth below the outline in radii, negative outside, and whether a pixel lies near a corner; (N, S, S) each."""
    grid = torch.arange(size) + 0.5
    x = (grid[None, None] - centre[:, 0, None, None]) / radius[:, None, None]
    y = (grid[None, :, None] - centre[:, 1, None, None]) / radius[:, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    x, y = cos * x + sin * y, cos * y - sin * x
    r = (x**2 + y**2).sqrt()
    normals = [(0.0, 1.0), (math.sqrt(0.75), -0.5), (-math.sqrt(0.75), -0.5)]
    depths = (
        1 - r,
        0.8 - x.abs().maximum(y.abs()),
        torch.stack([0.5 - a * x - b * y for a, b in normals]).amin(0),
        0.3 - (r - 0.7).abs(),
        (0.33 - x.abs()).minimum(0.94 - y.abs()).maximum((0.33 - y.abs()).minimum(0.94 - x.abs())),
    )
    away = torch.full_like(x, torch.inf)
    corners = (
        away,
        ((x.abs() - 0.8) ** 2 + (y.abs() - 0.8) ** 2).sqrt(),
        torch.stack([(x + a) ** 2 + (y + b) ** 2 for a, b in normals]).amin(0).sqrt(),
        away,
        ((x.abs().maximum(y.abs()) - 0.94) ** 2 + (x.abs().minimum(y.abs()) - 0.33) ** 2).sqrt(),
    )
    chosen = shape[None, :, None, None].expand(1, *x.shape)
    depth, corner = (torch.stack(values).gather(0, chosen)[0] for values in (depths, corners))
    return depth, corner < 0.4


def _pattern(texture: Tensor, frequency: Tensor, orientation: Tensor, stretch: Tensor, phase: Tensor, size: int) -> Tensor:
    """How far the ink is shaded, (N, 2, S, S) in {0, 1}; 0 where the texture has no period."""
    period = torch.tensor(PERIODS)[frequency] * stretch
    angle = orientation.clamp(min=0) * (math.pi / 4)
    grid = torch.arange(size) + 0.5
    x, y = grid[None, None, None], grid[None, None, :, None]
    cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
    turn = 2 * math.pi / period[..., None, None]
    along = (turn * (cos * x + sin * y) + phase[..., 0, None, None]).sin()
    across = (turn * (cos * y - sin * x) + phase[..., 1, None, None]).sin()
    kinds = (torch.zeros_like(along), along > 0, along * across > 0, (along > 0) & (across > 0), torch.zeros_like(along))
    return torch.stack([kind.float() for kind in kinds]).gather(0, texture[None, ..., None, None].expand(1, *along.shape))[0]


@dataclass(kw_only=True, eq=False, repr=False)
class Shapes(ImageDataModule):
    """Objects on backgrounds, RGB; the class is the object's shape, colour or texture, as chosen, and nothing else.

    The images are the same whatever ``seed`` is, and whichever of the three decides: ground truth about what a unit
    should detect.

    Args:
        label: "shape", "colour" or "texture".
        size: height and width in pixels, at least 8.
        count, test_count: images to train (and validate) and to test on.

    Raises:
        ValueError: an argument out of its range.
    """

    label: str = "shape"
    size: int = 32
    count: int = 4000
    test_count: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label not in LABELS:
            raise ValueError(f"data.label must be one of {', '.join(LABELS)}, got {self.label!r}")
        require_whole("data.size", self.size, 8)
        require_whole("data.count", self.count, 50)
        require_whole("data.test_count", self.test_count, 1)

    def load(self) -> tuple[Images, Images, tuple[str, ...]]:
        names = {"shape": SHAPES, "colour": tuple(COLOURS[i] for i in CHROMATIC), "texture": TEXTURES}[self.label]
        return self._draw(self.count, _TRAIN), self._draw(self.test_count, _TEST), names

    def _draw(self, count: int, purpose: int) -> Images:
        generator = seeded(purpose, self.size)
        images, labels = [], []
        for start in range(0, count, _CHUNK):
            scenes = draw_scenes(min(_CHUNK, count - start), self.size, generator, CHROMATIC)
            colour = torch.searchsorted(torch.tensor(CHROMATIC), scenes.colour[:, 1].contiguous())
            images.append(scenes.images)
            labels.append(
                {"shape": scenes.shape, "colour": colour, "texture": scenes.texture[:, 1].contiguous()}[self.label]
            )
        return Images(torch.cat(images), torch.cat(labels))
