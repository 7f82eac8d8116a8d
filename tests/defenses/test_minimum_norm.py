"""Minimum-norm attacks: closed forms on linear nets, the search over c, and the invariants of every attack."""

from __future__ import annotations

import pytest
import torch

from glassarmor.defenses import losses
from glassarmor.defenses.attacks.minimum_norm import Box, CarliniWagner, ElasticNet, GroupSparse
from glassarmor.defenses.attacks.objectives import CrossEntropy, Margin, Targeted
from glassarmor.defenses.threat import Linf, norms
from tests.reference import minimum_norm as reference
from tests.reference.nets import Linear, batch, conv_bn

SHAPE = (2, 4, 4)


def binary(gap: float = 1.0, n: int = 6, peak: tuple = ()):
    """A linear two-class net, images well inside [0,1] that it gets right by ``gap`` logits, and w_other − w_y.

    ``peak`` indexes weights that are tripled, so that they stand out.
    """
    net = Linear(SHAPE, 2)
    if peak:
        with torch.no_grad():
            net.head.weight.view(2, *SHAPE)[:, *peak] *= 3
    x = 0.35 + 0.3 * torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1))
    y = torch.arange(n) % 2
    weights = net.head.weight.detach()
    w = (weights[1 - y] - weights[y]).view(-1, *SHAPE)
    now = losses.margin(net(x), y).detach()
    # Along w until the margin is −gap: a small part of the distance to the box.
    return net, x + ((-gap - now) / norms(w, 2) ** 2).view(-1, 1, 1, 1) * w, y, w


ATTACKS = {
    "cw": lambda **o: CarliniWagner(**{"steps": 20, "search_steps": 4, "step_size": 0.05, "initial_c": 1.0, **o}),
    "ead": lambda **o: ElasticNet(**{"steps": 20, "search_steps": 4, "initial_c": 3.0, **o}),
    "group": lambda **o: GroupSparse(**{"steps": 20, "search_steps": 4, "initial_c": 3.0, **o}),
}


@pytest.mark.parametrize("objective", [None, Targeted(1)], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("confidence", [0.0, 2.0])
def test_carlini_wagner_finds_the_shortest_way_to_the_boundary(objective, confidence):
    net, x, y, w = binary()
    found = CarliniWagner(steps=60, search_steps=8, initial_c=0.1, confidence=confidence, objective=objective)(net, x, y)
    lead = losses.margin(net(found), y).detach()
    assert (lead > confidence).all()
    assert (lead < confidence + 0.2).all()
    shortest = (1 + confidence) / norms(w, 2)  # distance of a point to a hyperplane
    distortion = norms(found - x, 2)
    assert (distortion >= shortest * (1 - 1e-4)).all()
    assert (distortion <= shortest * 1.03).all()
    along = ((found - x) * w).flatten(1).sum(1) / (distortion * norms(w, 2))
    assert (along > 0.99).all()


@pytest.mark.long
def test_carlini_wagner_where_the_box_bites():
    """Pixels at 0 and 1 that should leave the box; the best point from a slow projection in float64."""
    net, _, y, w = binary()
    x = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(3)).round()
    y = net(x).argmax(1)
    w = torch.where((y == 0).view(-1, 1, 1, 1), 1, -1) * (net.head.weight[1] - net.head.weight[0]).detach().view(1, *SHAPE)
    shortest = reference.shortest_in_box(x.flatten(1), w.flatten(1), -losses.margin(net(x), y).detach())
    found = CarliniWagner(steps=200, search_steps=7, step_size=0.02, initial_c=0.1)(net, x, y)
    possible = shortest.isfinite()
    assert possible.sum() >= 4
    assert (norms(found - x, 2)[possible] >= shortest[possible] * (1 - 1e-4)).all()
    assert (norms(found - x, 2)[possible] <= shortest[possible] * 1.06).all()
    assert torch.equal(found[~possible], x[~possible])


@pytest.mark.parametrize("rule", ["L1", "EN"])
def test_elastic_net_with_a_large_beta_moves_the_one_strongest_pixel(rule):
    net, x, y, w = binary(gap=0.5, peak=(1, 2, 3))
    found = ElasticNet(beta=5.0, rule=rule, steps=100, initial_c=0.1)(net, x, y)
    delta = (found - x).flatten(1)
    assert ((delta != 0).sum(1) == 1).all()
    assert torch.equal(delta.abs().argmax(1), w.flatten(1).abs().argmax(1))
    least = 0.5 / norms(w, torch.inf)  # the L1 distance to a hyperplane
    assert (norms(found - x, 1) >= least * (1 - 1e-4)).all()
    assert (norms(found - x, 1) <= least * 1.05).all()


def test_elastic_net_without_beta_is_the_shortest_way():
    net, x, y, w = binary()
    attack = ElasticNet(beta=0.0, steps=150, search_steps=10, initial_c=0.01)
    found = attack(net, x, y)
    assert attack.distortion(x, found).shape == (6,)
    assert (norms(found - x, 2) <= 1.03 / norms(w, 2)).all()


def test_elastic_net_finds_the_closed_form_in_between():
    """On a linear net: δ = soft(λ w, β)/2 with the multiplier λ that just reaches the boundary."""
    net, x, y, w = binary()
    beta = 0.3
    best = reference.elastic_net(w.flatten(1), gap=1.0, beta=beta)
    assert 0.1 < (best == 0).float().mean() < 0.9
    found = (ElasticNet(beta=beta, steps=300, initial_c=0.01)(net, x, y) - x).flatten(1)

    def size(delta):
        return delta.square().sum(1) + beta * delta.abs().sum(1)

    assert (size(found) >= size(best) * (1 - 1e-4)).all()
    assert (size(found) <= size(best) * 1.03).all()


@pytest.mark.parametrize("refine", [False, True])
def test_group_sparse_with_a_large_tau_moves_the_one_strongest_cell(refine):
    net, x, y, w = binary(gap=0.5, peak=(slice(None), slice(2, 4), slice(0, 2)))
    found = GroupSparse(tau=5.0, refine=refine, steps=100, initial_c=0.1)(net, x, y)
    cells = w.view(6, 2, 2, 2, 2, 2).square().sum((1, 3, 5)).sqrt().flatten(1)  # (N, rows, columns) of 2×2 pixels
    moved = (found - x).view(6, 2, 2, 2, 2, 2).square().sum((1, 3, 5)).sqrt().flatten(1)
    assert ((moved > 0).sum(1) == 1).all()
    assert torch.equal(moved.argmax(1), cells.argmax(1))
    shortest = 0.5 / cells.amax(1)
    assert (norms(found - x, 2) >= shortest * (1 - 1e-4)).all()
    assert (norms(found - x, 2) <= shortest * 1.05).all()


def test_refining_keeps_the_cells_and_never_lengthens():
    net = conv_bn().eval()
    x, _, _ = batch(n=4)
    y = net(x).argmax(1)
    plain, refined = (ATTACKS["group"](refine=r, steps=30)(net, x, y) for r in (False, True))
    attack = GroupSparse()
    before, after = attack._group_norms(plain - x), attack._group_norms(refined - x)
    assert (before > 0).any()
    assert ((after > 0) <= (before > 0)).all()
    assert (norms(refined - x, 2) <= norms(plain - x, 2)).all()
    assert (norms(refined - x, 2) < norms(plain - x, 2)).any()
    assert torch.equal(net(refined).argmax(1) != y, net(plain).argmax(1) != y)


@pytest.mark.parametrize(("size", "cell", "side"), [(8, None, 2), (7, None, 2), (7, 3, 3), (4, 9, 9), (33, None, 13)])
def test_groups_are_cells_of_the_grid_cut_off_at_the_border(size, cell, side):
    delta = torch.randn(2, 3, size, size + 1)
    attack = GroupSparse(cell=cell)
    found = attack._group_norms(delta)
    expected = reference.group_norms(delta, side)
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-5, atol=1e-6)
    spread = attack._spread(found, delta)[:, 0]
    for i in range(size):
        for j in range(size + 1):
            assert torch.equal(spread[:, i, j], found[:, 0, i // side, j // side])


@pytest.mark.parametrize("name", ATTACKS)
def test_the_whole_box_is_declared(name):
    threat = ATTACKS[name]().threat
    assert isinstance(threat, Box)
    assert repr(threat) == "[0,1]"


@pytest.mark.parametrize("name", ["ead", "group"])
def test_a_cap_on_pixels_is_kept_and_declared(name):
    net = conv_bn().eval()
    x, _, _ = batch(n=4)
    y = net(x).argmax(1)
    free, capped = ATTACKS[name](), ATTACKS[name](eps="8/255")
    assert norms(free(net, x, y) - x, torch.inf).max() > 0.04
    assert isinstance(capped.threat, Linf)
    assert capped.threat.eps == 8 / 255
    assert norms(capped(net, x, y) - x, torch.inf).max() <= 8 / 255 + 1e-6


@pytest.mark.parametrize("name", ATTACKS)
def test_what_cannot_or_need_not_be_attacked_is_returned_clean(name):
    net, x, y, _ = binary()
    attack = ATTACKS[name]
    assert torch.equal(attack()(net, x, 1 - y), x)  # wrong from the start
    assert torch.equal(attack(confidence=1e6)(net, x, y), x)  # out of reach


@pytest.mark.parametrize("name", ATTACKS)
def test_targeted_reaches_its_target(name):
    net = conv_bn().eval()
    x, _, _ = batch(n=4)
    y = net(x).argmax(1)
    found = ATTACKS[name](objective=Targeted(2), steps=30)(net, x, y)
    moved = (found != x).flatten(1).any(1)
    assert moved.float().mean() >= 0.5
    assert torch.equal(net(found).argmax(1)[moved], ((y + 2) % 5)[moved])


@pytest.mark.parametrize("name", ATTACKS)
def test_more_search_never_hurts(name):
    """The best success of each sample is kept; beyond that only the shortening at the end differs."""
    net = conv_bn().eval()
    x, _, _ = batch(n=4)
    y = net(x).argmax(1)
    options = {"refine": False} if name == "group" else {}
    few, many = (ATTACKS[name](search_steps=n, abort_early=False, **options) for n in (3, 6))
    found = [a(net, x, y) for a in (few, many)]
    short, long = (torch.where(net(f).argmax(1) != y, few._size(f - x), torch.inf) for f in found)
    assert (long <= short * 1.01).all()
    assert (long < short).any()


def test_early_abort_saves_forwards_and_little_else():
    net, x, y, _ = binary()
    calls: list[int] = []
    net.register_forward_hook(lambda *_: calls.append(1))
    patient, hasty = (CarliniWagner(steps=60, search_steps=5, initial_c=1e-3, abort_early=a) for a in (False, True))
    slow = norms(patient(net, x, y) - x, 2)
    full = len(calls)
    assert full == 60 * 5 + 9
    quick = norms(hasty(net, x, y) - x, 2)
    assert len(calls) - full < 0.9 * full
    assert (quick <= slow * 1.05).all()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (CarliniWagner, {"steps": 0}, "attack.steps: expected a whole number >= 1, found 0"),
        (CarliniWagner, {"confidence": -1.0}, "attack.confidence: expected a finite number >= 0"),
        (CarliniWagner, {"objective": CrossEntropy()}, "attack.objective: expected Margin or Targeted.*CrossEntropy"),
        (ElasticNet, {"beta": -1.0}, "attack.beta: expected a finite number >= 0, found -1"),
        (ElasticNet, {"rule": "L2"}, "attack.rule: expected L1 or EN, found 'L2'"),
        (ElasticNet, {"eps": 8}, "did you mean '8.0/255'"),
        (GroupSparse, {"tau": -1.0}, "attack.tau: expected a finite number >= 0"),
        (GroupSparse, {"cell": 0}, "attack.cell: expected null or a whole number >= 1, found 0"),
    ],
)
def test_options_that_make_no_attack(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_margin_is_the_default_objective():
    assert isinstance(CarliniWagner().objective, Margin)
