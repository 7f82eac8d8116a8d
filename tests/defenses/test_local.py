"""Terms about the loss near x: closed forms on a linear net, finite differences on a smooth one, what they lower."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from glassarmor.defenses.attacks.pgd import FGSM, PGD
from glassarmor.defenses.threat import L2, Linf
from glassarmor.defenses.training.defense import Defense
from glassarmor.defenses.training.local import GradAlign, GradientNorm, LocalLinearity
from glassarmor.defenses.training.terms import AdversarialCE, CleanCE, FeatureConsistency, LogitPairing, Ramp
from glassarmor.interpret.observation import observe
from tests.reference import losses as reference
from tests.reference.nets import Linear, batch, conv_bn, seeded

BALL = Linf(0.1)


@pytest.fixture
def linear():
    """Net, observation without a clean pass, and W, b in float64."""
    net = Linear((3, 8, 8), 5)
    x, x_adv, y = batch(n=6)
    w, b = (p.detach().double().numpy() for p in (net.head.weight, net.head.bias))
    return observe(net, x, x_adv, y, clean=False), w, b


def samples(x: torch.Tensor) -> np.ndarray:
    return x.double().flatten(1).numpy()


def test_grad_align_equals_the_paper(linear):
    obs, w, b = linear
    eta = BALL.noise(obs.x, seeded(3 * 1_000_003 + 7))
    expected = [
        reference.grad_align(w, b, x, e, int(y)) for x, e, y in zip(samples(obs.x), samples(eta), obs.y, strict=True)
    ]
    term = GradAlign(BALL, seed=3)
    term.reseed(7)
    np.testing.assert_allclose(term(obs).detach().numpy(), expected, rtol=1e-3, atol=1e-6)
    assert max(expected) > 1e-3


def test_local_linearity_equals_the_paper(linear):
    obs, w, b = linear
    parts = [
        reference.local_linearity(w, b, x, d, int(y))
        for x, d, y in zip(samples(obs.x), samples(obs.adv.x - obs.x), obs.y, strict=True)
    ]
    found = LocalLinearity(BALL, slope=0.5)(obs).detach().numpy()
    np.testing.assert_allclose(found, [gap + 0.5 * slope for gap, slope in parts], rtol=1e-3, atol=1e-5)
    assert max(gap for gap, _ in parts) > 1e-2


@pytest.mark.parametrize("ball", [Linf(0.05), L2(0.5)])
def test_its_own_search_stays_in_the_ball_and_finds_more_than_noise(ball):
    net = conv_bn().eval()
    x, _, y = batch(n=8)
    obs = observe(net, x, x, y)
    term = LocalLinearity(ball, slope=0.0, steps=8)
    found = term._search(obs, x)
    assert (ball.distance(x, found) <= ball.eps + 1e-6).all()
    assert 0 <= found.min() < found.max() <= 1
    term.reseed(0)
    value = term(obs).detach()
    noisy = observe(net, x, ball.project(x, x + ball.noise(x, seeded())), y, clean=False)
    assert value.mean() > 2 * LocalLinearity(ball, slope=0.0)(noisy).detach().mean()


def test_gradient_norm_equals_the_paper(linear):
    obs, w, b = linear
    expected = [
        (reference.linear_gradient(w, b, x, int(y))[1] ** 2).sum() for x, y in zip(samples(obs.x), obs.y, strict=True)
    ]
    np.testing.assert_allclose(GradientNorm()(obs).detach().numpy(), expected, rtol=1e-4)


TERMS = {
    "grad_align": lambda: GradAlign(BALL),
    "local_linearity": lambda: LocalLinearity(BALL),
    "gradient_norm": GradientNorm,
    "consistency": lambda: FeatureConsistency(layers=["act1", "act2"]),
}


def test_a_gradient_that_vanishes_or_nearly_does_is_no_accident():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    x, y = torch.rand(2, 3, 2, 2), torch.zeros(2).long()
    with torch.no_grad():
        net[1].weight[0], net[1].weight[1] = 1.0, -1.0
        net[1].bias[0] = 1000.0  # p = 1 to the last bit: no gradient at all
    term = GradAlign(BALL)
    value = term(observe(net, x, x + 0.01, y))
    assert torch.equal(value, torch.zeros(2))
    value.sum().backward()
    assert net[1].weight.grad is None or net[1].weight.grad.isfinite().all()
    with torch.no_grad():
        net[1].bias[0] = 60.0  # gradients whose squares underflow, all along one line
    assert term(observe(net, x, x + 0.01, y)).detach().abs().max() < 1e-4


def test_the_same_step_draws_the_same_noise_and_another_step_another():
    net = conv_bn().train()
    x, _, y = batch()
    defense = Defense(FGSM(BALL), {"ce": AdversarialCE()}, {"align": GradAlign(BALL)})
    defense.prepare(net, x, y)
    found = []
    for step in (3, 3, 4):
        defense.at(0, step)
        found.append(defense(net.eval(), x, y).terms["align"])
    assert found[0] == found[1] != found[2]


@pytest.mark.long
@pytest.mark.parametrize("name", TERMS)
def test_each_lowers_what_it_measures(name):
    def value_after(live: bool) -> float:
        net = conv_bn().train()
        term = TERMS[name]()
        weight = {"gradient_norm": 1.0, "consistency": 20.0, "grad_align": 40.0}.get(name, 4.0)
        term.weight = weight if live else Ramp(0, weight, epochs=1)
        x, _, y = batch(n=16)
        defense = Defense(PGD(BALL, 2), {"ce": AdversarialCE()}, {"term": term})
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
        for _ in range(20):
            defense.at(0, 0)
            optimizer.zero_grad()
            defense(net, x, y).loss.backward()
            optimizer.step()
        defense.at(1, 0)
        return float(defense(net, x, y).terms["term"])

    assert value_after(True) < 0.9 * value_after(False)


def test_at_weight_0_a_ramp_makes_no_pass_of_its_own():
    net = conv_bn().train()
    x, _, y = batch()
    passes = []
    net.register_forward_pre_hook(lambda _m, inputs: passes.append(len(inputs[0])))
    counts = []
    defense = Defense(FGSM(BALL), {"ce": AdversarialCE()}, {"align": GradAlign(BALL, Ramp(0, 1, epochs=1))})
    defense.prepare(net, x, y)
    for epoch in (0.0, 0.5):
        defense.at(epoch, 0)
        passes.clear()
        output = defense(net, x, y)
        counts.append(sum(passes) / len(x))
        assert (output.terms["align"] > 0) == (epoch > 0)
    assert counts == [2, 4]


def test_what_needs_an_attack_and_what_does_not():
    for name, term in (
        ("align", GradAlign(BALL)),
        ("linear", LocalLinearity(BALL)),
        ("features", FeatureConsistency()),
        ("logits", LogitPairing()),
    ):
        with pytest.raises(ValueError, match=rf"regularizers\.{name}: compares clean and adversarial images, but this"):
            Defense(None, {"ce": CleanCE()}, {name: term})
    net = Linear((3, 8, 8), 5)  # without a feature map, which none of these asks for
    x, _, y = batch()
    terms = {"norm": GradientNorm(), "linear": LocalLinearity(BALL, steps=2)}
    output = Defense(None, {"ce": CleanCE()}, terms)(net, x, y)
    assert all(value > 0 for value in output.terms.values())


@pytest.mark.parametrize("option", [{"steps": -1}, {"steps": 1.5}, {"slope": -1.0}, {"slope": float("nan")}])
def test_bad_options(option):
    with pytest.raises(ValueError, match=rf"regularizers\.local_linearity\.{next(iter(option))}: expected"):
        LocalLinearity(BALL, **option)


def test_feature_consistency_is_one_minus_the_cosine_and_ignores_scale():
    net = conv_bn().eval()
    x, x_adv, y = batch()
    obs = observe(net, x, x_adv, y, layers=["act1"])
    a, b = (side.acts["act1"].flatten(1).detach().double().numpy() for side in (obs.clean, obs.adv))
    expected = [1 - (p @ q) / np.sqrt((p @ p) * (q @ q)) for p, q in zip(a, b, strict=True)]
    found = FeatureConsistency(layers=["act1"])(obs).detach()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        net.bn1.weight *= 10
        net.bn1.bias *= 10
    scaled = FeatureConsistency(layers=["act1"])(observe(net, x, x_adv, y, layers=["act1"])).detach()
    torch.testing.assert_close(scaled, found, rtol=1e-3, atol=1e-6)
