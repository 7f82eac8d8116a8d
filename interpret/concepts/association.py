"""Are the units that an attack moves those that carry concepts?  Rank statistics, and what a defense can make of it.

The question is that of Zhang et al. (1909.06978); the tests of it and the weights are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from glassarmor.interpret.concepts.dissection import STATES, Dissection
from glassarmor.interpret.signals.pse import PromotionSuppression
from glassarmor.interpret.signals.sensitivity import SensitivityControl

Mode = Literal["protect_detectors", "suppress_non_detectors", "stabilise_detectors"]


@dataclass(frozen=True)
class Association:
    """Sensitivity against interpretability over the units of one layer; NaN where nothing varies or a group is empty.

    ``spearman``: rank correlation of sensitivity with best IoU.  ``auc``: the chance that a detector is more sensitive than
    another unit, ties counted half = Mann–Whitney U / (n₁·n₂); ½ if detectors are like the rest.  ``overlap``: share of
    the ``top`` most sensitive units among the ``top`` most interpretable, ``overlap_expected`` by chance.
    ``…_p``: two-sided permutation p-values, of layers taken one by one.
    """

    units: int
    detectors: int
    top: int
    spearman: float
    spearman_p: float
    auc: float
    auc_p: float
    overlap: float
    overlap_expected: float
    overlap_p: float


def associate(
    sensitivity: Tensor, iou: Tensor, detectors: Tensor, *, top: int = 8, draws: int = 2000, seed: int = 0
) -> Association:
    """Statistics of one layer.

    Args:
        sensitivity, iou: (C,).
        detectors: (C,) bool.
        top: units on either list of the overlap, at most half of all; units tied at the end of a list share its places.
        draws: permutations of the sensitivities among the units, from a generator of their own; p ≥ 1 / (1 + draws).

    Raises:
        ValueError: shapes that differ, or values that are not finite.
    """
    if not sensitivity.shape == iou.shape == detectors.shape or sensitivity.dim() != 1:
        raise ValueError(
            "association: expected sensitivity, iou and detectors of one shape (C,), found"
            f" {tuple(sensitivity.shape)}, {tuple(iou.shape)}, {tuple(detectors.shape)}"
        )
    moved, seen, detects = sensitivity.double().cpu(), iou.double().cpu(), detectors.double().cpu()
    if not (moved.isfinite().all() and seen.isfinite().all()):
        raise ValueError("association: sensitivity and iou must be finite")
    units, found = len(moved), int(detects.sum())
    top, rest = min(top, units // 2), units - found
    generator = torch.Generator().manual_seed(seed)
    # The found order first, then the draws: each statistic is linear in what is permuted, so one product gives them all.
    order = torch.cat(
        [torch.arange(units)[None], torch.rand(draws, units, generator=generator, dtype=torch.float64).argsort(1)]
    )
    ranks = mid_ranks(moved)
    rho, rho_p = _judge(_standard(ranks)[order] @ _standard(mid_ranks(seen)) / max(1, units), 0.0)
    wins = ranks[order] @ detects - found * (found + 1) / 2
    auc, auc_p = _judge(wins / (found * rest) if found and rest else wins * torch.nan, 0.5)
    expected = top / units if top else math.nan
    both = membership(moved, top)[order] @ membership(seen, top) if top else torch.full((1 + draws,), torch.nan)
    overlap, overlap_p = _judge(both / max(1, top), expected)
    return Association(units, found, top, rho, rho_p, auc, auc_p, overlap, expected, overlap_p)


def _judge(statistics: Tensor, centre: float) -> tuple[float, float]:
    """The first statistic, and the share of all that lie as far from the centre, itself included."""
    if statistics.isnan().any():
        return math.nan, math.nan
    distance = (statistics - centre).abs()
    return float(statistics[0]), float((distance >= distance[0] - 1e-9).double().mean())


def _standard(values: Tensor) -> Tensor:
    """Mean 0 and variance 1; NaN if nothing varies."""
    centred = values - values.mean()
    return centred / centred.square().mean().sqrt()


def mid_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, (C,) float64; equal values share the mean of their places."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()


def membership(values: Tensor, top: int) -> Tensor:
    """Which units belong to the ``top`` largest, (C,) in [0, 1], summing to ``top``: ties at the end share what is left.

    Dead units all tie at 0; an order among them would make two lists agree, or not, by accident.
    """
    cut = values.sort(descending=True).values[top - 1]
    above, tied = (values > cut).double(), (values == cut).double()
    return above + tied * (top - above.sum()) / tied.sum()


def link(
    dissection: Dissection, control: SensitivityControl, *, top: int = 8, draws: int = 2000, seed: int = 0
) -> dict[str, Association]:
    """Associations of one layer for three sensitivities: "attack", "noise" of equal norm, and "corrected" = attack − noise.

    Dead and silent units are left out: at 0 on both sides they would tie the two together by themselves.
    """
    kept = ~dissection.dead & ~control.silent.to(dissection.dead.device)
    iou, detectors = dissection.best_iou[kept], dissection.detectors[kept]
    kept = kept.to(control.attack.device)
    values = {"attack": control.attack, "noise": control.noise, "corrected": control.attack - control.noise}
    return {
        name: associate(value[kept], iou.to(value.device), detectors.to(value.device), top=top, draws=draws, seed=seed)
        for name, value in values.items()
    }


@dataclass(frozen=True)
class UnitRow:
    """What is known of one unit.  Dead units have concept "" and IoU 0.  Promotion, suppression: mean, in logits."""

    layer: str
    unit: int
    state: str
    concept: str
    category: str
    iou: float
    detector: bool
    sensitivity: float
    corrected: float
    promotion: float
    suppression: float


def unit_rows(
    layer: str, dissection: Dissection, control: SensitivityControl, effects: PromotionSuppression
) -> tuple[UnitRow, ...]:
    """One row a unit, in the layer's order; ``effects`` (N, C) from :func:`.unit_effects`."""
    best = dissection.best_concept.tolist()
    dead = dissection.dead.tolist()
    columns = (
        dissection.state,
        dissection.best_iou,
        dissection.detectors,
        control.attack,
        control.attack - control.noise,
        effects.promotion.mean(0),
        effects.suppression.mean(0),
    )
    return tuple(
        UnitRow(
            layer=layer,
            unit=unit,
            state=STATES[state],
            concept="" if dead[unit] else dissection.concepts[best[unit]],
            category="" if dead[unit] else dissection.categories[best[unit]],
            iou=iou,
            detector=detector,
            sensitivity=sensitivity,
            corrected=corrected,
            promotion=promotion,
            suppression=suppression,
        )
        for unit, (state, iou, detector, sensitivity, corrected, promotion, suppression) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        )
    )


def concept_weights(dissection: Dissection, mode: Mode = "protect_detectors") -> Tensor:
    """Weights in [0, 1] that a unit's score is multiplied by before units are masked or stabilised, (C,) fp32.

    "protect_detectors": 0 for detectors, 1 for the rest: masking never takes a unit that carries a concept.
    "suppress_non_detectors": 1 − IoU / detection threshold, at least 0: the less of any concept, the more it counts.
    "stabilise_detectors": 1 for detectors, 0 for the rest: a regulariser that keeps concepts in place under attack.
    Constant units count 0 throughout: a sensitivity relative to no spread says nothing.

    Raises:
        ValueError: another mode.
    """
    detectors = dissection.detectors.float()
    if mode == "protect_detectors":
        weights = 1 - detectors
    elif mode == "suppress_non_detectors":
        weights = (1 - dissection.best_iou / max(dissection.detection, 1e-12)).clamp(min=0).float()
    elif mode == "stabilise_detectors":
        weights = detectors
    else:
        raise ValueError(f"mode: expected one of {', '.join(get_args(Mode))}, found {mode!r}")
    return weights.masked_fill(dissection.state >= STATES.index("constant"), 0)
