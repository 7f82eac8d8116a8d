"""Network dissection: which concept does each unit of a layer detect?  (Bau et al., CVPR 2017, section 2)

The exact streaming thresholds, the counting over units that fire, and the dead states are ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from glassarmor.interpret.concepts.quantiles import ExactTail, HistogramTail, TailThreshold
from glassarmor.interpret.inputs import floats_of
from glassarmor.interpret.modes import evaluating
from glassarmor.interpret.network.layouts import Layout, layouts_of
from glassarmor.interpret.observation import record

Union = Literal["global", "category", "met"]
STATES: Final = ("alive", "never exceeds", "constant", "zero")  # by number; all but the first are dead
MIB: Final = 2**20


class ConceptData(Protocol):
    """Annotated images.  Iterating yields ``(images, labels)`` batches, the same in the same order every time.

    images: (B, C, H, W) fp32 in [0,1].  labels: (B, L, h, w) integers, any number of maps beside each other: each pixel
    names a concept by its index, or −1 for none.  No pixel of an image carries the same concept in two maps.
    """

    @property
    def concepts(self) -> Sequence[str]:
        """Names, (K,)."""

    @property
    def categories(self) -> Sequence[str]:
        """The category of each concept, (K,)."""

    def __len__(self) -> int:
        """Number of images."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Dissection:
    """Units of one layer against concepts; all counts are pixels at the masks' resolution, int64.

    M_k = [upsampled A_k > T_k], L_c = pixels that carry the concept, both over all images.
    """

    concepts: tuple[str, ...]  # (K,)
    categories: tuple[str, ...]  # (K,) category of each concept
    union: Union
    detection: float  # IoU above which a unit detects
    pixels: int  # of all images together
    thresholds: Tensor  # (C,) T_k, fp32
    relative_error: float  # of the thresholds, upwards; 0: exact
    state: Tensor  # (C,) int8, index into STATES
    intersection: Tensor  # (C, K) |M ∧ L|
    unit: Tensor  # (C,) |M|
    concept: Tensor  # (K,) |L|
    unit_carried: Tensor  # (C, G) |M| in images that carry the category; categories as in ``category_names``
    unit_met: Tensor  # (C, G) |M| in images where M meets a concept of the category
    top_images: Tensor  # (C, top) the images that excite the unit most, strongest first; ties: earlier image first
    top_positions: Tensor  # (C, top, 2) row and column of the maximum in the layer's own map
    top_values: Tensor  # (C, top) activation there
    map_size: tuple[int, int]  # of the layer

    @cached_property
    def category_names(self) -> tuple[str, ...]:
        """Categories in order of first appearance, (G,)."""
        return tuple(dict.fromkeys(self.categories))

    @cached_property
    def iou(self) -> Tensor:
        """(C, K) float64, |M ∧ L| / |M ∨ L|; 0 where both are empty.  ``union`` says which images M is counted in:

        "global": all.  "category": those that carry some concept of c's category, as the paper says.  "met": those where
        M meets a concept of the category, as in the published "lite" code (the same or higher again).
        """
        index = torch.tensor([self.category_names.index(name) for name in self.categories], device=self.unit.device)
        counted = {"global": None, "category": self.unit_carried, "met": self.unit_met}[self.union]
        unit = self.unit[:, None] if counted is None else counted[:, index]
        union = unit + self.concept - self.intersection
        return self.intersection.double() / union.clamp(min=1)

    @cached_property
    def chance(self) -> Tensor:
        """(C, K) global IoU of masks of these sizes that lie anywhere: e / (|M| + |L| − e), e = |M|·|L| / pixels."""
        unit, concept = self.unit[:, None].double(), self.concept.double()
        expected = unit * concept / self.pixels
        return expected / (unit + concept - expected).clamp(min=1)

    @cached_property
    def best_concept(self) -> Tensor:
        """(C,) index of the concept with the highest IoU, the first of several; meaningless for dead units."""
        return self.iou.argmax(1)

    @cached_property
    def best_iou(self) -> Tensor:
        """(C,) float64."""
        return self.iou.amax(1)

    @cached_property
    def dead(self) -> Tensor:
        """(C,) bool: units that never exceed their threshold, constant and zero ones included."""
        return self.state != 0

    @cached_property
    def detectors(self) -> Tensor:
        """(C,) bool: units whose best IoU exceeds the detection threshold."""
        return (self.best_iou > self.detection) & ~self.dead

    @cached_property
    def detectors_by_category(self) -> dict[str, int]:
        """Number of detectors whose concept belongs to the category."""
        return self._by_category(self.best_concept[self.detectors].tolist())

    @cached_property
    def unique_detectors(self) -> dict[str, int]:
        """Number of different concepts of the category that some unit detects: the paper's measure of interpretability."""
        return self._by_category(self.best_concept[self.detectors].unique().tolist())

    def _by_category(self, concepts: list[int]) -> dict[str, int]:
        found = [self.categories[concept] for concept in concepts]
        return {name: found.count(name) for name in self.category_names}


@torch.no_grad()
def dissect(
    net: nn.Module,
    data: ConceptData,
    layers: Sequence[str],
    *,
    quantile: float = 0.005,
    union: Union = "global",
    detection: float = 0.04,
    top: int = 8,
    memory: int = 256 * MIB,
) -> dict[str, Dissection]:
    """Dissect all named layers in two passes over the data, in eval mode; on the net's device.

    The first pass finds T_k, the smallest threshold with P(A_k > T_k) ≤ ``quantile`` over all positions of all images;
    the second upsamples the maps bilinearly to the masks' size and counts.  Only images in which a unit exceeds its
    threshold are upsampled (an interpolated value never exceeds its neighbours): a few percent of them, which is why this
    is faster than one matrix product of all units with all concepts.

    Thresholds are exact wherever a share ``quantile`` of a layer's values fits the budget; else they come from a
    histogram and may be too high by ``Dissection.relative_error``, between 2^−10 and 2^−4 of their size.

    Args:
        data: see :class:`ConceptData`; batches of the size that the forward shall have.
        layers: names; feature maps and grids of tokens, or (N, C), which count as one position.
        quantile: the paper's 0.005 suits concepts that each cover a small part of much data.  Where they cover several
            percent of the pixels, as in drawn scenes, 0.02 is nearer to what a detector would fire on: masks of a half
            percent reach an IoU of at most 0.005 / 0.05 with a concept of five.
        union: see :attr:`Dissection.iou`.
        top: images kept a unit.
        memory: bytes for activations, thresholds and masks; the forward and the labels of one batch come on top.  If all
            activations fit a half of it, each image runs through the net once, else twice.

    Raises:
        ValueError: options out of range; data that can be iterated only once, is empty, or names concepts it has not;
            layers that aren't there or have another shape; activations that are not finite; a budget too small.
    """
    _check(data, layers, quantile, union)
    first: dict[str, _Extremes] = {}
    tails: dict[str, TailThreshold] = {}
    kept: list[_Batch] | None = []
    room, images = memory // 2, 0
    for batch in _batches(net, data, layers):
        for name, act in batch.acts.items():
            if name not in first:
                first[name] = _Extremes(name, act, min(top, len(data)))
                tails[name] = _tail(act, quantile, len(data), memory // (2 * len(layers)))
            first[name].add(act, images)
            tails[name].add(act.transpose(0, 1).flatten(1))
        images += len(batch.labels)
        room -= batch.bytes
        kept = [*kept, batch] if kept is not None and room >= 0 else None
    if images != len(data):
        raise ValueError(f"concepts: the data announced {len(data)} images and yielded {images}")
    thresholds = {name: (tail.threshold(), tail.relative_error) for name, tail in tails.items()}
    tails.clear()  # their half of the budget is the masks' now
    counts: dict[str, _Counts] = {}
    concepts = _Concepts(data)
    for batch in kept if kept is not None else _batches(net, data, layers):
        concepts.add(batch.labels)
        for name, act in batch.acts.items():
            count = counts.setdefault(name, _Counts(act.shape[1], concepts))
            count.add(act, thresholds[name][0], batch.labels, memory // 2)
    return {
        name: _dissection(data, union, detection, concepts, thresholds[name], layer, counts[name])
        for name, layer in first.items()
    }


def _check(data: ConceptData, layers: Sequence[str], quantile: float, union: Union) -> None:
    """Raises ValueError for options out of range, and for data that can't be what is needed."""
    if not 0 < quantile < 1:
        raise ValueError(f"quantile: expected a number in (0, 1), found {quantile}")
    if union not in get_args(Union):
        raise ValueError(f"union: expected one of {', '.join(get_args(Union))}, found {union!r}")
    if not layers:
        raise ValueError("layers: expected at least one name")
    if isinstance(data, Iterator):
        raise ValueError("concepts: the data must yield its batches twice, found an iterator, which ends")
    if len(data) == 0 or len(data.concepts) == 0 or len(data.concepts) != len(data.categories):
        raise ValueError(
            "concepts: expected images, and a category for each concept, found"
            f" {len(data)} images, {len(data.concepts)} concepts, {len(data.categories)} categories"
        )


def _dissection(
    data: ConceptData,
    union: Union,
    detection: float,
    concepts: _Concepts,
    threshold: tuple[Tensor, float],
    layer: _Extremes,
    count: _Counts,
) -> Dissection:
    """One layer, from what both passes counted; ``threshold`` with its relative error."""
    constant = layer.lowest == layer.highest
    state = (count.unit == 0).to(torch.int8)
    state[constant] = STATES.index("constant")
    state[constant & (layer.highest == 0)] = STATES.index("zero")
    return Dissection(
        concepts=tuple(data.concepts),
        categories=tuple(data.categories),
        union=union,
        detection=detection,
        pixels=concepts.pixels,
        thresholds=threshold[0],
        relative_error=threshold[1],
        state=state,
        intersection=count.intersection[:, :-1],
        unit=count.unit,
        concept=concepts.count,
        unit_carried=count.carried,
        unit_met=count.met[:, :-1],
        top_images=layer.images,
        top_positions=torch.stack([layer.positions // layer.size[1], layer.positions % layer.size[1]], -1),
        top_values=layer.values,
        map_size=layer.size,
    )


@dataclass(frozen=True)
class _Batch:
    labels: Tensor  # (B, L, H, W)
    acts: dict[str, Tensor]  # (B, C, h, w)

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.labels, *self.acts.values()))


def _batches(net: nn.Module, data: ConceptData, layers: Sequence[str]) -> Iterator[_Batch]:
    like = next(itertools.chain(net.parameters(), net.buffers()), None)
    for images, labels in data:
        if labels.dim() != 4 or len(labels) != len(images) or labels.is_floating_point():
            raise ValueError(
                f"concepts: expected integer labels (B, maps, H, W) with B = {len(images)},"
                f" found {labels.dtype} {tuple(labels.shape)}"
            )
        low, high = labels.aminmax()
        if low < -1 or high >= len(data.concepts):
            raise ValueError(f"concepts: labels must lie in -1..{len(data.concepts) - 1}, found {int(low)}..{int(high)}")
        device = images.device if like is None else like.device
        images = images.to(device, floats_of(net, images))
        layouts = layouts_of(net, images, layers)
        with evaluating(net), record(net, layers, layouts) as acts:
            net(images)
        yield _Batch(labels.to(device), {name: _maps(name, act, layouts[name]) for name, act in acts.items()})


def _maps(name: str, act: Tensor, layout: Layout) -> Tensor:
    act = act.detach().float()
    if act.dim() == 2:
        return act[:, :, None, None]
    if not layout.spatial:
        raise ValueError(
            f"layers: {name!r} gives {tuple(act.shape)}; dissection needs a map over the image, or (N, C) without positions"
        )
    return layout.maps(act)


def _tail(act: Tensor, quantile: float, images: int, memory: int) -> TailThreshold:
    units, total = act.shape[1], images * act.shape[2] * act.shape[3]
    if ExactTail.bytes(quantile, total, units) <= memory:
        return ExactTail(quantile, total)
    return HistogramTail(quantile, total, units, memory, act.device)


class _Extremes:
    """First pass over one layer: range and strongest images of every unit."""

    def __init__(self, name: str, act: Tensor, top: int) -> None:
        units, self.size = act.shape[1], (act.shape[2], act.shape[3])
        self.name, self.top = name, top
        self.lowest = act.new_full((units,), torch.inf)
        self.highest = -self.lowest
        self.values = act.new_empty(units, 0)
        self.images = self.positions = torch.empty(units, 0, dtype=torch.int64, device=act.device)

    def add(self, act: Tensor, start: int) -> None:
        """``act`` (B, C, h, w) of the images from number ``start`` on."""
        if tuple(act.shape[2:]) != self.size:
            raise ValueError(f"layers: {self.name!r} changed its map from {self.size} to {tuple(act.shape[2:])}")
        low, high = act.amin((0, 2, 3)), act.amax((0, 2, 3))
        if not (low.isfinite() & high.isfinite()).all():
            raise ValueError(f"layers: {self.name!r} holds activations that are not finite")
        self.lowest, self.highest = self.lowest.minimum(low), self.highest.maximum(high)
        values, positions = act.flatten(2).max(2)  # (B, C)
        numbers = torch.arange(start, start + len(act), device=act.device).expand(act.shape[1], -1)
        values = torch.cat([self.values, values.T], 1)
        order = values.sort(dim=1, descending=True, stable=True).indices[:, : self.top]  # stable: ties in order of arrival
        self.values = values.gather(1, order)
        self.images = torch.cat([self.images, numbers], 1).gather(1, order)
        self.positions = torch.cat([self.positions, positions.T], 1).gather(1, order)


class _Concepts:
    """What the masks hold, whichever layer is looked at.  Index K stands for "no concept", index G for "no category"."""

    def __init__(self, data: ConceptData) -> None:
        names = list(dict.fromkeys(data.categories))
        self.size, self.groups = len(data.concepts), len(names)
        self.group = torch.tensor([*(names.index(name) for name in data.categories), len(names)])  # (K + 1,)
        self.count = torch.zeros(self.size, dtype=torch.int64)
        self.carries = torch.empty(0)
        self.rows = torch.empty(0)
        self.pixels = 0

    def add(self, labels: Tensor) -> None:
        """Prepare one batch, (B, L, H, W): concept pixels, the categories each image carries, labels pixel by pixel."""
        batch, maps, height, width = labels.shape
        self.group, self.count = self.group.to(labels.device), self.count.to(labels.device)
        self.pixels += batch * height * width
        # One row a pixel, so that the masks' pixels are gathered as whole rows.
        self.rows = labels.long().remainder(self.size + 1).flatten(2).transpose(1, 2).reshape(-1, maps)  # −1 → K
        image = torch.arange(batch, device=labels.device).repeat_interleave(height * width)[:, None]
        code = image * (self.size + 1) + self.rows
        by_image = torch.bincount(code.flatten(), minlength=batch * (self.size + 1)).view(batch, -1)[:, :-1]
        self.count += by_image.sum(0)
        self.carries = torch.zeros(batch, self.groups, dtype=torch.int64, device=labels.device)
        self.carries.index_add_(1, self.group[:-1], by_image).clamp_(max=1)


class _Counts:
    """Second pass over one layer: pixels of M, of M ∧ L, and of M by category."""

    def __init__(self, units: int, concepts: _Concepts) -> None:
        self.concepts = concepts
        device = concepts.group.device
        self.unit = torch.zeros(units, dtype=torch.int64, device=device)
        self.intersection = torch.zeros(units, concepts.size + 1, dtype=torch.int64, device=device)
        self.carried = torch.zeros(units, concepts.groups, dtype=torch.int64, device=device)
        self.met = torch.zeros(units, concepts.groups + 1, dtype=torch.int64, device=device)

    def add(self, act: Tensor, threshold: Tensor, labels: Tensor, memory: int) -> None:
        """``act`` (B, C, h, w); ``labels`` (B, L, H, W), which the concepts have prepared."""
        maps, height, width = labels.shape[1:]
        down, across = upsampling(act.shape[2], height, act), upsampling(act.shape[3], width, act)
        image, unit = (act.amax((2, 3)) > threshold).nonzero(as_tuple=True)
        # The worst case by pixel: every pixel fires, and its labels are gathered and coded in int64.
        chunk = max(1, memory // (height * width * (64 + 40 * maps)))
        for i, k in zip(image.split(chunk), unit.split(chunk), strict=True):
            # A − T is exact in sign, also after interpolation: a plateau at T must not exceed T by a rounding error.
            above = act[i, k] - threshold[k][:, None, None]
            mask = (down @ (above @ across.T) > 0).flatten(1)
            self._count(mask, i, k)

    def _count(self, mask: Tensor, image: Tensor, unit: Tensor) -> None:
        """``mask`` (P, H·W) of P pairs of an image and a unit."""
        concepts, area = self.concepts, mask.sum(1)
        pair, pixel = mask.nonzero(as_tuple=True)
        labels = concepts.rows[image[pair] * mask.shape[1] + pixel]  # (fired, L)
        code = unit[pair][:, None] * (concepts.size + 1) + labels
        self.intersection += torch.bincount(code.flatten(), minlength=self.intersection.numel()).view_as(self.intersection)
        meets = torch.zeros(len(mask), concepts.groups + 1, dtype=torch.bool, device=mask.device)
        meets[pair[:, None], concepts.group[labels]] = True
        self.unit.index_add_(0, unit, area)
        self.carried.index_add_(0, unit, area[:, None] * concepts.carries[image])
        self.met.index_add_(0, unit, area[:, None] * meets)


def upsampling(small: int, large: int, like: Tensor) -> Tensor:
    """Bilinear interpolation along one axis as a matrix (large, small): rows hold two weights, and sum to 1.

    As a product of two small matrices it takes a third of the time of ``interpolate`` for a thousand small maps.
    """
    eye = torch.eye(small, dtype=like.dtype, device=like.device)
    return nn.functional.interpolate(eye[None], size=large, mode="linear", align_corners=False)[0].T
