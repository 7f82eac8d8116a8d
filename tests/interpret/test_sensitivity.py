"""Unit sensitivity and its running estimate: the formulas, sums over batches and processes, true gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glassarmor.interpret.observation import Forward, Observation, observe
from glassarmor.interpret.signals.running import RunningSensitivity
from glassarmor.interpret.signals.sensitivity import relative_unit_sensitivity, unit_change, unit_sensitivity, unit_spread
from tests.reference import differences
from tests.reference import signals as reference
from tests.reference.nets import batch, conv_bn, seeded


def observation(a: torch.Tensor, a_adv: torch.Tensor, layer: str = "layer") -> Observation:
    """An observation of given activations: no net in between."""
    n = len(a)
    z, y = torch.zeros(n, 2), torch.zeros(n, dtype=torch.long)
    return Observation(y, y + 1, Forward(a_adv, z, {layer: a_adv}), Forward(a, z, {layer: a}))


def pair(n: int, units: int = 3, seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.randn(n, units, 2, 4, generator=seeded(seed)) * torch.tensor([0.1, 1.0, 30.0]).view(1, 3, 1, 1)
    return a * scale, a * scale + torch.randn(a.shape, generator=seeded(seed + 1)) * scale


def arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [t.double().numpy() for t in tensors]


def test_equal_the_slow_formulas():
    a, a_adv = pair(5)
    obs = observation(a, a_adv)
    found = unit_sensitivity(obs, "layer"), relative_unit_sensitivity(obs, "layer")
    np.testing.assert_allclose(found[0], reference.sensitivity(*arrays(a, a_adv)), rtol=1e-5)
    np.testing.assert_allclose(found[1], reference.relative_sensitivity(*arrays(a, a_adv)), rtol=1e-4)
    assert unit_change(obs, "layer").shape == (5, 3)
    torch.testing.assert_close(unit_change(obs, "layer").mean(0), found[0])


def test_opposite_changes_do_not_cancel():
    a = torch.zeros(2, 1, 1, 2)
    change = torch.tensor([[[[1.0, -1.0]]], [[[-3.0, 3.0]]]])
    obs = observation(a, a + change)
    assert unit_change(obs, "layer").flatten().tolist() == [1, 3]
    assert unit_sensitivity(obs, "layer").tolist() == [2]


def test_flat_layers():
    a, a_adv = torch.randn(6, 4), torch.randn(6, 4)
    obs = observation(a, a_adv)
    torch.testing.assert_close(unit_sensitivity(obs, "layer"), (a_adv - a).abs().mean(0))
    torch.testing.assert_close(unit_spread(obs, "layer"), a.std(0, correction=0))


def test_relative_form_does_not_feel_the_scale_of_a_unit():
    a, a_adv = pair(5)
    scale = torch.tensor([2.0, 0.5, 100.0]).view(1, 3, 1, 1)
    plain, scaled = observation(a, a_adv), observation(a * scale, a_adv * scale)
    torch.testing.assert_close(relative_unit_sensitivity(plain, "layer"), relative_unit_sensitivity(scaled, "layer"),
                               rtol=1e-4, atol=0)  # fmt: skip
    torch.testing.assert_close(unit_sensitivity(scaled, "layer"), unit_sensitivity(plain, "layer") * scale.flatten())


def test_a_dead_unit_is_insensitive_and_has_a_finite_gradient():
    a = torch.zeros(3, 2, 2, 2, requires_grad=True)
    relative = relative_unit_sensitivity(observation(a, a * 1.0), "layer")
    assert torch.equal(relative, torch.zeros(2))
    (gradient,) = torch.autograd.grad(relative.sum(), a)
    assert gradient.isfinite().all()


# Running estimate.


def updated(*pairs: tuple[torch.Tensor, torch.Tensor]) -> RunningSensitivity:
    metric = RunningSensitivity(3)
    for a, a_adv in pairs:
        metric.update(observation(a, a_adv), "layer")
    return metric


def test_unequal_batches_count_by_their_samples():
    batches = [pair(1, seed=1), pair(6, seed=2, scale=3.0), pair(3, seed=4)]
    everything = [torch.cat(side) for side in zip(*batches, strict=True)]
    expected = reference.relative_sensitivity(*arrays(*everything))
    np.testing.assert_allclose(updated(*batches).compute(), expected, rtol=1e-5)
    np.testing.assert_allclose(updated(tuple(everything)).compute(), expected, rtol=1e-5)
    means = np.mean([reference.relative_sensitivity(*arrays(*b)) for b in batches], axis=0)
    assert np.abs(means - expected).max() > 0.01  # a mean over batches would be another number


def test_states_of_several_processes_add_up():
    """What torchmetrics does under DDP: gather each state and reduce it; processes saw different numbers of samples."""
    batches = [pair(1, seed=1), pair(6, seed=2, scale=3.0), pair(3, seed=4)]
    parts = [updated(batches[0]), updated(*batches[1:])]
    merged = RunningSensitivity(3)
    for state, reduce in merged._reductions.items():
        setattr(merged, state, reduce(torch.stack([getattr(part, state) for part in parts])))
    merged._update_count = 1
    torch.testing.assert_close(merged.compute(), updated(*batches).compute())


def test_state_survives_a_checkpoint():
    metric = updated(pair(4, seed=1))
    fresh = RunningSensitivity(3)
    fresh.load_state_dict(metric.state_dict())
    assert set(metric.state_dict()) == {"change", "total", "squares", "samples", "positions"}
    assert fresh.samples == 4
    fresh.update(observation(*pair(6, seed=2)), "layer")
    torch.testing.assert_close(fresh.compute(), updated(pair(4, seed=1), pair(6, seed=2)).compute(), rtol=0, atol=0)


def test_spread_survives_a_large_mean():
    """Sums of squares cancel in fp32; the states are float64."""
    a, a_adv = pair(8, seed=3)
    expected = reference.relative_sensitivity(*arrays(a + 300, a_adv + 300))
    np.testing.assert_allclose(updated((a + 300, a_adv + 300)).compute()[1:], expected[1:], rtol=1e-3)


def test_update_keeps_no_graph():
    net = conv_bn().train()
    x, x_adv, y = batch()
    metric = RunningSensitivity(8)
    metric.update(observe(net, x, x_adv, y, layers=["act2"]), "act2")
    assert not any(getattr(metric, state).requires_grad for state in metric._reductions)


SIGNALS = {
    "change": unit_change,
    "spread": unit_spread,
    "sensitivity": unit_sensitivity,
    "relative": relative_unit_sensitivity,
}


@pytest.mark.parametrize(("mode", "signal"), differences.every(*SIGNALS))
@pytest.mark.parametrize("layer", ["act1", "act2"])
def test_gradients_are_true(mode, signal, layer, double_precision):
    net, observed = differences.setting(mode, create_graph=False)
    differences.check(net, lambda: differences.weighted(SIGNALS[signal](observed(), layer)))
