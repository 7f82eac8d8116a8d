"""Image level and unit controls: CAM table, interpretability score, overlap of kinds with CAMs, equal-norm noise, curves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from glassarmor.interpret.observation import observe
from glassarmor.interpret.signals.cam import (
    cam_table,
    class_activation_map,
    class_region,
    interpretability,
    interpretability_score,
)
from glassarmor.interpret.signals.overlap import region_overlap
from glassarmor.interpret.signals.pse import (
    BALANCED,
    INACTIVE,
    PROMOTION,
    SUPPRESSION,
    PromotionSuppression,
    grid_regions,
    region_effects,
)
from glassarmor.interpret.signals.sensitivity import (
    equal_norm_noise,
    relative_unit_sensitivity,
    sensitivity_control,
    signed_unit_sensitivity,
    silent_units,
    strength_curves,
    unit_sensitivity,
)
from tests.interpret.test_conductance import Counting
from tests.interpret.test_sensitivity import observation
from tests.reference import interpretation as reference
from tests.reference.nets import Linear, batch, conv_bn, seeded, unchanged, untidy
from tests.reference.trained import attacked

# Maps and the interpretability score.


def test_the_four_maps():
    net, x, x_adv, y, target = attacked()
    obs = observe(net, x, x_adv, y, target=target, layers=["act2"])
    table = cam_table(obs, "act2")
    for side in ("clean", "adv"):
        for label in ("true", "target"):
            assert torch.equal(getattr(table, f"{side}_{label}"), class_activation_map(obs, "act2", label, side))
    # The attack takes from one and gives to the other.
    assert table.adv_true.mean() < table.clean_true.mean()
    assert table.adv_target.mean() > table.clean_target.mean()


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.8, 0.95])
def test_score_equals_the_slow_formula(quantile):
    cam = torch.randn(6, 8, 8, generator=seeded(1))
    delta = torch.randn(6, 3, 8, 8, generator=seeded(2))
    found = interpretability_score(cam, delta, quantile)
    expected = [
        reference.interpretability_score(c, d, quantile)
        for c, d in zip(cam.double().numpy(), delta.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    share = class_region(cam, (8, 8), quantile).float().mean((1, 2))
    torch.testing.assert_close(share, torch.full((6,), 1 - int(quantile * 64) / 64))


def test_score_of_known_perturbations():
    cam = torch.zeros(4, 8, 8)
    cam[:, 2:4, 2:6] = 1 + torch.rand(4, 2, 4, generator=seeded(0))
    inside, outside = torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 8)
    inside[:, :, 2:4, 2:6] = 0.1
    outside[:, :, 6:] = 0.1
    everywhere = torch.full((4, 3, 8, 8), 0.1) * torch.randn(4, 1, 1, 1, generator=seeded(1)).sign()
    q = 1 - 8 / 64
    assert interpretability_score(cam, inside, q).tolist() == [1] * 4
    assert interpretability_score(cam, outside, q).tolist() == [0] * 4
    spread = interpretability(cam, everywhere, q)
    for value in (spread.score, spread.chance, spread.shuffled, spread.swapped):  # a δ spread evenly scores chance anyhow
        torch.testing.assert_close(value, torch.full((4,), (8 / 64) ** 0.5))
    assert interpretability_score(cam, torch.zeros_like(inside)).isnan().all()


def test_the_shuffled_map_gives_a_gathered_perturbation_its_own_chance_level():
    """δ on one pixel scores 1 with probability 1 − q and else 0: on average 1 − q, well below sqrt(1 − q)."""
    cam = torch.randn(50, 8, 8, generator=seeded(4))
    delta = torch.zeros(50, 1, 8, 8)
    delta[:, :, 3, 3] = 1.0
    found = interpretability(cam, delta, 0.75, draws=40)
    assert float(found.shuffled.mean()) == pytest.approx(0.25, abs=0.03)
    assert found.chance.tolist() == pytest.approx([0.5] * 50)
    again = interpretability(cam, delta, 0.75, draws=40)
    assert torch.equal(found.shuffled, again.shuffled)
    assert not torch.equal(found.shuffled, interpretability(cam, delta, 0.75, draws=40, seed=1).shuffled)


def test_the_swapped_map_is_the_neighbours():
    cam, delta = torch.randn(3, 4, 4, generator=seeded(0)), torch.randn(3, 3, 8, 8, generator=seeded(1))
    found = interpretability(cam, delta)
    torch.testing.assert_close(found.swapped, interpretability_score(cam[[2, 0, 1]], delta))
    assert interpretability(cam[:1], delta[:1]).swapped.isnan().all()


@pytest.mark.parametrize("quantile", [-0.1, 1.0])
def test_a_quantile_out_of_range(quantile):
    with pytest.raises(ValueError, match="quantile: expected 0 <= quantile < 1"):
        interpretability_score(torch.rand(1, 4, 4), torch.rand(1, 3, 8, 8), quantile)


# Regions.


def test_regions_without_perturbation_cost_nothing_and_have_no_effect():
    net = Counting(conv_bn()).eval()
    x, x_adv, y = batch(n=3)
    x_adv[0, :, :4] = x[0, :, :4]  # the upper half of one image
    x_adv[2] = x[2]
    effects = region_effects(net, x, x_adv, y, regions=(4, 4), chunk=10)
    assert net.batches == [6, 10, 10, 4]  # both ends; 8 + 16 + 0 regions
    assert (effects.margin[0, :8] == 0).all()
    assert (effects.margin[0, 8:] != 0).any()
    assert (effects.margin[2] == 0).all()


# Overlap of kinds with the maps.


def effects_of_kinds(kind: torch.Tensor) -> PromotionSuppression:
    """Effects whose kinds are the given ones."""
    promotion = torch.tensor([0.1, 1.0, 1.0, 0.0])[kind]
    suppression = torch.tensor([1.0, 0.1, 1.0, 0.0])[kind]
    effects = PromotionSuppression(promotion, suppression, promotion.sum(1), suppression.sum(1))
    assert torch.equal(effects.kind, kind)
    return effects


def test_kinds_that_lie_on_the_maps():
    """Suppression exactly where the true label is seen, promotion exactly where the target is, both far from chance."""
    generator = seeded(5)
    cam_true, cam_target = torch.rand(2, 10, 4, 4, generator=generator)
    flat_true, flat_target = cam_true.flatten(1), cam_target.flatten(1)
    kind = torch.full((10, 16), BALANCED)
    kind.scatter_(1, flat_target.topk(3).indices, PROMOTION)
    kind.scatter_(1, flat_true.topk(3).indices, SUPPRESSION)
    found = region_overlap(effects_of_kinds(kind), cam_true, cam_target, (4, 4), (4, 4), quantile=13 / 16)
    assert found.count.tolist() == torch.bincount(kind.flatten(), minlength=4).tolist()
    assert float(found.iou[SUPPRESSION, 0]) == 1
    assert float(found.percentile[SUPPRESSION, 0]) == pytest.approx((13.5 + 14.5 + 15.5) / 3 / 16)
    assert found.percentile_p[SUPPRESSION, 0] < 0.01
    assert found.percentile_p[PROMOTION, 1] < 0.01
    assert found.iou_p[SUPPRESSION, 0] < 0.01
    assert float(found.percentile_shuffled[SUPPRESSION, 0]) == pytest.approx(0.5, abs=0.02)
    assert float(found.iou_shuffled[SUPPRESSION, 0]) < 0.3
    assert found.percentile[INACTIVE].isnan().all()
    assert found.iou_p[INACTIVE].isnan().all()


def test_overlap_equals_the_slow_formulas():
    generator = seeded(6)
    kind = torch.randint(4, (5, 8), generator=generator)
    cams = torch.randn(2, 5, 8, 8, generator=generator)
    regions = grid_regions(8, 8, (4, 2))
    found = region_overlap(effects_of_kinds(kind), *cams, (8, 8), (4, 2), quantile=0.7)
    for c, cam in enumerate(cams):
        by_region = torch.stack([cam[:, regions == g].mean(1) for g in range(8)], 1).double().numpy()
        evidence = class_region(cam, (8, 8), 0.7).numpy()
        for k in range(4):
            assert float(found.percentile[k, c]) == pytest.approx(
                reference.mean_percentile(by_region, kind.numpy(), k), rel=1e-5
            )
            assert float(found.iou[k, c]) == pytest.approx(
                reference.iou((kind == k)[:, regions].numpy(), evidence), rel=1e-5
            )


def test_kinds_that_lie_anywhere_are_not_found_significant():
    generator = seeded(7)
    p_values = []
    for _ in range(20):
        kind = torch.randint(4, (6, 16), generator=generator)
        cams = torch.randn(2, 6, 4, 4, generator=generator)
        p_values.append(region_overlap(effects_of_kinds(kind), *cams, (8, 8), (4, 4), draws=50).percentile_p)
    share = float((torch.stack(p_values) < 0.1).float().mean())
    assert 0.03 < share < 0.2


def test_overlap_of_other_regions():
    with pytest.raises(ValueError, match=r"effects: expected shape \(N, 16\), found \(2, 8\)"):
        region_overlap(effects_of_kinds(torch.zeros(2, 8).long()), *torch.rand(2, 2, 4, 4), (8, 8), (4, 4))


# Units: signed parts, silent units, noise control, curves.


def test_signed_parts():
    a = torch.randn(4, 3, 2, 2, generator=seeded(0))
    change = torch.randn(4, 3, 2, 2, generator=seeded(1))
    obs = observation(a, a + change)
    rise, fall = signed_unit_sensitivity(obs, "layer")
    spread = a.double().numpy().std((0, 2, 3))
    np.testing.assert_allclose(rise, np.maximum(change.numpy(), 0).mean((0, 2, 3)) / spread, rtol=1e-4)
    np.testing.assert_allclose(fall, np.maximum(-change.numpy(), 0).mean((0, 2, 3)) / spread, rtol=1e-4)
    torch.testing.assert_close(rise + fall, relative_unit_sensitivity(obs, "layer"))


def test_a_unit_nearly_silent_on_clean_images_counts_as_nothing():
    a = torch.randn(6, 4, 2, 2, generator=seeded(0)) * torch.tensor([1.0, 1.0, 1.0, 1e-3]).view(1, 4, 1, 1)
    obs = observation(a, a + 0.9)
    relative = relative_unit_sensitivity(obs, "layer")
    assert relative[3] > 500
    floored = relative_unit_sensitivity(obs, "layer", silent=0.01)
    assert floored[3] == 0
    assert torch.equal(floored[:3], relative[:3])
    assert [float(part[3]) for part in signed_unit_sensitivity(obs, "layer", silent=0.01)] == [0, 0]
    assert silent_units(torch.tensor([1.0, 1.0, 0.009, 0.01])).tolist() == [False, False, False, False]  # mean ½
    assert silent_units(torch.tensor([1.0, 1.0, 0.004, 0.006])).tolist() == [False, False, True, False]


@pytest.mark.parametrize("images", ["grey", "black and white"])
def test_noise_has_the_attacks_own_norm_after_clipping(images):
    x, x_adv, _ = batch(n=6, eps=0.2)
    if images == "black and white":  # half of the noise is clipped away
        x = x.round()
        x_adv = (x + 0.2 * torch.randn(x.shape, generator=seeded(3))).clamp(0, 1)
    x_adv[0] = x[0]  # one image unattacked
    noisy = equal_norm_noise(x, x_adv, seeded(0))
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    norms = [(side - x).flatten(1).norm(dim=1) for side in (noisy, x_adv)]
    torch.testing.assert_close(*norms, rtol=1e-5, atol=1e-6)
    assert torch.equal(noisy, equal_norm_noise(x, x_adv, seeded(0)))
    assert torch.equal(noisy[0], x[0])
    assert not torch.equal(noisy, equal_norm_noise(x, x_adv, seeded(1)))


def test_an_attack_beyond_the_reach_of_noise_gets_the_longest():
    x = torch.full((1, 1, 4, 4), 0.2)
    noisy = equal_norm_noise(x, torch.ones_like(x), seeded(0))
    assert noisy.isfinite().all()
    assert ((noisy < 1e-6) | (noisy > 1 - 1e-6)).all()


def test_attack_sensitive_units_against_noise():
    """A linear layer: the attack follows unit 0's weights, which noise hardly meets, and leaves unit 1 alone."""
    net = Linear((3, 8, 8), 2)
    with torch.no_grad():
        w = net.head.weight
        w[1] -= w[0] * (w[0] @ w[1]) / (w[0] @ w[0])
    x = torch.rand(32, 3, 8, 8, generator=seeded(0)) * 0.4 + 0.3
    x_adv = x + 0.01 * w[0].detach().view(3, 8, 8)
    found = sensitivity_control(net, x, x_adv, torch.zeros(32).long(), ["head"], draws=5)["head"]
    assert found.attack_sensitive.tolist() == [True, False]
    assert found.rise[0] == found.attack[0] > 3 * found.noise[0] > 0
    assert found.fall[0] == 0
    assert not found.silent.any()


def test_control_of_a_net_is_seeded_and_leaves_it_alone():
    net = untidy(conv_bn(dropout=0.3))
    x, x_adv, y = batch(n=5)
    state = torch.get_rng_state()
    with unchanged(net):
        first, second = (sensitivity_control(net, x, x_adv, y, ["act1", "act2"], draws=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert list(first) == ["act1", "act2"]
    net.eval()
    obs = observe(net, x, x_adv, y, layers=["act1", "act2"])
    generator = seeded(0)
    noises = [observe(net, x, equal_norm_noise(x, x_adv, generator), y, layers=["act1", "act2"]) for _ in range(2)]
    for layer, found in first.items():
        assert torch.equal(found.noise, second[layer].noise)
        loud = ~found.silent
        torch.testing.assert_close(found.attack[loud], relative_unit_sensitivity(obs, layer)[loud].detach())
        control = torch.stack([relative_unit_sensitivity(noise, layer) for noise in noises]).mean(0)
        torch.testing.assert_close(found.noise[loud], control[loud].detach())
        assert (found.attack[found.silent] == 0).all()


@pytest.mark.parametrize("chunk", [1, 6, 128])
def test_strength_curves(chunk):
    net = untidy(conv_bn())
    x, x_adv, y = batch(n=3)
    with unchanged(net):
        curves = strength_curves(net, x, x_adv, ["conv1", "act2", "flatten"], points=5, chunk=chunk)
    obs = observe(net.eval(), x, x_adv, y, layers=["conv1", "act2", "flatten"])
    assert curves.strength.tolist() == [0, 0.25, 0.5, 0.75, 1]
    for layer, act in curves.units.items():
        for end, side in ((0, "clean"), (-1, "adv")):
            expected = obs.side(side).acts[layer].detach()
            expected = expected.mean((2, 3)) if expected.dim() > 2 else expected
            torch.testing.assert_close(act[end], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(curves.logits[-1], obs.adv.logits.detach(), rtol=1e-4, atol=1e-5)
    conv1 = curves.units["conv1"]  # linear in the image: a straight line
    torch.testing.assert_close(conv1[2], (conv1[0] + conv1[-1]) / 2, rtol=1e-4, atol=1e-5)


def test_curves_show_what_the_sensitivity_measures_where_no_position_moves_against_another():
    net = Linear((3, 8, 8), 4)
    x, x_adv, y = batch(n=5, classes=4)
    curves = strength_curves(net, x, x_adv, ["head"], points=2)
    obs = observe(net, x, x_adv, y, layers=["head"])
    moved = (curves.units["head"][1] - curves.units["head"][0]).abs().mean(0)
    torch.testing.assert_close(moved, unit_sensitivity(obs, "head").detach(), rtol=1e-4, atol=1e-5)


def test_too_few_points():
    with pytest.raises(ValueError, match="points: expected at least 2, found 1"):
        strength_curves(nn.Identity(), torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4), [], points=1)
