"""Attacks confined to discriminative regions: closed forms restricted to the support, and the regions themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glassarmor.defenses import losses
from glassarmor.defenses.attacks.minimum_norm import CarliniWagner, ElasticNet, GroupSparse
from glassarmor.defenses.attacks.objectives import Margin, Targeted
from glassarmor.defenses.attacks.pgd import FGSM, PGD
from glassarmor.defenses.attacks.supported import Masked, Supported
from glassarmor.defenses.threat import L2, Linf, norms
from tests.reference.minimum_norm import undecided
from tests.reference.nets import Linear, Residual, batch, conv_bn

SHAPE = (2, 4, 4)


class Half(Supported):
    """The left half of the image in place of the map: a linear net has none."""

    def support(self, net, x, y):
        mask = torch.zeros(len(x), 1, *x.shape[-2:], dtype=torch.bool)
        mask[..., : x.shape[-1] // 2] = True
        return mask


def linear():
    """A linear two-class net, interior images it gets right by one logit, w_other − w_y, and the same on the support."""
    net = Linear(SHAPE, 2)
    x = 0.35 + 0.3 * torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(1))
    y = torch.arange(6) % 2
    weights = net.head.weight.detach()
    w = (weights[1 - y] - weights[y]).view(-1, *SHAPE)
    now = losses.margin(net(x), y).detach()
    x = x + ((-1 - now) / norms(w, 2) ** 2).view(-1, 1, 1, 1) * w
    inside = w.clone()
    inside[..., 2:] = 0
    return net, x, y, inside


@pytest.mark.parametrize("start", ["uniform", "none"])
def test_linf_pgd_is_the_closed_form_on_the_support(start):
    net, x, y, inside = linear()
    found = Half(PGD(Linf(0.1), steps=10, start=start))(net, x, y)
    torch.testing.assert_close(found, x + 0.1 * inside.sign(), rtol=0, atol=1e-6)
    assert torch.equal(found[..., 2:], x[..., 2:])


def test_l2_pgd_spends_its_budget_on_the_support():
    net, x, y, inside = linear()
    best = x + 0.12 * inside / norms(inside, 2).view(-1, 1, 1, 1)
    found = Half(PGD(L2(0.12), steps=10, start="none"))(net, x, y)
    torch.testing.assert_close(found, best, rtol=0, atol=1e-5)
    # From a random start the part outside is squeezed out by the projections.
    long = Half(PGD(L2(0.12), steps=60, step_size=0.12))(net, x, y)
    torch.testing.assert_close(long, best, rtol=0, atol=1e-5)
    assert (norms(Half(PGD(L2(0.12), steps=3))(net, x, y) - x, 2) <= 0.12 + 1e-6).all()


@pytest.mark.parametrize(
    ("attack", "p", "dual"),
    [
        (CarliniWagner(steps=60, search_steps=8, initial_c=0.1), 2, 2),
        (ElasticNet(beta=0.0, steps=60, search_steps=8, initial_c=0.1), 2, 2),
        (ElasticNet(beta=5.0, rule="L1", steps=100, initial_c=0.1), 1, torch.inf),
    ],
    ids=["cw", "en", "l1"],
)
def test_minimum_norm_attacks_find_the_closed_form_on_the_support(attack, p, dual):
    net, x, y, inside = linear()
    found = Half(attack)(net, x, y)
    assert (net(found).argmax(1) != y).all()
    assert torch.equal(found[..., 2:], x[..., 2:])
    share = norms(found - x, p) * norms(inside, dual)  # of the distance to a hyperplane, 1 / dual norm
    assert (share >= 1 - 1e-4).all()
    assert (share <= 1.08).all()


def test_minimum_norm_attacks_never_leave_the_support_by_themselves():
    """So the distortion they minimise is that of the image returned."""
    x = torch.rand(4, 3, 8, 8).round(decimals=1)  # black and white pixels too
    net, y = undecided(x)
    masked = Masked(net, x, torch.rand(4, 1, 8, 8) < 0.4)
    few = {"steps": 20, "search_steps": 4, "initial_c": 10.0}
    for attack in (CarliniWagner(**few), ElasticNet(**few), GroupSparse(**few)):
        found = attack(masked, x, y)
        assert (found != x).any()
        assert torch.equal(masked.compose(found), found)


def test_the_masked_net_has_the_true_gradient_inside_and_none_outside():
    net = conv_bn().eval()
    x, x_adv, y = batch()
    support = torch.rand(4, 1, 8, 8) < 0.5
    masked = Masked(net, x, support)
    composed = masked.compose(x_adv)
    assert torch.equal(masked(x_adv), net(composed))

    def gradient(f, at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(losses.cross_entropy(f(at), y).sum(), at)[0]

    assert torch.equal(gradient(masked, x_adv), gradient(net, composed) * support)
    with pytest.raises(ValueError, match="keeps its batch together"):
        masked(x_adv[:2])


@pytest.mark.parametrize("make", [conv_bn, Residual])
def test_the_support_is_the_union_of_the_highest_values_of_two_maps(make):
    """Against the maps written out for a pooled linear head (Zhou 2016), at the layer's own resolution."""
    net = conv_bn().eval()
    x, _, y = batch(n=6)
    with torch.no_grad():
        acts = net[:6](x)  # act2, 4×4
        logits = net(x)
    target = logits.scatter(1, y[:, None], -torch.inf).argmax(1)
    large = torch.nn.functional.interpolate(acts, (8, 8), mode="bilinear", align_corners=False).double().numpy()
    weights = net.head.weight.detach().double().numpy()
    found = Supported(FGSM(Linf(0.1)), quantile=0.75).support(net, x, y)
    for i in range(6):
        expected = np.zeros((8, 8), dtype=bool)
        for c in (int(y[i]), int(target[i])):
            cam = np.tensordot(weights[c], large[i], 1)
            expected |= cam >= np.sort(cam.flatten())[48] - 1e-6
        assert np.array_equal(found[i, 0].numpy(), expected)
    share = found.float().mean((1, 2, 3))
    assert (share >= 0.25).all()
    assert (share <= 0.55).all()
    assert Supported(FGSM(Linf(0.1)), layer="act1").support(net, x, y).shape == (6, 1, 8, 8)
    assert Supported(FGSM(Linf(0.1)), quantile=0.0).support(net, x, y).all()
    assert Supported(FGSM(Linf(0.1))).support(make().eval(), x, y).any()


@pytest.mark.parametrize(
    "attack",
    [PGD(Linf(0.1), objective=Targeted(2)), CarliniWagner(objective=Targeted(2))],
    ids=lambda a: type(a).__name__,
)
def test_the_aim_of_the_attack_chooses_the_second_map(attack):
    net = conv_bn().eval()
    x, _, y = batch(n=8)
    target = (y + 2) % 5
    found = Supported(attack).support(net, x, y)
    swapped = Supported(PGD(Linf(0.1), objective=Targeted(3))).support(net, x, target)  # target + 3 = y
    assert torch.equal(found, swapped)
    assert not torch.equal(found, Supported(PGD(Linf(0.1), objective=Margin())).support(net, x, y))


@pytest.mark.parametrize("where", ["shifted", "random"])
def test_controls_have_as_many_pixels_elsewhere(where):
    net = conv_bn().eval()
    x, _, y = batch(n=8)
    cam = Supported(FGSM(Linf(0.1))).support(net, x, y)
    control = Supported(FGSM(Linf(0.1)), where=where)
    first = control.support(net, x, y)
    assert torch.equal(first, control.support(net, x, y))  # only a call of the attack moves on
    assert torch.equal(first.flatten(1).sum(1), cam.flatten(1).sum(1))
    assert not torch.equal(first, cam)
    found = control(net, x, y)
    assert torch.equal((found != x).any(1, keepdim=True) & ~first, torch.zeros_like(first))
    second = control.support(net, x, y)
    assert not torch.equal(second, first)
    control.reseed(0)
    assert torch.equal(control.support(net, x, y), first)
    assert torch.equal(control(net, x, y), found)
    assert not torch.equal(Supported(FGSM(Linf(0.1)), where=where, seed=1).support(net, x, y), first)
    if where == "shifted":
        assert any(torch.equal(first[0].roll((i, j), (-2, -1)), cam[0]) for i in range(8) for j in range(8))


ATTACKS = {
    "pgd": lambda: PGD(Linf(0.1), steps=3, restarts=2),
    "pgd-l2": lambda: PGD(L2(0.5), steps=3),
    "cw": lambda: CarliniWagner(steps=10, search_steps=3, step_size=0.1, initial_c=10.0),
    "ead": lambda: ElasticNet(steps=10, search_steps=3, initial_c=10.0),
    "group": lambda: GroupSparse(steps=10, search_steps=3, initial_c=10.0),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_not_supported_stays_as_it_is(name):
    x, _, _ = batch(n=4)
    net, y = undecided(x)
    attack = Supported(ATTACKS[name](), where="random")
    support = attack.support(net, x, y)
    found = attack(net, x, y)
    assert (found != x).any()
    assert torch.equal(torch.where(support, x, found), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantile": 1.0}, r"attack.quantile: expected a share in \[0, 1\), found 1.0"),
        ({"where": "grad"}, "attack.where: expected cam, shifted or random; found 'grad'"),
    ],
)
def test_options_that_make_no_attack(options, message):
    with pytest.raises(ValueError, match=message):
        Supported(FGSM(Linf(0.1)), **options)


def test_an_unknown_layer_is_named():
    with pytest.raises(ValueError, match=r"attack\.layer: the network has no layer 'act9'; close names: act"):
        Supported(FGSM(Linf(0.1)), layer="act9")(conv_bn(), *batch()[::2])
