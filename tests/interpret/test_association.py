"""Rank statistics against SciPy and closed forms; what the link makes of dead units; weights for a defense."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from glassarmor.interpret.concepts.association import associate, concept_weights, link, membership, mid_ranks, unit_rows
from glassarmor.interpret.concepts.dissection import Dissection, dissect
from glassarmor.interpret.signals.pse import PromotionSuppression
from glassarmor.interpret.signals.sensitivity import SensitivityControl
from tests.interpret.test_dissection import Annotated


def case(seed: int, units: int = 40, ties: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    iou = torch.rand(units, generator=generator) * 0.1
    moved = torch.rand(units, generator=generator) + 5 * iou
    if ties:
        iou, moved = (iou * 100).round() / 100, (moved * 8).round() / 8
    return moved, iou, iou > 0.04


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_statistics_and_p_values_are_scipys(seed: int, ties: bool) -> None:
    moved, iou, detectors = case(seed, ties=ties)
    found = associate(moved, iou, detectors, draws=20_000)
    rho = stats.spearmanr(moved, iou)
    whitney = stats.mannwhitneyu(moved[detectors], moved[~detectors], method="asymptotic", use_continuity=False)
    assert found.spearman == pytest.approx(rho.statistic, abs=1e-12)
    assert found.auc == pytest.approx(whitney.statistic / (int(detectors.sum()) * int((~detectors).sum())), abs=1e-12)
    assert found.spearman_p == pytest.approx(rho.pvalue, abs=0.012)
    assert found.auc_p == pytest.approx(whitney.pvalue, abs=0.012)
    assert (found.units, found.detectors, found.top) == (40, int(detectors.sum()), 8)


def test_overlap_is_hypergeometric_by_chance() -> None:
    """Ten of thirty on either list with six in common."""
    moved = torch.arange(30.0)
    iou = torch.zeros(30)
    iou[torch.tensor([29, 28, 27, 26, 25, 24, 3, 2, 1, 0])] = torch.linspace(1, 2, 10)
    found = associate(moved, iou, iou > 0, top=10, draws=20_000)
    assert found.overlap == pytest.approx(0.6)
    assert found.overlap_expected == pytest.approx(1 / 3)
    chance = stats.hypergeom(30, 10, 10)
    far = [k for k in range(11) if abs(k - 10 / 3) >= 6 - 10 / 3 - 1e-9]
    assert found.overlap_p == pytest.approx(sum(chance.pmf(k) for k in far), abs=0.008)


def test_perfect_order() -> None:
    moved = torch.arange(20.0)
    found = associate(moved, moved**2, moved >= 12, draws=999)
    assert (found.spearman, found.auc, found.overlap) == (pytest.approx(1), 1, 1)
    assert (found.spearman_p, found.auc_p, found.overlap_p) == (0.001, 0.001, pytest.approx(0.001, abs=0.002))
    assert associate(-moved, moved**2, moved >= 12, draws=99).auc == 0


def test_p_values_are_uniform_where_nothing_is_linked() -> None:
    generator = torch.Generator().manual_seed(0)
    p = []
    for seed in range(200):
        iou = torch.rand(24, generator=generator)
        found = associate(torch.rand(24, generator=generator), iou, iou > 0.6, draws=199, seed=seed)
        p.append((found.spearman_p, found.auc_p))
    shares = (torch.tensor(p) <= 0.1).double().mean(0)
    assert ((shares > 0.04) & (shares < 0.17)).all()


def test_same_seed_same_p_and_no_draw_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    assert associate(*case(0)) == associate(*case(0))
    assert torch.equal(state, torch.get_rng_state())


def test_nothing_to_compare_is_nan() -> None:
    flat = associate(torch.ones(6), torch.rand(6), torch.zeros(6, dtype=torch.bool), draws=50)
    assert math.isnan(flat.spearman)
    assert math.isnan(flat.spearman_p)
    assert math.isnan(flat.auc)
    assert flat.overlap == pytest.approx(flat.overlap_expected)  # all tied: exactly chance
    none = associate(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.bool))
    assert none.units == 0
    assert math.isnan(none.overlap)
    with pytest.raises(ValueError, match="one shape"):
        associate(torch.ones(3), torch.ones(2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be finite"):
        associate(torch.tensor([torch.nan, 1]), torch.ones(2), torch.ones(2, dtype=torch.bool))


def test_ties_share_places_and_ranks() -> None:
    values = torch.tensor([5.0, 3, 3, 3, 1])
    assert membership(values, 2).tolist() == [1, pytest.approx(1 / 3), pytest.approx(1 / 3), pytest.approx(1 / 3), 0]
    assert mid_ranks(values).tolist() == [5, 3, 3, 3, 1]


def dissection() -> tuple[Dissection, SensitivityControl]:
    """Units: two detectors, one that fires elsewhere, one between, one constant, one zero."""
    labels = torch.full((10, 1, 10, 10), -1)
    labels[:, :, 0] = 0
    labels[:, :, 5, :5] = 1
    x = torch.zeros(10, 6, 10, 10)
    x[:, 0, 0] = 1
    x[:, 1, 5, :4] = 2
    x[:, 2, 8] = 1
    x[:, 3, 8] = 1
    x[:, 3, 0, 0] = 1
    x[:, 4] = 3
    net = nn.Sequential(nn.Identity(), nn.Flatten())
    found = dissect(net, Annotated(x, labels, ("row", "bar"), ("a", "b")), ["0"], quantile=0.2, detection=0.1)["0"]
    attack = torch.tensor([1.0, 2, 3, 4, 900, 0])
    return found, SensitivityControl(attack, attack, 0 * attack, attack / 2, torch.tensor([False] * 5 + [True]))


def test_link_leaves_out_dead_and_silent_units() -> None:
    found, control = dissection()
    assert found.best_iou.tolist() == pytest.approx([1, 0.8, 0, 1 / 20, 0, 0])
    links = link(found, control, draws=50)
    assert list(links) == ["attack", "noise", "corrected"]
    assert {name: value.units for name, value in links.items()} == {"attack": 4, "noise": 4, "corrected": 4}
    assert links["attack"].spearman == pytest.approx(stats.spearmanr([1, 2, 3, 4], [1, 0.8, 0, 0.05]).statistic)
    assert links["attack"].auc == 0  # both detectors move less than both others
    louder = replace(control, noise=torch.tensor([0.0, 2, 5, 7, 0, 0]))
    assert link(found, louder, draws=50)["corrected"].auc == 1


def test_weights() -> None:
    found, _ = dissection()
    assert concept_weights(found, "protect_detectors").tolist() == [0, 0, 1, 1, 0, 0]
    assert concept_weights(found, "suppress_non_detectors").tolist() == pytest.approx([0, 0, 1, 0.5, 0, 0])
    assert concept_weights(found, "stabilise_detectors").tolist() == [1, 1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="mode: expected one of protect_detectors"):
        concept_weights(found, "all")


def test_rows() -> None:
    found, control = dissection()
    promotion = torch.arange(12.0).view(2, 6)
    rows = unit_rows("0", found, control, PromotionSuppression(promotion, -promotion, promotion.sum(1), -promotion.sum(1)))
    assert [row.unit for row in rows] == list(range(6))
    assert [row.concept for row in rows[:2]] == ["row", "bar"]
    assert (rows[1].category, rows[1].detector, rows[1].corrected) == ("b", True, 1)
    assert (rows[1].promotion, rows[1].suppression) == (4, -4)
    assert (rows[4].state, rows[4].concept, rows[4].iou) == ("constant", "", 0)
