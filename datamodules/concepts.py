"""Concepts for network dissection without a download: those that any image shows, and those of drawn scenes (ours)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from glassarmor.datamodules.colours import COLOURS, luminance, name_colours
from glassarmor.datamodules.images import require_whole
from glassarmor.datamodules.loader import seeded
from glassarmor.datamodules.shapes import FREQUENCIES, ORIENTATIONS, PARTS, SHAPES, TEXTURES, draw_scenes

_PROCEDURAL = 41
_ROUND: Final = ("disc", "ring")  # have no corners
_SHAPE_PARTS: Final = tuple(
    (i, j) for i, shape in enumerate(SHAPES) for j, part in enumerate(PARTS) if part != "corner" or shape not in _ROUND
)
_IMAGE_CONCEPTS: Final = {
    "colour": COLOURS,
    "edge": tuple(f"{name} edge" for name in ORIENTATIONS),
    "brightness": ("dark", "medium", "bright"),
    "contrast": ("flat", "low contrast", "high contrast"),
    "position": ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right"),
}
_SCENE_CONCEPTS: Final = {
    "shape": SHAPES,
    "part": tuple(f"{SHAPES[shape]} {PARTS[part]}" for shape, part in _SHAPE_PARTS),
    "texture": TEXTURES,
    "frequency": tuple(f"{name} pattern" for name in FREQUENCIES),
    "orientation": tuple(f"{name} stripes" for name in ORIENTATIONS),
}
EDGE: Final = 0.2  # of the step from black to white, over one pixel
DARK: Final = 1 / 3  # luminance below is dark
BRIGHT: Final = 2 / 3
FLAT: Final = 0.02  # standard deviation of luminance over 5×5 pixels
STRONG: Final = 0.15


class AnnotatedImages(Protocol):
    """Yields, on every pass, images (B, C, H, W) fp32 in [0,1] and labels (B, maps, H, W): index of a concept, or −1."""

    @property
    def concepts(self) -> Sequence[str]: ...

    @property
    def categories(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True, eq=False)
class ConceptSet:
    """Annotated images in memory.

    ``images`` (N, C, H, W) uint8; ``labels`` (N, maps, H, W) int16, index into ``concepts`` or −1; ``categories``: one for
    each concept.  Yields batches of fp32 images in [0,1] with their labels.
    """

    images: Tensor
    labels: Tensor
    concepts: tuple[str, ...]
    categories: tuple[str, ...]
    batch_size: int = 128

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield images.float().div_(255), labels


def image_concepts(channels: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and categories of what :func:`label_image_concepts` finds in images of 1 or 3 channels; grey has no colours."""
    return _flat({name: group for name, group in _IMAGE_CONCEPTS.items() if channels == 3 or name != "colour"})


def _flat(groups: dict[str, tuple[str, ...]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(c for group in groups.values() for c in group), tuple(name for name, group in groups.items() for _ in group)


def label_image_concepts(images: Tensor) -> Tensor:
    """Label any images by what their pixels show; nothing is learned.

    colour: the eleven basic names.  edge: direction of the edge to the nearest 45° where the Sobel gradient of luminance
    exceeds ``EDGE``, else none.  brightness: thirds of luminance.  contrast: standard deviation of luminance over 5×5
    pixels.  position: thirds of the image.

    Args:
        images: (N, 1 or 3, H, W), uint8, or floating point in [0,1].

    Returns:
        (N, 5, H, W) int16, or (N, 4, H, W) for grey: one map a category, indices as in :func:`image_concepts`; −1: none.
    """
    pixels = images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)
    grey = luminance(pixels.float().div_(255))
    maps = [] if images.shape[1] == 1 else [name_colours(pixels)]
    maps += [_edges(grey), (grey >= DARK).long() + (grey >= BRIGHT), _contrast(grey), _position(grey)]
    sizes = [len(group) for name, group in _IMAGE_CONCEPTS.items() if images.shape[1] == 3 or name != "colour"]
    return _stacked(maps, sizes)


def _stacked(maps: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Maps (N, H, W) that each count from 0 → (N, maps, H, W) int16 that count on."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return torch.stack([torch.where(m >= 0, m + start, -1) for m, start in zip(maps, starts, strict=True)], 1).short()


def _edges(grey: Tensor) -> Tensor:
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    kernels = torch.stack([sobel, sobel.T])[:, None].to(grey)
    gx, gy = F.conv2d(F.pad(grey[:, None], (1, 1, 1, 1), mode="replicate"), kernels).unbind(1)
    direction = (torch.atan2(gy, gx) / (math.pi / 4)).round().long().remainder(4)
    return torch.where(gx.hypot(gy) > EDGE, direction, -1)


def _contrast(grey: Tensor) -> Tensor:
    near = F.pad(grey[:, None], (2, 2, 2, 2), mode="replicate")
    variance = F.avg_pool2d(near**2, 5, 1) - F.avg_pool2d(near, 5, 1) ** 2
    spread = variance.clamp(min=0).sqrt()[:, 0]
    return (spread >= FLAT).long() + (spread >= STRONG)


def _position(grey: Tensor) -> Tensor:
    height, width = grey.shape[1:]
    row, column = (torch.arange(n, device=grey.device) * 3 // n for n in (height, width))
    return (row[:, None] * 3 + column).expand_as(grey)


def procedural_concepts(
    count: int = 200, size: int = 32, channels: int = 3, *, seed: int = 0, batch_size: int = 128
) -> ConceptSet:
    """Scenes with exact masks of what was drawn, beside what :func:`label_image_concepts` finds in them.

    Of what was drawn: the object's shape and its parts; texture, spatial frequency of the pattern and orientation of
    stripes of background and object.

    Args:
        size: height and width, at least 8.
        channels: 3, or 1 for nets that see grey images: the same scenes without their colours.

    Raises:
        ValueError: an argument out of its range.
    """
    require_whole("concepts.count", count, 1)
    require_whole("concepts.size", size, 8)
    require_whole("concepts.seed", seed, 0)
    require_whole("concepts.batch_size", batch_size, 1)
    if channels not in (1, 3):
        raise ValueError(f"concepts.channels must be 1 or 3, got {channels!r}")
    scenes = draw_scenes(count, size, seeded(_PROCEDURAL, seed))
    images = scenes.images
    if channels == 1:
        images = luminance(images.float()).round().to(torch.uint8)[:, None]

    def spread(values: Tensor) -> Tensor:
        """(N, 2) of background and object → (N, H, W)."""
        return torch.where(scenes.inside, values[:, 1, None, None], values[:, 0, None, None])

    shape = torch.where(scenes.inside, scenes.shape[:, None, None], -1)
    of_shape = torch.full((len(SHAPES), len(PARTS)), -1)
    of_shape[tuple(torch.tensor(_SHAPE_PARTS).T)] = torch.arange(len(_SHAPE_PARTS))
    part = torch.where(scenes.inside, of_shape[shape, scenes.part], -1)
    maps = [shape, part, spread(scenes.texture), spread(scenes.frequency), spread(scenes.orientation)]
    drawn = _stacked(maps, [len(group) for group in _SCENE_CONCEPTS.values()])
    names, categories = _flat(_SCENE_CONCEPTS)
    more, more_categories = image_concepts(channels)
    labels = _beside(drawn, label_image_concepts(images), len(names))
    return ConceptSet(images, labels, names + more, categories + more_categories, batch_size)


def _beside(labels: Tensor, more: Tensor, count: int) -> Tensor:
    """Maps of ``count`` concepts, and those of further concepts, which count on."""
    return torch.cat([labels.short(), torch.where(more >= 0, more + count, -1).short()], 1)


@dataclass(frozen=True, eq=False)
class WithImageConcepts:
    """Annotated images, labelled in addition with the concepts that any image shows; colours if they have any.

    Args:
        data: what a reader of real annotation gives.
        channels: of its images.
    """

    data: AnnotatedImages
    channels: int = 3

    @property
    def concepts(self) -> tuple[str, ...]:
        return tuple(self.data.concepts) + image_concepts(self.channels)[0]

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(self.data.categories) + image_concepts(self.channels)[1]

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.data:
            yield images, _beside(labels, label_image_concepts(images), len(self.data.concepts))
