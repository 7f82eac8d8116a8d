"""Restoration curve: the slow reference, a closed form in which no order is better, its cost and its controls."""

from __future__ import annotations

import math

import pytest
import torch

from glassarmor.interpret.signals.pse import grid_regions, region_effects
from glassarmor.interpret.signals.restoration import restoration_curve
from tests.interpret.test_conductance import Counting
from tests.reference import interpretation as reference
from tests.reference.nets import Linear, batch, unchanged, untidy
from tests.reference.trained import attacked

GRID = (4, 2)


@pytest.fixture(scope="module")
def case():
    net, x, x_adv, y, target = attacked(n=10, eps=0.06)
    return net, x, x_adv, y, region_effects(net, x, x_adv, y, target, GRID)


@pytest.mark.parametrize("chunk", [1, 7, 128])
def test_equals_the_slow_reference_and_leaves_the_net_alone(case, chunk):
    net, x, x_adv, y, effects = case
    untidy(net)
    with unchanged(net):
        found = restoration_curve(net, x, x_adv, y, effects, GRID, chunk=chunk)
    net.eval()
    regions = grid_regions(8, 8, GRID)
    flipped = ((net(x).argmax(1) == y) & (net(x_adv).argmax(1) != y)).tolist()
    norms = torch.stack([(x_adv - x).square().sum(1)[:, regions == g].sum(1) for g in range(8)], 1)

    def answer(image) -> int:
        return int(net(torch.from_numpy(image)[None]).argmax())

    def slow(score) -> list[int]:
        return [
            reference.regions_needed(answer, x[i].numpy(), x_adv[i].numpy(), int(y[i]), score[i].numpy(), regions.numpy())
            for i in range(10)
            if flipped[i]
        ]

    by_effect, by_norm = slow(effects.margin), slow(norms)
    assert found.samples == sum(flipped) == len(by_effect) > 4
    assert found.needed[torch.tensor(flipped)].tolist() == by_effect
    assert (found.needed[~torch.tensor(flipped)] == -1).all()
    for curve, needed in ((found.by_effect, by_effect), (found.by_norm, by_norm)):
        assert curve.tolist() == pytest.approx([sum(k <= g for k in needed) / len(needed) for g in range(9)])
    assert found.share.tolist() == pytest.approx([g / 8 for g in range(9)])


def test_curves_rise_from_nothing_to_all(case):
    net, x, x_adv, y, effects = case
    found = restoration_curve(net.eval(), x, x_adv, y, effects, GRID)
    for curve in (found.by_effect, found.by_norm, *found.by_chance):
        assert curve[0] == 0
        assert curve[-1] == 1
        assert (curve.diff() >= 0).all()
    for name, curve in (("effect", found.by_effect), ("norm", found.by_norm)):
        assert found.areas[name] == pytest.approx(float((curve[1:] + curve[:-1]).sum()) / 16)


def test_the_order_by_effect_beats_both_controls(case):
    net, x, x_adv, y, effects = case
    areas = restoration_curve(net.eval(), x, x_adv, y, effects, GRID).areas
    assert areas["effect"] > areas["chance"] + 3 * areas["chance_std"]
    assert areas["effect"] > areas["norm"]


def test_on_a_linear_net_of_two_classes_no_order_is_better():
    """There every region takes back exactly its own effect, so the largest first is the best there is."""
    net = Linear((3, 8, 8), 2)
    x, _, _ = batch(n=12, classes=2)
    y = net(x).argmax(1)
    w = net.head.weight.detach().view(2, 3, 8, 8)
    sizes = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 0.15
    x_adv = (x + sizes * (w[1 - y] - w[y]).sign()).clamp(0, 1)
    effects = region_effects(net, x, x_adv, y, 1 - y, GRID)
    found = restoration_curve(net, x, x_adv, y, effects, GRID, draws=30)
    assert found.samples > 6
    assert (found.by_effect >= found.by_chance - 1e-6).all()
    assert (found.by_effect >= found.by_norm - 1e-6).all()
    assert found.areas["effect"] > found.areas["chance"]


def test_seeded_and_blind_to_the_global_generator(case):
    net, x, x_adv, y, effects = case
    state = torch.get_rng_state()
    curves = [restoration_curve(net, x, x_adv, y, effects, GRID, seed=seed).by_chance for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(curves[0], curves[1])
    assert not torch.equal(curves[0], curves[2])


def test_cost(case):
    net, x, x_adv, y, effects = case
    counting = Counting(net).eval()
    found = restoration_curve(counting, x, x_adv, y, effects, GRID, draws=3, chunk=16)
    assert max(counting.batches) <= 16
    most = 2 * 10 + found.samples * 8 * 5
    assert sum(counting.batches) < 0.9 * most  # samples drop out once their label is back


def test_nothing_to_restore():
    net, x, _, y, target = attacked(n=4)
    found = restoration_curve(net, x, x, y, region_effects(net, x, x, y, target, GRID), GRID)
    assert found.samples == 0
    assert found.by_effect.isnan().all()
    assert math.isnan(found.areas["effect"])


def test_pixels_of_no_region_stay_adversarial():
    net, x, x_adv, y, target = attacked(n=10)
    regions = torch.full((8, 8), -1)
    regions[0, 0] = 0
    found = restoration_curve(net, x, x_adv, y, region_effects(net, x, x_adv, y, target, regions), regions)
    assert found.samples > 4
    assert found.by_effect[-1] < 1  # one clean pixel does not save them all
    assert found.needed.max() == 2  # never, of one region


def test_effects_of_other_regions(case):
    net, x, x_adv, y, effects = case
    with pytest.raises(ValueError, match=r"effects: expected shape \(10, 16\), found \(10, 8\)"):
        restoration_curve(net, x, x_adv, y, effects, (4, 4))
