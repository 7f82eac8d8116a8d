"""Promotion and suppression: closed forms, completeness (invariant 7), kinds, and true gradients (invariant 6)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glassarmor.interpret.observation import observe
from glassarmor.interpret.signals.pse import (
    BALANCED,
    FLOOR,
    INACTIVE,
    KIND_NAMES,
    PROMOTION,
    SUPPRESSION,
    PromotionSuppression,
    contribution,
    grid_regions,
    margin_evidence,
    position_effects,
    region_effects,
    unit_effects,
)
from glassarmor.interpret.signals.running import KindShares
from tests.reference import differences
from tests.reference import signals as reference
from tests.reference.nets import Linear, Residual, batch, conv_bn, unchanged, untidy


def close(found: torch.Tensor, expected, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(found.detach().numpy(), np.asarray(expected), rtol=1e-4, atol=atol)


# Regions.


def test_linear_net_closed_form():
    """s_i = −(W_t0)_G·δ_G and p_i = (W_t)_G·δ_G, and no interaction between regions."""
    net = Linear((3, 6, 6), 4)
    x, x_adv, y = batch(size=6, classes=4)
    effects = region_effects(net, x, x_adv, y, regions=(3, 2))
    t = net(x_adv).scatter(1, y[:, None], -torch.inf).argmax(1)
    w = net.head.weight.detach().view(4, 3, 6, 6)
    for i in range(4):
        parts = (x_adv - x)[i] * torch.stack([w[y[i]], w[t[i]]])  # (2, 3, 6, 6)
        cells = torch.stack([parts[:, :, r : r + 2, c : c + 3].sum((1, 2, 3)) for r in (0, 2, 4) for c in (0, 3)], 1)
        true, target = cells
        torch.testing.assert_close(effects.suppression[i], -true, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(effects.promotion[i], target, rtol=1e-4, atol=1e-5)
    close(effects.gap, np.zeros(4), atol=1e-4)


def _in_double(net):
    double = type(net)() if isinstance(net, Residual) else conv_bn()
    double.load_state_dict(net.state_dict())
    double.double().eval()
    return lambda images: double(torch.from_numpy(images).double()).detach().numpy()


@pytest.mark.parametrize("make", [conv_bn, Residual])
@pytest.mark.parametrize("chunk", [1, 10, 128])
def test_regions_equal_the_slow_reference_and_leave_the_net_alone(make, chunk):
    net = untidy(make())
    x, x_adv, y = batch(n=3)
    target = (y + 2) % 5
    with unchanged(net):
        effects = region_effects(net, x, x_adv, y, target, regions=(3, 2), chunk=chunk)
    z = _in_double(net)
    args = (x.numpy().astype(float), x_adv.numpy().astype(float), y.numpy(), target.numpy())
    p, s = reference.region_effects(z, *args, grid_regions(8, 8, (3, 2)).numpy())
    close(effects.promotion, p)
    close(effects.suppression, s)
    rows = range(3)
    clean, adv = z(args[0]), z(args[1])
    close(effects.total_promotion, adv[rows, target] - clean[rows, target])
    close(effects.total_suppression, clean[rows, y] - adv[rows, y])
    total = (p + s).sum(1) - ((adv - clean)[rows, target] - (adv - clean)[rows, y])
    close(effects.gap, total, atol=1e-4)
    assert effects.promotion.shape == (3, 6)
    assert not effects.promotion.requires_grad


def test_default_target_is_the_strongest_wrong_class_at_the_adversarial_image():
    net = conv_bn().eval()
    x, x_adv, y = batch()
    target = net(x_adv).scatter(1, y[:, None], -torch.inf).argmax(1)
    found, expected = region_effects(net, x, x_adv, y), region_effects(net, x, x_adv, y, target)
    assert torch.equal(found.promotion, expected.promotion)
    assert found.promotion.shape == (4, 64)


def test_any_regions_and_pixels_of_no_region():
    """A negative index belongs to no region: the perturbation stays there."""
    net = conv_bn().eval()
    x, x_adv, y = batch(n=2)
    target = (y + 1) % 5
    mask = torch.full((8, 8), -1)
    mask[1:3, 2:5] = 0
    mask[6, 6] = 1
    mask[0, 0] = 1
    effects = region_effects(net, x, x_adv, y, target, regions=mask)
    args = (x.numpy().astype(float), x_adv.numpy().astype(float), y.numpy(), target.numpy())
    p, s = reference.region_effects(_in_double(net), *args, mask.numpy())
    close(effects.promotion, p)
    close(effects.suppression, s)
    x_adv = torch.where(mask >= 0, x_adv, x)
    whole = region_effects(net, x, x_adv, y, target, regions=(mask >= 0).long() - 1)
    close(whole.gap, np.zeros(2), atol=1e-5)  # one region that holds all of δ: nothing to interact with


def test_a_region_without_perturbation_has_no_effect_and_is_inactive():
    net = conv_bn().eval()
    x, x_adv, y = batch()
    x_adv[:, :, :4] = x[:, :, :4]
    effects = region_effects(net, x, x_adv, y, regions=(2, 1))
    assert (effects.kind[:, 0] == INACTIVE).all()
    assert (effects.kind[:, 1] != INACTIVE).any()
    assert effects.margin[:, 0].abs().max() < 1e-5


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_grid_cells_are_equal_as_can_be(height, width, rows, columns):
    if rows > height or columns > width:
        message = rf"grid: expected 1..{height} rows and 1..{width} columns, found {rows}x{columns}"
        with pytest.raises(ValueError, match=message):
            grid_regions(height, width, (rows, columns))
        return
    regions = grid_regions(height, width, (rows, columns))
    sizes = torch.bincount(regions.flatten(), minlength=rows * columns)
    heights = [len({int(i) for i in torch.where(regions == r * columns)[0]}) for r in range(rows)]
    widths = [len({int(i) for i in torch.where(regions == c)[1]}) for c in range(columns)]
    assert sum(heights) == height
    assert sum(widths) == width
    assert max(heights) - min(heights) <= 1
    assert max(widths) - min(widths) <= 1
    assert sizes.tolist() == [h * w for h in heights for w in widths]


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ((0, 4), "grid: expected 1..8 rows and 1..8 columns, found 0x4"),
        ((9, 4), "found 9x4"),
        (torch.zeros(4, 4, dtype=torch.long), r"regions: expected indices of shape \(8, 8\), found \(4, 4\)"),
        (torch.full((8, 8), -1), "regions: no pixel belongs to a region"),
    ],
)
def test_regions_that_do_not_fit(regions, message):
    net = conv_bn()
    x, x_adv, y = batch()
    with unchanged(net), pytest.raises(ValueError, match=message):
        region_effects(net, x, x_adv, y, regions=regions)


# Ratio and kinds.


def effects_of(promotion, suppression) -> PromotionSuppression:
    p, s = torch.tensor(promotion), torch.tensor(suppression)
    return PromotionSuppression(p, s, p.flatten(1).sum(1), s.flatten(1).sum(1))


def test_kinds_and_their_boundaries():
    cases = [
        (1.0, 1.0, BALANCED),
        (2.0, 1.0, BALANCED),  # ratio 1 exactly
        (1.0, 2.0, BALANCED),  # ratio −1 exactly
        (2.01, 1.0, PROMOTION),
        (1.0, 2.01, SUPPRESSION),
        (1.0, -5.0, PROMOTION),  # a negative effect counts as none
        (-5.0, 1.0, SUPPRESSION),
        (0.0, 0.0, INACTIVE),
        (-3.0, -2.0, INACTIVE),  # both work against the attack: never "balanced"
        (0.0009, 0.0009, INACTIVE),
        (0.0015, 0.0, BALANCED),  # above the floor, but not twice the floor
        (0.0021, 0.0, PROMOTION),
        (0.0, 0.0021, SUPPRESSION),
    ]
    effects = effects_of([[c[0] for c in cases]], [[c[1] for c in cases]])
    assert effects.kind[0].tolist() == [c[2] for c in cases]
    assert effects.kind.dtype == torch.int64
    assert KIND_NAMES == ("suppression", "promotion", "balanced", "inactive")
    assert float(effects.ratio[0, 5]) == pytest.approx(np.log2(1 / FLOOR))


@given(st.floats(-2, 2, width=32), st.floats(-2, 2, width=32))
def test_kind_equals_the_reference(p, s):
    ratio = np.log2(max(p, 1e-3) / max(s, 1e-3))
    if min(abs(abs(ratio) - 1), abs(p - 1e-3), abs(s - 1e-3)) > 1e-6:  # fp32 may decide a boundary either way
        assert KIND_NAMES[int(effects_of([[p]], [[s]]).kind)] == reference.kind(p, s)


def test_margin_and_gap():
    effects = dataclasses.replace(
        effects_of([[1.0, 2.0]], [[0.5, -0.25]]), total_promotion=torch.tensor([2.5]), total_suppression=torch.tensor([0.5])
    )
    assert effects.margin.tolist() == [[1.5, 1.75]]
    assert effects.gap.tolist() == [0.25]


def test_kind_shares_are_counts_and_add_up_over_processes():
    a, b = effects_of([[1.0, 0.0, 4.0]], [[1.0, 0.0, 1.0]]), effects_of([[0.0] * 5], [[3.0] * 5])
    first, second, both = KindShares(), KindShares(), KindShares()
    first.update(a)
    second.update(b)
    both.update(a)
    both.update(b)
    assert both.compute().tolist() == [5 / 8, 1 / 8, 1 / 8, 1 / 8]
    merged = KindShares()
    for state, reduce in merged._reductions.items():
        setattr(merged, state, reduce(torch.stack([getattr(first, state), getattr(second, state)])))
    merged._update_count = 1
    assert torch.equal(merged.compute(), both.compute())
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert KindShares().compute().tolist() == [0, 0, 0, 0]  # nothing seen: no NaN


# Units and positions.


@pytest.mark.parametrize("mode", ["eval", "joined", "shared"])
def test_units_and_positions_below_a_pooled_linear_head(mode):
    """Equal to the formula w·ΔA/(HW), and complete: they sum to the logit change (invariant 7)."""
    net = conv_bn().train(mode != "eval")
    x, x_adv, y = batch()
    obs = observe(net, x, x_adv, y, layers=["act2"], joined=mode == "joined")
    a, a_adv = (obs.side(s).acts["act2"].detach().double().numpy() for s in ("clean", "adv"))
    w, t = net.head.weight.detach().double().numpy(), obs.target
    units, positions = unit_effects(obs, "act2"), position_effects(obs, "act2")
    for i in range(4):
        k_target = reference.contribution(a[i], a_adv[i], w, t[i])
        k_true = reference.contribution(a[i], a_adv[i], w, y[i])
        close(contribution(obs, "act2", "target")[i], k_target)
        close(units.promotion[i], k_target.sum((1, 2)))
        close(units.suppression[i], -k_true.sum((1, 2)))
        close(positions.promotion[i], k_target.sum(0))
        close(positions.suppression[i], -k_true.sum(0))
        close(positions.promotion[i] * 16, reference.cam(a_adv[i], w, t[i]) - reference.cam(a[i], w, t[i]))
        evidence = reference.contribution(0 * a[i], a[i], w, t[i]) - reference.contribution(0 * a[i], a[i], w, y[i])
        close(margin_evidence(obs, "act2")[i], evidence)
    rows = range(4)
    gain = (obs.adv.logits - obs.clean.logits)[rows, t]
    loss = (obs.clean.logits - obs.adv.logits)[rows, y]
    assert gain.abs().max() > 1e-2
    for effects in (units, positions):
        torch.testing.assert_close(effects.promotion.flatten(1).sum(1), gain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(effects.suppression.flatten(1).sum(1), loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(effects.total_promotion, gain)
        torch.testing.assert_close(effects.total_suppression, loss)
        assert effects.gap.abs().max() < 1e-4


def test_elsewhere_the_gap_is_logged_and_is_second_order():
    """At a layer below a nonlinearity the trapezoid is not exact; halving δ divides the gap by about eight."""
    net, _ = differences.setting("eval")
    x, x_adv, y = batch(size=6, channels=2, classes=3, eps=0.3)
    x, x_adv = x.double(), x_adv.double()
    gaps = []
    for scale in (1.0, 0.5):
        obs = observe(net, x, x + scale * (x_adv - x), y, target=(y + 1) % 3, layers=["act1"])
        effects = unit_effects(obs, "act1")
        gaps.append(float(effects.gap.abs().mean().detach()))
        assert float(effects.total_promotion.detach().abs().mean()) > 10 * gaps[-1]
    assert gaps[0] > 1e-6
    assert gaps[0] > 3 * gaps[1]


def test_a_flat_layer_has_units_but_no_positions():
    net = conv_bn().eval()
    x, x_adv, y = batch()
    obs = observe(net, x, x_adv, y, layers=["flatten", "act2"])
    torch.testing.assert_close(unit_effects(obs, "flatten").promotion, unit_effects(obs, "act2").promotion)
    with pytest.raises(ValueError, match="layers: 'flatten' has no positions"):
        position_effects(obs, "flatten")


SIGNALS = {
    "contribution": lambda obs, layer: contribution(obs, layer, "target"),
    "promotion of units": lambda obs, layer: unit_effects(obs, layer).promotion,
    "suppression of positions": lambda obs, layer: position_effects(obs, layer).suppression,
    "margin evidence": margin_evidence,
}


@pytest.mark.parametrize(("mode", "signal"), differences.every(*SIGNALS))
@pytest.mark.parametrize("layer", ["act1", "act2"])
def test_gradients_are_true(mode, signal, layer, double_precision):
    net, observed = differences.setting(mode)
    differences.check(net, lambda: differences.weighted(SIGNALS[signal](observed(), layer)))
