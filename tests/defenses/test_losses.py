"""Losses equal slow float64 formulas from the papers, and stay finite where a probability underflows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from glassarmor.defenses import losses
from glassarmor.defenses.attacks.objectives import CrossEntropy, KLToClean, Margin, NuclearCE, Targeted
from tests.reference import losses as reference


@st.composite
def logits(draw):
    """Clean and adversarial logits (N, K) and labels."""
    n, k = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    values = arrays(np.float32, (n, k), elements=st.floats(-6, 6, width=32))
    return draw(values), draw(values), draw(arrays(np.int64, n, elements=st.integers(0, k - 1)))


def check(found: torch.Tensor, expected: list[float]) -> None:
    assert found.shape == (len(expected),)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=2e-5)


@given(logits(), st.sampled_from([0.0, 0.1]))
def test_cross_entropy(case, smoothing):
    z, _, y = case
    expected = [reference.cross_entropy(a, b, smoothing) for a, b in zip(z.tolist(), y, strict=True)]
    check(losses.cross_entropy(torch.tensor(z), torch.tensor(y), smoothing), expected)


@given(logits())
def test_kl_of_trades(case):
    z, z_adv, _ = case
    expected = [reference.kl(a, b) for a, b in zip(z.tolist(), z_adv.tolist(), strict=True)]
    check(losses.kl_divergence(torch.tensor(z), torch.tensor(z_adv)), expected)


def test_kl_has_a_direction():
    z, z_adv = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[-1.0, 1.0, 3.0]])
    forward, backward = losses.kl_divergence(z, z_adv), losses.kl_divergence(z_adv, z)
    assert abs(float(forward - backward)) > 0.1
    assert float(forward) == pytest.approx(reference.kl(z[0].tolist(), z_adv[0].tolist()), rel=1e-5)


@given(logits())
def test_boosted_cross_entropy_of_mart(case):
    z, _, y = case
    expected = [reference.mart_bce(a, b) for a, b in zip(z.tolist(), y, strict=True)]
    check(losses.boosted_cross_entropy(torch.tensor(z), torch.tensor(y)), expected)


@given(logits())
def test_weighted_kl_of_mart(case):
    z, z_adv, y = case
    expected = [reference.mart_kl(*c) for c in zip(z.tolist(), z_adv.tolist(), y, strict=True)]
    check(losses.mart_kl(torch.tensor(z), torch.tensor(z_adv), torch.tensor(y)), expected)


@given(logits())
def test_logit_pairing_and_margin(case):
    z, z_adv, y = case
    expected = [reference.logit_pairing(a, b) for a, b in zip(z.tolist(), z_adv.tolist(), strict=True)]
    np.testing.assert_allclose(losses.logit_pairing(torch.tensor(z), torch.tensor(z_adv)), expected, rtol=1e-4, atol=1e-5)
    expected = [reference.margin(a, b) for a, b in zip(z.tolist(), y, strict=True)]
    check(losses.margin(torch.tensor(z), torch.tensor(y)), expected)


@given(logits())
def test_nuclear_norm_of_nuat(case):
    z, z_adv, y = case
    expected = reference.nuclear_norm(z, z_adv)
    found = losses.nuclear_norm(torch.tensor(z), torch.tensor(z_adv))
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    values = NuclearCE(2.0)(torch.tensor(z_adv), torch.tensor(y), torch.tensor(z))
    entropy = [reference.cross_entropy(a, b) for a, b in zip(z_adv.tolist(), y, strict=True)]
    assert float(values.sum()) == pytest.approx(sum(entropy) + 2 * len(z) * expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_nuclear_norm_has_a_finite_gradient_at_any_rank(rank):
    z = torch.zeros(5, 4)
    z_adv = (torch.randn(5, rank) @ torch.randn(rank, 4)).requires_grad_()
    (gradient,) = torch.autograd.grad(losses.nuclear_norm(z, z_adv), z_adv)
    assert gradient.isfinite().all()
    assert torch.linalg.matrix_norm(gradient, 2) <= 1 / 5 + 1e-5  # a subgradient lies in the spectral ball


@given(logits())
def test_margin_is_positive_exactly_when_misclassified(case):
    z, _, y = torch.tensor(case[0]), case[1], torch.tensor(case[2])
    strict = (z == z.amax(1, keepdim=True)).sum(1) == 1  # ties belong to nobody
    assert torch.equal((losses.margin(z, y) > 0)[strict], (z.argmax(1) != y)[strict])


EXTREME = torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0], [-200.0, -200.0, 200.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_finite_where_probabilities_underflow(label, dtype):
    z = EXTREME.to(dtype).requires_grad_()
    z_adv = EXTREME.flip(0).to(dtype).requires_grad_()
    y = torch.full((4,), label)
    for value in (
        losses.cross_entropy(z_adv, y),
        losses.kl_divergence(z, z_adv),
        losses.boosted_cross_entropy(z_adv, y),
        losses.mart_kl(z, z_adv, y),
        losses.logit_pairing(z, z_adv),
    ):
        assert value.isfinite().all()
        gradients = torch.autograd.grad(value.sum(), [z, z_adv], allow_unused=True)
        assert all(g.isfinite().all() for g in gradients if g is not None)
        assert any(g.abs().sum() > 0 for g in gradients if g is not None)


def test_underflow_gives_the_analytic_limits():
    z, z_adv = torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, 200.0]])
    assert float(losses.kl_divergence(z, z_adv)) == pytest.approx(400)
    assert float(losses.mart_kl(z_adv, z, torch.tensor([0]))) == pytest.approx(400)  # p_y(x) = 0: full weight
    assert float(losses.mart_kl(z, z_adv, torch.tensor([0]))) == 0  # p_y(x) = 1: none
    # −log p_y − log(1 − p_c) = 400 + 400, where 1 − p_c would be 0 in any floating point
    assert float(losses.boosted_cross_entropy(z_adv, torch.tensor([0]))) == pytest.approx(800)
    z = z_adv.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses.boosted_cross_entropy(z, torch.tensor([0])).sum(), z)
    torch.testing.assert_close(gradient, torch.tensor([[-2.0, 2.0]]))


def test_objectives_are_these_losses():
    z, z_adv, y = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    assert torch.equal(CrossEntropy()(z_adv, y, None), losses.cross_entropy(z_adv, y))
    assert torch.equal(KLToClean()(z_adv, y, z), losses.kl_divergence(z, z_adv))
    assert torch.equal(Margin()(z_adv, y, None), losses.margin(z_adv, y))
    log_p = z_adv.log_softmax(1)
    torch.testing.assert_close(Targeted(2)(z_adv, y, None), log_p[range(5), [2, 3, 0, 1, 2]])
    assert (KLToClean.needs_clean, CrossEntropy.needs_clean, Margin.needs_clean, Targeted.needs_clean) == (
        True, False, False, False,
    )  # fmt: skip


@pytest.mark.parametrize("offset", [0, 4, 8, -4])
def test_targeted_refuses_the_true_class(offset):
    with pytest.raises(ValueError, match=rf"objective.offset: expected 1..3 for 4 classes, found {offset}"):
        Targeted(offset)(torch.randn(2, 4), torch.tensor([0, 1]), None)


def test_mart_weight_carries_a_gradient():
    """As published, (1 − p_y(x)) is not detached."""
    z = torch.tensor([[1.0, 0.5, -1.0]], requires_grad=True)
    z_adv, y = torch.tensor([[0.0, 1.0, 0.3]]), torch.tensor([0])
    (found,) = torch.autograd.grad(losses.mart_kl(z, z_adv, y).sum(), z)
    h, numeric = 1e-6, []
    for c in range(3):
        up, down = z[0].tolist(), z[0].tolist()
        up[c] += h
        down[c] -= h
        ends = [reference.mart_kl(point, z_adv[0].tolist(), 0) for point in (up, down)]
        numeric.append((ends[0] - ends[1]) / (2 * h))
    np.testing.assert_allclose(found[0].numpy(), numeric, rtol=1e-4, atol=1e-5)
