"""Geometry of the threat models: projections, steepest ascent, noise, and the budget in the image's own units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from glassarmor.defenses.threat import L2, Linf, norms, parse_eps
from tests.reference.nets import seeded

SHAPE = (3, 2, 3, 3)
BUDGETS = st.sampled_from([0.0, 1e-4, 8 / 255, 0.3, 1.0])
THREATS = st.builds(lambda kind, eps: kind(eps), st.sampled_from([Linf, L2]), BUDGETS)
IMAGES = arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32)).map(torch.from_numpy)
ANYWHERE = arrays(np.float32, SHAPE, elements=st.floats(-3, 3, width=32)).map(torch.from_numpy)


def in_ball(threat, x, x_adv) -> bool:
    inside = (x_adv.double() - x.double()).flatten(1).norm(p=threat.p, dim=1) <= threat.eps + 1e-6
    return bool(inside.all()) and float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1


@given(THREATS, IMAGES, ANYWHERE)
def test_projection_lands_in_ball_and_box_and_is_idempotent(threat, x, far):
    once = threat.project(x, far)
    assert once.dtype == torch.float32
    assert in_ball(threat, x, once)
    torch.testing.assert_close(threat.project(x, once), once, rtol=0, atol=1e-6)
    # the centre, and what is already inside, stay
    torch.testing.assert_close(threat.project(x, x), x, rtol=0, atol=1e-7)
    inside = (x + (once - x) * 0.9).clamp(0, 1)
    torch.testing.assert_close(threat.project(x, inside), inside, rtol=0, atol=1e-6)


@given(IMAGES, ANYWHERE)
def test_linf_projection_is_the_nearest_point(x, far):
    low, high = (x.double() - 0.1).clamp_min(0), (x.double() + 0.1).clamp_max(1)
    torch.testing.assert_close(Linf(0.1).project(x, far).double(), torch.clamp(far.double(), low, high), rtol=0, atol=1e-6)


def test_l2_projection_of_a_far_point_is_on_the_sphere_towards_it():
    x = torch.full((1, 1, 2, 2), 0.5)
    found = L2(0.25).project(x, x + torch.tensor([3.0, 0.0, 4.0, 0.0]).view(1, 1, 2, 2))
    torch.testing.assert_close(found - x, torch.tensor([0.15, 0.0, 0.2, 0.0]).view(1, 1, 2, 2), rtol=1e-5, atol=1e-6)


@given(st.sampled_from([Linf(0.1), L2(0.1)]), ANYWHERE, ANYWHERE)
def test_ascent_is_the_unit_step_that_raises_a_linear_function_most(threat, gradient, other):
    step = threat.ascent(gradient)
    assert step.isfinite().all()
    flat = gradient.double().flatten(1)
    moved = flat.abs().amax(1) > 0
    lengths = norms(step, threat.p)
    torch.testing.assert_close(lengths[moved], torch.ones(int(moved.sum())))
    assert torch.equal(lengths[~moved], torch.zeros(int((~moved).sum())))
    gain = (flat * step.double().flatten(1)).sum(1)
    dual = flat.norm(p=1 if threat.p == float("inf") else 2, dim=1)  # Hölder: no unit step gains more
    torch.testing.assert_close(gain, dual, rtol=1e-5, atol=1e-9)
    rival = other / norms(other, threat.p).clamp_min(1e-30).view(-1, 1, 1, 1)
    assert (gain >= (flat * rival.double().flatten(1)).sum(1) - 1e-4).all()


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.1)], ids=repr)
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-20, 1.0, 1e20, 1e38])
def test_ascent_survives_tiny_and_huge_gradients(threat, scale):
    gradient = torch.zeros(2, 1, 2, 2)
    gradient[0, 0] = torch.tensor([[1.0, -1.0], [1.0, 0.0]]) * scale
    assert float(norms(threat.ascent(gradient), threat.p)[0]) == pytest.approx(1, rel=1e-5)
    assert torch.equal(threat.ascent(gradient)[1], torch.zeros(1, 2, 2))


@pytest.mark.parametrize("threat", [Linf("8/255"), L2(0.5), Linf(0), L2(0)], ids=repr)
def test_noise_is_inside_the_ball_fills_it_and_is_seeded(threat):
    x = torch.zeros(300, 1, 2, 2)
    noise = threat.noise(x, seeded(1))
    lengths = norms(noise, threat.p)
    assert lengths.max() <= threat.eps + 1e-6
    assert torch.equal(noise, threat.noise(x, seeded(1)))
    if threat.eps:
        assert not torch.equal(noise, threat.noise(x, seeded(2)))
        # uniform in a ball of 4 dimensions: P(length ≤ r·eps) = r⁴, so the median is 0.84
        assert abs(float((lengths <= 0.5**0.25 * threat.eps).float().mean()) - 0.5) < 0.1
        assert noise.mean().abs() < 0.1 * threat.eps


def test_eps_may_be_a_fraction():
    assert parse_eps("8/255") == 8 / 255
    assert parse_eps(" 8 / 255 ") == 8 / 255
    assert parse_eps("0.25") == 0.25
    assert parse_eps(1) == 1.0
    assert Linf("2/255").eps == 2 / 255
    assert repr(Linf("8/255")) == "Linf(eps=0.03137)"


@pytest.mark.parametrize(
    "eps", ["eight", "8/0", "", "8/255/2", None, [8], "8px", float("nan"), float("inf"), -1, "-8/255", "1e999", 10**999]
)
def test_eps_that_is_no_budget(eps):
    with pytest.raises(ValueError, match=r"^threat\.eps: expected a .*found"):
        parse_eps(eps)


def test_eps_error_names_the_key_it_came_from():
    with pytest.raises(ValueError, match=r"^attack\.step_size: expected a number or a fraction .* found 'two'"):
        parse_eps("two", "attack.step_size")


def test_linf_eps_in_the_wrong_unit():
    with pytest.raises(ValueError, match=r"threat\.eps: .*\[0,1\].*found 8; did you mean '8/255'\? allowed: 0\.\.1"):
        Linf(8)
    assert Linf(1).eps == 1
    assert L2(8).eps == 8  # an L2 length above 1 is ordinary


def test_scaled_and_distance():
    assert L2(0.5).scaled(3).eps == 1.5
    assert Linf(0.1).scaled(3).eps == pytest.approx(0.3)
    assert Linf(0.5).scaled(3).eps == 1  # no image is further away
    x, x_adv = torch.zeros(1, 1, 1, 2), torch.tensor([0.3, 0.4]).view(1, 1, 1, 2)
    assert float(L2(1).distance(x, x_adv)) == pytest.approx(0.5)
    assert float(Linf(1).distance(x, x_adv)) == pytest.approx(0.4)
