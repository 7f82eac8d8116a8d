"""The background of a profile: training images that stand for their classes, and how well they do (ours)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from glassarmor.interpret.modes import evaluating
from glassarmor.interpret.network.layouts import layouts_of
from glassarmor.interpret.observation import record

USUAL: Final = 0.95  # an image is covered if it is as near to the background as this share of the background itself


def pooled(activation: Tensor) -> Tensor:
    """φ of a layer (N, C, positions…): its mean over positions, fp32, (N, C); of tokens, the class token among them."""
    activation = activation.float()
    return activation if activation.dim() < 3 else activation.flatten(2).mean(2)


@dataclass(frozen=True)
class Background:
    """φ of M background images at each layer, (M, D), in execution order; their labels (M,) and ids.

    ``flattened``: φ is the whole activation, not its mean.
    """

    features: Mapping[str, Tensor]
    labels: Tensor
    ids: tuple[str, ...]
    flattened: bool = False

    def phi(self, activation: Tensor) -> Tensor:
        """φ of other images, made as the background's was, (N, D)."""
        return activation.float().flatten(1) if self.flattened else pooled(activation)

    def counts(self, classes: int) -> Tensor:
        """Images of each class, (classes,) int64."""
        return torch.bincount(self.labels, minlength=classes)


def background_features(
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    layers: Sequence[str],
    *,
    ids: Sequence[str] | None = None,
    flatten: bool = False,
) -> Background:
    """Run the background images in eval mode, batch by batch, and keep φ of each layer; the net is left as it was.

    Args:
        batches: images (N, C, H, W) in [0,1] and their labels (N,).
        layers: names as in ``net.named_modules()``.
        ids: one for each image; by default its number.
        flatten: keep whole activations: exact about positions, dear in memory.

    Raises:
        ValueError: no image, ids of another number, or what :func:`.record` raises.
    """
    kept: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    # Recording needs version counters, which tensors made under inference mode lack; validation loops run under it.
    with torch.inference_mode(False), torch.no_grad(), evaluating(net):
        for x, y in batches:
            template = Background({}, y, (), flatten)
            with record(net, layers, layouts_of(net, x, layers)) as acts:
                net(x.clone())
            for layer, act in acts.items():
                kept.setdefault(layer, []).append(template.phi(act))
            labels.append(y)
    if not labels:
        raise ValueError("background: expected at least one batch of images, found none")
    every = torch.cat(labels)
    names = tuple(map(str, range(len(every)))) if ids is None else tuple(ids)
    if len(names) != len(every):
        raise ValueError(f"ids: expected {len(every)}, one for each background image, found {len(names)}")
    features = {layer: torch.cat(parts) for layer, parts in kept.items()}
    return Background(features, every, names, flatten)


@dataclass(frozen=True)
class Choice:
    """``indices`` (M,) of the chosen images, class by class; ``radius`` class → the largest distance of any of its images
    from the nearest chosen one, in units of the features.
    """

    indices: Tensor
    radius: Mapping[int, float]


@torch.no_grad()
def choose_background(features: Tensor, labels: Tensor, per_class: int) -> Choice:
    """Images that cover each class: k-centre by farthest-first traversal (Gonzalez 1985), within twice the best radius.

    It begins with the image nearest to the class mean and adds the one that is farthest from all chosen; ties go to the
    lower index, so that the same images give the same choice.

    Args:
        features: any (N, D) in which distance means something, e.g. the pooled last stage, or small images, flattened.
        labels: (N,).
        per_class: images of each class; a smaller class is taken whole.

    Raises:
        ValueError: ``per_class`` below 1, or labels of another number.
    """
    if per_class < 1:
        raise ValueError(f"per_class: expected at least 1, found {per_class}")
    if len(labels) != len(features):
        raise ValueError(f"labels: expected {len(features)}, one for each row of features, found {len(labels)}")
    chosen, radius = [], {}
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        picks, radius[label] = _farthest_first(features[members].float(), min(per_class, len(members)))
        chosen.append(members[picks])
    return Choice(torch.cat(chosen), radius)


def _farthest_first(points: Tensor, count: int) -> tuple[Tensor, float]:
    def distance(to: Tensor) -> Tensor:  # no inner products: they cancel between near points
        return torch.cdist(points, to[None], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]

    pick = distance(points.mean(0)).argmin()
    nearest, free = distance(points[pick]), torch.ones(len(points), dtype=torch.bool, device=points.device)
    picks = [pick]
    free[pick] = False
    for _ in range(count - 1):
        pick = nearest.masked_fill(~free, -1).argmax()  # of equal images each can be chosen once
        nearest = torch.minimum(nearest, distance(points[pick]))
        picks.append(pick)
        free[pick] = False
    return torch.stack(picks), float(nearest.max())


def class_perception(distances: Tensor, labels: Tensor, wanted: Tensor, neighbours: int) -> Tensor:
    """Share of the k nearest background images that are of the wanted class, (N,).

    Args:
        distances: to each background image, (N, M).
        labels: of the background, (M,).
        wanted: a class for each row, (N,).
        neighbours: k.

    Raises:
        ValueError: k outside 1..M.
    """
    if not 1 <= neighbours <= len(labels):
        raise ValueError(f"neighbours: expected 1..{len(labels)}, the size of the background, found {neighbours}")
    nearest = distances.topk(neighbours, dim=1, largest=False).indices
    return (labels[nearest] == wanted[:, None]).float().mean(1)


def class_members(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Rows of each class, (classes, most), and which of them are real, bool: smaller classes are padded with row 0."""
    counts = torch.bincount(labels, minlength=classes)
    rows = labels.argsort(stable=True)
    place = torch.arange(int(counts.max()), device=labels.device)
    real = place < counts[:, None]
    members = torch.zeros(real.shape, dtype=torch.long, device=labels.device)
    members[real] = rows
    return members, real


def class_spacing(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How far the background images of a class lie apart, (classes,): quantile ``USUAL`` of the distance to the nearest
    other image of the class.  Infinite below two images: there is nothing to measure.
    """
    members, real = class_members(labels, classes)
    points = features[members]  # (classes, most, D)
    other = real[:, None] & real[..., None] & ~torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    nearest = torch.cdist(points, points).masked_fill(~other, torch.inf).amin(2).masked_fill(~real, torch.nan)
    return torch.nanquantile(nearest, USUAL, dim=1).nan_to_num(torch.inf, torch.inf)


def relative_distance(distances: Tensor, labels: Tensor, spacing: Tensor, wanted: Tensor) -> Tensor:
    """Distance to the nearest background image of the wanted class over that class's spacing, (N,).

    Above 1 the image lies farther from the background than all but 5 % of the background's own images; infinite if the
    class has fewer than two.
    """
    other = labels != wanted[:, None]
    nearest = distances.masked_fill(other, torch.inf).amin(1)
    scale = spacing[wanted]
    return torch.where(scale.isfinite(), nearest / scale.clamp_min(1e-12), torch.inf)
