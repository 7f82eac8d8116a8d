"""The attack that knows the defense: plain PGD without terms, true gradients with them, and it gets what it climbs."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from glassarmor.defenses import losses
from glassarmor.defenses.attacks.objectives import CrossEntropy, KLToClean, Margin, Targeted
from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.attacks.supported import Supported
from glassarmor.defenses.evaluation.accuracy import accuracy_under
from glassarmor.defenses.evaluation.adaptive import AdaptivePGD
from glassarmor.defenses.threat import Linf
from glassarmor.defenses.training.defense import Defense
from glassarmor.defenses.training.regularizers import PSE, CAMDiscrepancy, UnitSensitivity
from glassarmor.defenses.training.terms import AdversarialCE, Ramp, Term, TradesKL
from glassarmor.interpret.modes import undisturbed
from glassarmor.interpret.observation import observe
from glassarmor.lightning_modules.commands import train
from tests.composing import SMALL, config
from tests.reference.nets import batch, conv_bn, seeded, smooth
from tests.reference.trained import attacked

TERMS = {
    "pse": lambda weight=1.0: PSE(weight),
    "sensitivity": lambda weight=1.0: UnitSensitivity(weight, layers=["act1", "act2"]),
    "cam": lambda weight=1.0: CAMDiscrepancy(weight),
    "kl": lambda weight=1.0: TradesKL(weight),
}


def measured(term: Term, net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Value of a term that reads act2, and for the sensitivity act1 too, (N,)."""
    obs = observe(net, x, x_adv, y, target=target, layers=["act1", "act2"], create_graph=True)
    term.prepare(obs, ("act1", "act2"))
    return term.eval()(obs)


@pytest.mark.parametrize("options", [{}, {"restarts": 3}, {"objective": Margin()}, {"objective": KLToClean()}])
@pytest.mark.parametrize(("terms", "weight"), [({"pse": PSE()}, 0.0), ({"pse": PSE(0.0)}, 1.0), ({}, -1.0)])
def test_without_weight_it_is_pgd_bit_for_bit(options, terms, weight):
    net = conv_bn()
    x, _, y = batch(n=8)
    known = AdaptivePGD(Linf(0.05), terms, weight, steps=3, seed=2, **options)
    assert torch.equal(known(net, x, y), PGD(Linf(0.05), steps=3, seed=2, **options)(net, x, y))


@pytest.mark.parametrize("objective", [CrossEntropy(), KLToClean(), Targeted(1)], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("weight", [0.7, -0.4])
@pytest.mark.parametrize("name", TERMS)
def test_what_it_climbs_and_in_which_direction(name, weight, objective, double_precision):
    """The value is J + weight · w · term, and its gradient in x' equals central differences, slopes included."""
    net = smooth().eval()
    x, x_adv = (torch.rand(3, 2, 6, 6, generator=seeded(i), dtype=torch.float64) for i in (1, 2))
    y = torch.tensor([0, 1, 2])
    attack = AdaptivePGD(Linf(0.1), {name: TERMS[name](0.5)}, weight, objective=objective)
    with undisturbed(net):
        value = attack._value(net, x, y)
        target = objective.target(y, 3) if isinstance(objective, Targeted) else None
        term = measured(TERMS[name](), net, x, x_adv, y, target)
        expected = objective(net(x_adv), y, net(x)) + weight * 0.5 * term
        torch.testing.assert_close(value(x_adv)[1], expected)
        torch.testing.assert_close(value(x_adv)[0], net(x_adv))
        image = x_adv.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(image)[1].sum(), image)
        direction = torch.randn(x.shape, generator=seeded(4), dtype=x.dtype)
        with torch.no_grad():  # as a score asks for it
            ends = [float(value(x_adv + sign * 1e-6 * direction)[1].detach().sum()) for sign in (1, -1)]
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-8)
    assert abs(ends[0] - ends[1]) > 1e-9


@pytest.mark.parametrize(
    ("name", "eps", "weight"), [("pse", 0.02, 3), ("sensitivity", 0.05, 20), ("cam", 0.02, 0.1), ("kl", 0.02, 3)]
)
def test_it_raises_or_hides_what_the_defense_watches(name, eps, weight):
    """Against plain PGD of the same start and steps.  Raising gains little here: whatever fools the net moves the terms."""
    net, x, _, y, _ = attacked(n=32)
    values = {}
    for sign in (-1, 0, 1):
        found = AdaptivePGD(Linf(eps), {name: TERMS[name]()}, sign * weight)(net, x, y)
        values[sign] = float(measured(TERMS[name](), net, x, found, y).detach().mean())
    assert values[-1] < 0.9 * values[0]
    assert values[1] > values[0]


def test_in_closed_form_it_moves_what_plain_pgd_does_not_see():
    """The head reads the first of two units; the second is moved by ε at every pixel, or kept within a step of nothing."""
    net = nn.Sequential(
        OrderedDict(units=nn.Identity(), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=nn.Linear(2, 2))
    )
    with torch.no_grad():
        net.head.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    x, y = torch.rand(6, 2, 4, 4, generator=seeded()) * 0.6 + 0.2, torch.zeros(6, dtype=torch.long)
    moved = {}
    for weight in (-1.0, 0.0, 1.0):
        attack = AdaptivePGD(Linf(0.1), {"s": UnitSensitivity(0.01, layers=["units"])}, weight, steps=10)
        delta = (attack(net, x, y) - x).abs()
        torch.testing.assert_close(delta[:, 0], torch.full((6, 4, 4), 0.1))
        moved[weight] = delta[:, 1]
    torch.testing.assert_close(moved[1.0], torch.full((6, 4, 4), 0.1))
    assert moved[-1.0].max() <= attack.step_size + 1e-6
    assert moved[0.0].min() < 0.01 < 0.04 < moved[0.0].mean() < 0.06  # left where the random start put it


def test_restarts_are_judged_by_what_is_climbed():
    net, x, _, y, _ = attacked(n=16)
    attacks = [AdaptivePGD(Linf(0.01), {"pse": PSE()}, 5.0, steps=2, restarts=r, seed=5) for r in (1, 4)]
    with undisturbed(net):
        value = attacks[0]._value(net, x, y)
        scores = [attack._score(value, attack(net, x, y), y) for attack in attacks]
    assert (scores[1] >= scores[0] - 1e-6).all()
    assert (scores[1] > scores[0]).any()


def test_the_terms_of_a_defense_stay_its_own_and_bring_their_estimates():
    net, x, x_adv, y, _ = attacked(n=16)
    term = UnitSensitivity(1.0)
    defense = Defense(PGD(Linf(0.05), 2), {"ce": AdversarialCE()}, {"s": term})
    defense(net, x, y)
    defense.end_epoch()
    before = {name: value.clone() for name, value in term.state_dict().items()}
    attack = AdaptivePGD(Linf(0.05), {"s": term}, 1.0, steps=2)
    attack(net, x, y)
    assert term.training
    assert all(torch.equal(value, before[name]) for name, value in term.state_dict().items())
    obs = observe(net, x, x_adv, y, layers=["act1", "act2"])
    with undisturbed(net), torch.no_grad():
        logits, found = attack._value(net, x, y)(x_adv)
        torch.testing.assert_close(found - losses.cross_entropy(logits, y), term.eval()(obs).detach())
        fresh = AdaptivePGD(Linf(0.05), {"s": UnitSensitivity(1.0)})._value(net, x, y)(x_adv)[1]
    assert not torch.allclose(fresh, found)


@pytest.mark.parametrize(
    ("terms", "clean", "chosen"), [({}, 0, 0), ({"pse": PSE()}, 1, 1), ({"p": PSE(layers="act1")}, 1, 0)]
)
@pytest.mark.parametrize("restarts", [1, 2])
def test_budget_of_forwards(terms, clean, chosen, restarts):
    net = conv_bn()
    samples = []
    net.register_forward_pre_hook(lambda _m, inputs: samples.append(len(inputs[0])))
    x, _, y = batch(n=4)
    AdaptivePGD(Linf(0.05), terms, steps=3, restarts=restarts)(net, x, y)
    scores = restarts if restarts > 1 else 0
    learned = 3 * bool(terms)  # once: which axis of each layer is what
    assert sum(samples) == 4 * (3 * restarts + scores + clean + chosen) + learned


def test_a_ramp_counts_as_it_ends_and_a_support_holds_it():
    net, x, _, y, _ = attacked(n=8)
    ramped = AdaptivePGD(Linf(0.05), {"pse": PSE(Ramp(0, 0.5, epochs=9, delay=3))}, 2.0, steps=3)
    assert ramped.weights == {"pse": 1.0}
    assert torch.equal(ramped(net, x, y), AdaptivePGD(Linf(0.05), {"pse": PSE(1.0)}, 1.0, steps=3)(net, x, y))
    supported = Supported(ramped)
    support = supported.support(net, x, y)
    assert torch.equal(supported(net, x, y)[~support.expand_as(x)], x[~support.expand_as(x)])


def test_errors():
    for weight in (float("nan"), float("inf"), "1"):
        with pytest.raises(ValueError, match=r"attack\.weight: expected a finite number"):
            AdaptivePGD(Linf(0.1), {}, weight)
    x, _, y = batch(n=2)
    with pytest.raises(ValueError, match=r"attack\.terms\.pse\.layers: the network has no layer 'act3'"):
        AdaptivePGD(Linf(0.1), {"pse": PSE(layers=["act3"])})(conv_bn(), x, y)


@pytest.mark.parametrize("regularizers", ["[]", "[pse,sensitivity]", "[cam_discrepancy]"])
def test_the_final_table_takes_it_with_the_regularizers_of_the_run(regularizers):
    cfg = config(
        *SMALL, f"regularizers={regularizers}", "+attack@test_attacks.adaptive=adaptive_pgd", "test_attacks.adaptive.steps=2"
    )
    parts = train.build(cfg)
    attack = instantiate(cfg.test_attacks, _convert_="all")["adaptive"]
    assert "[" + ",".join(attack.terms) + "]" == regularizers
    batches = [tuple(parts.data.probe(8).__dict__[key] for key in ("x", "y"))]
    found = accuracy_under(parts.module.net, batches, {"adaptive": attack}, torch.device("cpu"))
    assert set(found) == {"clean", "adaptive"}
