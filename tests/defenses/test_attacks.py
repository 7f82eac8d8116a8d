"""Attacks: closed forms on linear nets, invariants 1 and 4, and their own random numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from glassarmor.defenses import losses
from glassarmor.defenses.attacks.objectives import CrossEntropy, KLToClean, Margin, Targeted
from glassarmor.defenses.attacks.pgd import FGSM, FGSMRS, NFGSM, PGD
from glassarmor.defenses.threat import L2, Linf, norms
from tests.reference.nets import Linear, batch, conv_bn

SHAPE = (2, 4, 4)


def binary(n: int = 6):
    """A linear two-class net with its direction (w_other − w_y) for each sample, and interior images."""
    net = Linear(SHAPE, 2)
    x, _, y = batch(n=n, size=4, channels=2, classes=2)
    w = net.head.weight.detach()
    return net, x, y, (w[1 - y] - w[y]).view(-1, *SHAPE)


@pytest.mark.parametrize("objective", [CrossEntropy(), Margin(), Targeted(1)], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("start", ["uniform", "gaussian", "none"])
def test_pgd_reaches_the_closed_form_linf(objective, start):
    net, x, y, direction = binary()
    found = PGD(Linf(0.1), steps=10, start=start, objective=objective)(net, x, y)
    torch.testing.assert_close(found, x + 0.1 * direction.sign(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", ["uniform", "gaussian", "none"])
def test_pgd_reaches_the_closed_form_l2(start):
    net, x, y, direction = binary()
    eps = 0.12  # interior images are 0.15 from the box
    found = PGD(L2(eps), steps=30, step_size=eps, start=start)(net, x, y)
    best = x + eps * direction / norms(direction, 2).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, best, rtol=0, atol=1e-5)


def test_pgd_reaches_the_closed_form_linf_where_the_box_bites():
    net, _, y, direction = binary()
    x = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(3))
    found = PGD(Linf(0.3), steps=10)(net, x, y)
    best = (x + 0.3 * direction.sign()).clamp(0, 1)
    assert ((best == 0) | (best == 1)).any()
    torch.testing.assert_close(found, best, rtol=0, atol=1e-6)


def test_fgsm_closed_form():
    net, x, y, direction = binary()
    torch.testing.assert_close(FGSM(Linf(0.1))(net, x, y), x + 0.1 * direction.sign(), rtol=0, atol=1e-6)
    best = x + 0.1 * direction / norms(direction, 2).view(-1, 1, 1, 1)
    torch.testing.assert_close(FGSM(L2(0.1))(net, x, y), best, rtol=0, atol=1e-6)


def test_pgd_equals_a_plain_loop_on_a_conv_net():
    """Ten lines of projected sign ascent, written once more: same images, and no weaker."""
    net = conv_bn().eval()
    x, _, y = batch(n=8)
    x_adv = x.clone()
    for _ in range(7):
        x_adv = x_adv.detach().requires_grad_()
        nn.functional.cross_entropy(net(x_adv), y, reduction="sum").backward()
        delta = (x_adv.detach() + 0.02 * x_adv.grad.sign() - x).clamp(-0.05, 0.05)
        x_adv = (x + delta).clamp(0, 1)
    found = PGD(Linf(0.05), steps=7, step_size=0.02, start="none")(net, x, y)
    clean, loop, ours = (float(losses.cross_entropy(net(images), y).detach().mean()) for images in (x, x_adv, found))
    assert ours >= loop - 1e-4
    assert ours > clean + 0.02
    torch.testing.assert_close(found, x_adv.detach(), rtol=0, atol=1e-5)


def test_more_steps_and_a_larger_ball_raise_the_loss():
    net = conv_bn().eval()
    x, _, y = batch(n=16)

    def loss(attack) -> float:
        return float(losses.cross_entropy(net(attack(net, x, y)), y).detach().mean())

    assert loss(PGD(Linf(0.05), steps=10)) >= loss(FGSM(Linf(0.05))) - 1e-3
    assert loss(PGD(Linf(0.1))) > loss(PGD(Linf(0.05))) > loss(PGD(Linf(0.0)))


def test_targeted_raises_the_targets_probability():
    net = conv_bn().eval()
    x, _, y = batch(n=8)
    objective = Targeted(2)
    found = PGD(Linf(0.1), steps=10, objective=objective)(net, x, y)
    assert (objective(net(found), y, None) > objective(net(x), y, None)).all()
    t = (y + 2) % 5
    plain = PGD(Linf(0.1), steps=10)(net, x, y)
    p, q = (net(images).softmax(1)[range(8), t].mean() for images in (found, plain))
    assert p > q


@pytest.mark.parametrize("objective", [CrossEntropy(), Margin(), KLToClean(), Targeted(1)], ids=lambda o: type(o).__name__)
def test_restarts_are_never_worse_than_the_first_start(objective):
    net = conv_bn().eval()
    x, _, y = batch(n=16)
    y = net(x).argmax(1)
    eps = 0.01  # so that some samples fall and some do not
    one = PGD(Linf(eps), steps=2, objective=objective, seed=5)(net, x, y)
    many = PGD(Linf(eps), steps=2, objective=objective, restarts=4, seed=5)(net, x, y)

    def score(images):
        logits = net(images)
        return objective(logits, y, net(x)).double() + 1e9 * (logits.argmax(1) != y)

    assert (score(many) >= score(one) - 1e-6).all()
    assert not torch.equal(many, one)  # some other start won


def test_a_restart_that_fools_wins_over_a_larger_objective(monkeypatch):
    """First by being misclassified, then by the objective."""
    net = Linear((1, 1, 2), 3)
    with torch.no_grad():
        net.head.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.5]]))
        net.head.bias.copy_(torch.tensor([0.2, 0.0, 0.0]))
    attack = PGD(Linf(0.5), restarts=2, objective=Targeted(2))
    # The first is nearer to class 2 but still right, the second is fooled.
    starts = iter([torch.tensor([[[[0.0, 0.3]]]]), torch.tensor([[[[0.9, 0.2]]]])])
    monkeypatch.setattr(attack, "_ascend", lambda *a: next(starts))
    found = attack(net, torch.full((1, 1, 1, 2), 0.4), torch.tensor([0]))
    assert found.flatten().tolist() == pytest.approx([0.9, 0.2])


def test_n_fgsm_uses_the_larger_ball_it_declares():
    """Noise of 2ε and a step of ε, not projected: further away than ε, never further than 3ε (de Jorge et al. 2022)."""
    net = conv_bn().eval()
    x, _, y = batch(n=8)
    attack = NFGSM(Linf(0.04))
    assert attack.threat.eps == pytest.approx(0.12)
    distance = attack.threat.distance(x, attack(net, x, y))
    assert (distance <= 0.12 + 1e-6).all()
    assert (distance > 0.09).all()


def test_fgsm_rs_step_is_alpha_eps_from_a_start_in_the_ball():
    net, x, y, direction = binary()
    found = FGSMRS(Linf(0.1), alpha=1.25)(net, x, y)
    # from any start in [−ε, ε], a step of 1.25 ε along the sign ends in [0.25 ε, ε] on that side
    along = (found - x) * direction.sign()
    assert along.min() >= 0.025 - 1e-6
    assert along.max() <= 0.1 + 1e-6
    assert along.min() < 0.06  # the start is random


def test_the_gradient_of_kl_to_clean_vanishes_at_the_image():
    """Why TRADES starts at random: at x only rounding is left, and a normalised step would follow it."""
    net = conv_bn().eval()
    x, x_adv, y = batch()

    def gradient(images: torch.Tensor) -> float:
        images = images.clone().requires_grad_()
        return float(torch.autograd.grad(KLToClean()(net(images), y, net(x).detach()).sum(), images)[0].abs().max())

    assert gradient(x) < 1e-6
    assert gradient(x_adv) > 1e-4
    moved = PGD(L2(0.5), steps=5, start="gaussian", objective=KLToClean())(net, x, y)
    assert (losses.kl_divergence(net(x), net(moved)) > 1e-4).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "attack.steps: expected a whole number >= 1, found 0"),
        ({"restarts": 0}, "attack.restarts: expected a whole number >= 1, found 0"),
        ({"start": "middle"}, "attack.start: expected uniform, gaussian, bernoulli or none; found 'middle'"),
        ({"start": "none", "restarts": 2}, "attack.restarts: several restarts need a random start"),
        ({"step_size": 0}, "attack.step_size: expected a positive number, found 0"),
        ({"step_size": "fast"}, "attack.step_size: expected a number or a fraction"),
    ],
)
def test_options_that_make_no_attack(options, message):
    with pytest.raises(ValueError, match=message):
        PGD(Linf(0.1), **options)


def test_step_size_default_and_fraction():
    assert PGD(Linf(0.1), steps=10).step_size == pytest.approx(0.025)
    assert PGD(Linf(0.1), step_size="2/255").step_size == 2 / 255
