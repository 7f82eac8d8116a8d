"""Adversarial weight perturbation: the paper's move, backward and restore, without moving anything."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from glassarmor.defenses.attacks.objectives import KLToClean
from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.losses import kl_divergence
from glassarmor.defenses.threat import Linf
from glassarmor.defenses.training.defense import Defense
from glassarmor.defenses.training.regularizers import PSE, UnitSensitivity
from glassarmor.defenses.training.terms import AdversarialCE, CleanCE, TradesKL
from glassarmor.defenses.training.weights import AWP, moved
from glassarmor.interpret.observation import observe
from tests.reference.methods import awp_step
from tests.reference.nets import batch, conv_bn, unchanged, untidy

BALL = Linf(0.05)


def pgd_at(regularizers=None, awp: AWP | None = None) -> Defense:
    return Defense(PGD(BALL, 2), {"ce": AdversarialCE()}, regularizers, awp=awp)


def trades(regularizers=None, awp: AWP | None = None) -> Defense:
    attack = PGD(BALL, 2, start="gaussian", objective=KLToClean())
    return Defense(attack, {"ce": CleanCE(), "kl": TradesKL()}, regularizers, awp=awp)


def adversarial_loss(x, x_adv, y):
    return lambda net: nn.functional.cross_entropy(net(x_adv), y)


def trades_loss(x, x_adv, y):
    def loss(net):
        z, z_adv = net(torch.cat([x, x_adv])).chunk(2)
        return nn.functional.cross_entropy(z, y) + 6 * kl_divergence(z, z_adv).mean()

    return loss


@pytest.mark.parametrize(("make", "loss"), [(pgd_at, adversarial_loss), (trades, trades_loss)])
def test_equals_move_backward_restore(make, loss):
    """Gradients, loss, and BatchNorm statistics, which learn from one pass: the one at the moved weights."""
    net, reference = conv_bn().train(), conv_bn().train()
    x, _, y = batch(n=6)
    defense = make(awp=AWP(0.02))
    defense.prepare(net, x[:2], y[:2])
    output = defense(net, x, y)
    output.loss.backward()
    value = awp_step(reference, loss(x, output.obs.adv.x, y), 0.02)
    assert output.loss.item() == pytest.approx(value, rel=1e-5)
    for found, expected in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
        assert torch.equal(found, expected), "the weights themselves are back"
    for found, expected in zip(net.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(found, expected)
    plain = conv_bn().train()
    assert value > loss(x, output.obs.adv.x, y)(plain).item() + 1e-3, "the loss was raised"


def test_the_attack_is_that_of_the_weights_as_they_are():
    x, _, y = batch(n=6)
    one, other = pgd_at()(conv_bn().train(), x, y), pgd_at(awp=AWP(0.02))(conv_bn().train(), x, y)
    assert torch.equal(one.obs.adv.x, other.obs.adv.x)
    assert not torch.equal(one.obs.adv.logits, other.obs.adv.logits)


def test_each_weight_tensor_moves_by_gamma_of_its_length_and_nothing_else_moves():
    net = untidy(conv_bn())
    net.conv2.weight.requires_grad_(False)
    _, x_adv, y = batch(n=6)
    with unchanged(net):
        shifts = AWP(0.01).shifts(net, lambda: nn.functional.cross_entropy(net(x_adv), y))
    learns = {p for p in net.parameters() if p.dim() > 1 and p.requires_grad}
    assert set(shifts) == learns
    assert len(learns) == 2
    for weight, shift in shifts.items():
        assert shift.norm().item() == pytest.approx(0.01 * weight.norm().item(), rel=1e-5)


def test_a_tiny_gradient_still_has_a_direction_and_none_is_no_move():
    net = conv_bn()
    x, _, y = batch()
    tiny = AWP(0.01).shifts(net, lambda: 1e-25 * nn.functional.cross_entropy(net(x), y))
    plain = AWP(0.01).shifts(net, lambda: nn.functional.cross_entropy(net(x), y))
    for weight, shift in plain.items():
        torch.testing.assert_close(tiny[weight], shift, rtol=1e-2, atol=1e-4)
    still = AWP(0.01).shifts(net, lambda: 0 * net(x).sum())
    assert all(torch.equal(shift, torch.zeros_like(shift)) for shift in still.values())


def test_moved_shadows_and_leaves_no_trace():
    net = untidy(conv_bn())
    x, _, _ = batch()
    net.eval()
    shifts = {net.conv1.weight: torch.full_like(net.conv1.weight, 0.1), net.head.weight: torch.ones_like(net.head.weight)}
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.conv1.weight += 0.1
        twin.head.weight += 1
    with unchanged(net), moved(net, shifts):
        assert torch.equal(net(x), twin(x))
        assert list(net.state_dict()) == list(twin.state_dict())
    with unchanged(net), pytest.raises(RuntimeError), moved(net, shifts):
        net(x[:, :1])
    with moved(net, shifts):
        assert torch.equal(observe(net, x, x, torch.zeros(4).long(), layers=["act1"]).adv.acts["act1"], twin[:3](x))


def test_a_tied_weight_moves_in_both_places():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    x = torch.randn(2, 3)
    with moved(net, {net[0].weight: torch.ones(3, 3)}):
        torch.testing.assert_close(net(x), x @ (net[0]._parameters["weight"] + 1).T @ (net[0]._parameters["weight"] + 1).T)


@pytest.mark.parametrize("make", [pgd_at, trades])
def test_regularizers_see_the_moved_net_and_keep_their_estimates(make):
    """The slope of PSE is that of the moved weights; running sensitivities are fed once; second derivatives arrive."""
    net = conv_bn(dropout=0.2).train()
    x, _, y = batch(n=6)
    defense = make({"pse": PSE(0.5, layers=["act1"]), "sensitivity": UnitSensitivity(0.1)}, AWP(0.02))
    defense.prepare(net, x[:2], y[:2])
    output = defense(net, x, y)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert defense.named_terms()["sensitivity"].running[0].samples == 6


def run(awp: AWP | None, epoch: float = 0.0, seed: int = 3) -> dict:
    net = conv_bn(dropout=0.2).train()
    x, _, y = batch(n=6)
    defense = pgd_at(awp=awp)
    defense.prepare(net, x[:2], y[:2])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    torch.manual_seed(seed)
    for step in range(2):
        defense.at(epoch, step)
        optimizer.zero_grad()
        defense(net, x, y).loss.backward()
        optimizer.step()
    return net.state_dict() | {"random": torch.rand(3)}


def test_gamma_0_and_warm_up_are_absence_bit_for_bit_and_dropout_draws_no_more():
    plain, zero, waiting = run(None), run(AWP(0.0)), run(AWP(0.01, warmup=2), epoch=1.9)
    live = run(AWP(0.01, warmup=2), epoch=2.0)
    for key in plain:
        assert torch.equal(plain[key], zero[key])
        assert torch.equal(plain[key], waiting[key])
    assert torch.equal(plain["random"], live["random"])
    assert not torch.equal(plain["conv1.weight"], live["conv1.weight"])


def test_bf16_and_evaluation():
    net = conv_bn().train()
    x, _, y = batch(n=6)
    defense = pgd_at(awp=AWP(0.01))
    with torch.autocast("cpu", torch.bfloat16):
        defense(net, x, y).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters() if p.dim() > 1)
    defense.at(0, 0)
    with torch.no_grad():  # nothing is learned, so nothing moves
        assert torch.equal(defense(net.eval(), x, y).loss, pgd_at()(net.eval(), x, y).loss)


@pytest.mark.parametrize("option", [{"gamma": -1}, {"gamma": float("nan")}, {"gamma": 0.1, "warmup": "a"}])
def test_bad_options(option):
    with pytest.raises(ValueError, match=rf"awp\.{list(option)[-1]}: expected a finite number >= 0"):
        AWP(**option)


def test_without_an_attack_there_is_no_adversarial_loss_to_raise():
    with pytest.raises(ValueError, match=r"awp\.gamma: is about the adversarial loss, but this defense has no attack"):
        Defense(None, {"ce": CleanCE()}, awp=AWP(0.01))
    Defense(None, {"ce": CleanCE()}, awp=AWP(0.0))
