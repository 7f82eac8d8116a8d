"""Conductance of all layers in one pass: the slow formula, closed forms, Captum, completeness, and what it costs."""

from __future__ import annotations

import copy

import pytest
import torch
from captum import attr
from torch import nn

from glassarmor.interpret.observation import observe
from glassarmor.interpret.signals.conductance import conductance, path_contributions
from glassarmor.interpret.signals.pse import position_effects, unit_effects
from tests.reference import interpretation as reference
from tests.reference.nets import Linear, Residual, batch, conv_bn, unchanged, untidy
from tests.reference.trained import attacked

LAYERS = {conv_bn: ["conv1", "act1", "conv2", "act2"], Residual: ["stem", "block1", "block2", "norm"]}
MAKES = [conv_bn, Residual]


class Counting(nn.Module):
    """Counts forwards and the samples in them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.batches: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(x))
        return self.net(x)


def point(net: nn.Module, layer: str, x: torch.Tensor, x_adv: torch.Tensor, label: int):
    """A and ∂Z_c/∂A of one sample in float64, by a plain hook."""

    def at(alpha: float):
        kept = []
        handle = net.get_submodule(layer).register_forward_hook(lambda _m, _i, out: kept.append(out))
        z = net((x + alpha * (x_adv - x))[None])
        handle.remove()
        (gradient,) = torch.autograd.grad(z[0, label], kept[0])
        return kept[0].detach().numpy()[0], gradient.numpy()[0]

    return at


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_equals_the_slow_formula_for_both_labels_and_leaves_the_net_alone(make, chunk):
    net, x, x_adv, y, target = attacked(make, n=2)
    double = copy.deepcopy(net).double()
    untidy(net)
    with unchanged(net):
        found = conductance(net, x, x_adv, y, target, layers=LAYERS[make], steps=4, chunk=chunk)
    for layer in LAYERS[make]:
        units, positions = found.units[layer], found.positions[layer]
        for i in range(2):
            for label, effects in ((target[i], lambda e: e.promotion), (y[i], lambda e: -e.suppression)):
                slow = reference.conductance(point(double, layer, x[i].double(), x_adv[i].double(), int(label)), 4)
                torch.testing.assert_close(effects(units)[i], torch.tensor(slow.sum((1, 2))).float(), rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(effects(positions)[i], torch.tensor(slow.sum(0)).float(), rtol=1e-3, atol=1e-4)
    assert list(found.units) == LAYERS[make]
    assert not found.units[layer].promotion.requires_grad


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("eps", [0.03, 0.1])
def test_complete_to_one_percent_at_ten_steps(make, eps):
    """The gap falls with the steps, and is rounding where the logit is linear in the layer."""
    net, x, x_adv, y, target = attacked(make, n=16, eps=eps)
    gaps = {
        steps: conductance(net, x, x_adv, y, target, layers=LAYERS[make], steps=steps).relative_gaps for steps in (1, 10, 40)
    }
    assert max(gaps[10].values()) < 0.01
    first, last = LAYERS[make][0], LAYERS[make][-1]
    assert gaps[40][first] < gaps[10][first] < gaps[1][first]
    assert gaps[1][last] < 1e-5


def test_one_step_is_the_trapezoid_of_the_observation():
    net, x, x_adv, y, target = attacked()
    obs = observe(net, x, x_adv, y, target=target, layers=["act1", "act2"])
    found = conductance(net, x, x_adv, y, layers=["act1", "act2"], steps=1)
    assert torch.equal(found.target, target)  # the default is the strongest wrong class at x'
    for layer in ("act1", "act2"):
        for ours, observed in (
            (found.units[layer], unit_effects(obs, layer)),
            (found.positions[layer], position_effects(obs, layer)),
        ):
            torch.testing.assert_close(ours.promotion, observed.promotion.detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours.suppression, observed.suppression.detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours.total_promotion, observed.total_promotion.detach(), rtol=1e-4, atol=1e-5)


def test_linear_net_closed_form():
    """The layer itself is the output: its unit c moves logit c by all of ΔZ_c and no other."""
    net = Linear((3, 8, 8), 5)
    x, x_adv, y = batch()
    target = (y + 1) % 5
    found = conductance(net, x, x_adv, y, target, layers=["head"], steps=3).units["head"]
    change = (net(x_adv) - net(x)).detach()
    torch.testing.assert_close(found.promotion, change * nn.functional.one_hot(target, 5))
    torch.testing.assert_close(found.suppression, -change * nn.functional.one_hot(y, 5))


@pytest.mark.parametrize("make", MAKES)
def test_captum_with_fine_steps_comes_to_the_same_units(make):
    net, x, x_adv, y, target = attacked(make, n=4)
    ours = conductance(net, x, x_adv, y, target, layers=LAYERS[make], steps=60)
    for layer in LAYERS[make][:2]:
        captum = attr.LayerConductance(net, net.get_submodule(layer))
        fine = captum.attribute(x_adv, baselines=x, target=target, n_steps=200, method="riemann_trapezoid")
        promotion = fine.detach().sum((2, 3))
        assert (ours.units[layer].promotion - promotion).abs().max() < 0.02 * promotion.abs().max()


def test_deep_lift_agrees_where_the_logit_is_linear_and_in_sum_elsewhere():
    net, x, x_adv, y, target = attacked(conv_bn, n=4)
    ours = conductance(net, x, x_adv, y, target, layers=["act1", "act2"], steps=40)
    for layer in ("act1", "act2"):
        lift = attr.LayerDeepLift(net, net.get_submodule(layer)).attribute(x_adv, baselines=x, target=target).detach()
        torch.testing.assert_close(lift.sum((1, 2, 3)), ours.units[layer].promotion.sum(1), rtol=5e-3, atol=5e-3)
        if layer == "act2":
            torch.testing.assert_close(lift.sum((2, 3)), ours.units[layer].promotion, rtol=1e-3, atol=1e-4)


def test_all_layers_and_both_labels_cost_one_pass_over_the_path():
    net = Counting(conv_bn())
    x, x_adv, y = batch(n=4)
    conductance(net, x, x_adv, y, (y + 1) % 5, layers=["net.act1", "net.act2", "net.head"], steps=10, chunk=16)
    assert net.batches == [3, 16, 16, 12]  # three learn which axis is what; 11 points of 4 samples


def test_any_number_of_labels():
    net, x, x_adv, y, target = attacked()
    labels = torch.stack([y, target, (y + 1) % 5], 1)
    parts, change = path_contributions(net, x, x_adv, labels, ["act1"], 10, 64)
    assert parts["act1"].shape == (3, 8, 6, 8, 8)
    torch.testing.assert_close(change, (net(x_adv) - net(x)).detach().gather(1, labels))
    assert (parts["act1"].sum((2, 3, 4)).T - change).abs().mean() < 0.01 * change.abs().mean()


def test_runs_inside_inference_mode():
    net, x, x_adv, y, target = attacked()
    expected = conductance(net, x, x_adv, y, target, layers=["act1"])
    with torch.inference_mode():
        args = [t.clone() for t in (x, x_adv, y)]
        found = conductance(net, *args, layers=["act1"])
    torch.testing.assert_close(found.units["act1"].promotion, expected.units["act1"].promotion)


def test_flat_layers_have_units_and_no_positions():
    net, x, x_adv, y, target = attacked()
    found = conductance(net, x, x_adv, y, target, layers=["act2", "flatten"], steps=2)
    assert set(found.positions) == {"act2"}
    torch.testing.assert_close(found.units["flatten"].promotion, found.units["act2"].promotion, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "layers: expected at least one layer name"),
        ({"layers": ["act3"]}, "the network has no layer 'act3'; close names: act"),
        ({"steps": 0}, "steps: expected at least 1, found 0"),
    ],
)
def test_bad_arguments(change, message):
    net = conv_bn()
    with unchanged(net), pytest.raises(ValueError, match=message):
        conductance(net, *batch(), **{"layers": ["act1"], **change})
