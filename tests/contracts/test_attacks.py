"""What every attack keeps, whatever it climbs: one row an attack."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from glassarmor import defenses
from glassarmor.defenses import (
    APGD,
    APGDT,
    FGSM,
    FGSMRS,
    L2,
    NFGSM,
    PGD,
    PSE,
    AdaptivePGD,
    Attack,
    CAMDiscrepancy,
    CarliniWagner,
    ElasticNet,
    FelledExamples,
    Free,
    GroupSparse,
    KLToClean,
    Linf,
    Margin,
    NuclearCE,
    Replay,
    Square,
    Supported,
    Targeted,
    Threat,
    TradesKL,
    UnitSensitivity,
)
from glassarmor.defenses.attacks.autoattack import AutoAttackPart
from glassarmor.defenses.evaluation.suite import Transfer
from tests.composing import config, options
from tests.reference.minimum_norm import undecided
from tests.reference.nets import conv_bn, seeded, unchanged, untidy


class Row(NamedTuple):
    make: Callable[[Threat, int], Attack]  # from a ball and a seed
    own_ball: bool = False  # minimum-norm attacks declare theirs
    draws: bool = True  # random numbers, which then belong to the seed and to the number of the call
    graph: bool = False  # its images stay in the graph
    moves: bool = True  # whatever the net


def terms(name: str) -> dict[str, nn.Module]:
    known = {
        "pse": PSE(),
        "sensitivity": UnitSensitivity(layers=["act1", "act2"]),
        "cam": CAMDiscrepancy(),
        "kl": TradesKL(),
    }
    return {name: known[name]}


def replay(threat: Threat, seed: int) -> Attack:
    return Replay(FelledExamples(4), torch.arange(6), PGD(threat, 3, seed=seed))


def minimum(make: Callable[[Threat, int], Attack]) -> Row:
    return Row(make, own_ball=True, draws=False, moves=False)


QUICK = {"steps": 6, "search_steps": 2, "initial_c": 10.0}
ATTACKS: dict[str, Row] = {
    "PGD": Row(lambda ball, seed: PGD(ball, 3, seed=seed)),
    "PGD, restarts": Row(lambda ball, seed: PGD(ball, 2, restarts=2, seed=seed)),
    "PGD, from the image": Row(lambda ball, seed: PGD(ball, 3, start="none", seed=seed), draws=False),
    "PGD, TRADES": Row(lambda ball, seed: PGD(ball, 3, start="gaussian", objective=KLToClean(), seed=seed)),
    "PGD, NuAT": Row(lambda ball, seed: PGD(ball, 1, start="bernoulli", objective=NuclearCE(), seed=seed)),
    "PGD, margin": Row(lambda ball, seed: PGD(ball, 3, objective=Margin(), seed=seed)),
    "PGD, targeted": Row(lambda ball, seed: PGD(ball, 3, objective=Targeted(1), seed=seed)),
    "FGSM": Row(lambda ball, seed: FGSM(ball, seed=seed), draws=False),
    "FGSM-RS": Row(lambda ball, seed: FGSMRS(ball, seed=seed)),
    "N-FGSM": Row(lambda ball, seed: NFGSM(ball, seed=seed)),
    "APGD": Row(lambda ball, seed: APGD(ball, 5, seed=seed)),
    "APGD, restarts": Row(lambda ball, seed: APGD(ball, 3, 2, seed=seed)),
    "APGD-T": Row(lambda ball, seed: APGDT(ball, 3, 2, seed=seed)),
    "Square": Row(lambda ball, seed: Square(ball, queries=20, seed=seed)),
    "Carlini-Wagner": minimum(lambda ball, seed: CarliniWagner(**QUICK, step_size=0.1)),
    "elastic net": minimum(lambda ball, seed: ElasticNet(**QUICK)),
    "elastic net, capped": minimum(lambda ball, seed: ElasticNet(**QUICK, eps="8/255")),
    "group-sparse": minimum(lambda ball, seed: GroupSparse(**QUICK)),
    "group-sparse, capped": minimum(lambda ball, seed: GroupSparse(**QUICK, eps="8/255")),
    **{
        f"adaptive, {name}": Row(
            lambda ball, seed, name=name: AdaptivePGD(ball, terms(name), 2.0, steps=2, restarts=2, seed=seed)
        )
        for name in ("pse", "sensitivity", "cam", "kl")
    },
    "supported PGD": Row(lambda ball, seed: Supported(PGD(ball, 3, seed=seed))),
    "supported PGD, random place": Row(lambda ball, seed: Supported(PGD(ball, 3, seed=seed), where="random", seed=seed)),
    "supported Carlini-Wagner": minimum(lambda ball, seed: Supported(CarliniWagner(**QUICK))),
    "supported group-sparse": minimum(lambda ball, seed: Supported(GroupSparse(**QUICK))),
    "Free-AT": Row(lambda ball, seed: Free(ball), draws=False, graph=True, moves=False),
    "replay": Row(replay),
    "transfer": Row(lambda ball, seed: Transfer(conv_bn(seed=1).eval(), PGD(ball, 3, seed=seed))),
    "AutoAttack's APGD": Row(lambda ball, seed: AutoAttackPart(ball, "apgd-ce", seed=seed), moves=False),
    "AutoAttack's Square": Row(lambda ball, seed: AutoAttackPart(ball, "square", 20, seed=seed), moves=False),
}
BALLS = (Linf(0.1), L2(0.5))
each = pytest.mark.parametrize("name", ATTACKS)


def test_every_public_attack_has_a_row() -> None:
    public = {getattr(defenses, name) for name in defenses.__all__}
    classes = {
        found
        for found in public
        if inspect.isclass(found) and found is not Attack and callable(getattr(found, "reseed", None))
        if not issubclass(found, defenses.Term)
    }
    made = {type(row.make(BALLS[0], 0)) for row in ATTACKS.values()}
    assert {found.__name__ for found in classes} <= {found.__name__ for found in made}


def case() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """An untidy net that is nearly undecided; images with many pixels on the edge of the box, and its predictions."""
    x = torch.rand(6, 3, 8, 8, generator=seeded(0)).round(decimals=1)
    net, y = undecided(x)
    return untidy(net), x, y


@pytest.mark.parametrize(
    ("name", "ball"),
    [(name, ball) for name, row in ATTACKS.items() for ball in (BALLS[:1] if row.own_ball else (*BALLS, Linf(0), Linf(1)))],
    ids=str,
)
def test_images_lie_in_the_ball_and_the_box_and_the_net_and_all_generators_are_as_they_were(name: str, ball: Threat) -> None:
    """Invariants 1 and 4; fp32, detached, in memory of their own."""
    row = ATTACKS[name]
    attack = row.make(ball, 0)
    net, x, y = case()
    images, labels = x.clone(), y.clone()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    with unchanged(net):
        found = attack(net, x, y)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    assert torch.equal(x, images)
    assert torch.equal(y, labels)
    assert found.dtype == torch.float32
    assert found.requires_grad == row.graph
    assert not torch.is_inference(found)
    assert found.data_ptr() != x.data_ptr()
    found = found.detach()
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    distance = attack.threat.distance(x.double(), found.double())
    assert (distance <= attack.threat.eps + 1e-6).all()
    if ball.eps == 0 and attack.threat.eps == 0:
        assert torch.equal(found, x)
    elif row.moves:
        assert (distance > 0).all()


@each
def test_the_random_numbers_belong_to_the_seed_and_the_call(name: str) -> None:
    row = ATTACKS[name]
    net, x, y = case()
    attack = row.make(BALLS[0], 5)
    first, second = (attack(net, x, y).detach() for _ in range(2))
    torch.manual_seed(99)
    torch.rand(7)
    again = row.make(BALLS[0], 5)
    again.reseed(1)
    assert torch.equal(again(net, x, y), second), "call 1, whatever was drawn before and without call 0"
    again.reseed(0)
    assert torch.equal(again(net, x, y), first)
    if row.draws and row.moves:
        assert not torch.equal(first, second)
        assert not torch.equal(row.make(BALLS[0], 6)(net, x, y), first)
    elif not row.draws:
        assert torch.equal(first, second)


@pytest.mark.long
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@each
def test_the_images_are_the_same_without_gradients_and_in_inference_mode(name: str, context: type) -> None:
    row = ATTACKS[name]
    net, x, y = case()
    expected, attack = row.make(BALLS[0], 0)(net, x, y), row.make(BALLS[0], 0)
    with context():
        images, labels = x * 1, y * 1  # tensors made in here
        with unchanged(net):
            found = attack(net, images, labels)
        assert torch.equal(found, expected)
        assert row.graph or not torch.is_inference(found)


# Free moves a perturbation that it keeps, and Transfer attacks another net: neither runs the one that it is given.
RUNS_THE_NET = [name for name, row in ATTACKS.items() if not isinstance(row.make(BALLS[0], 0), Free | Transfer)]


@pytest.mark.parametrize("name", RUNS_THE_NET)
def test_the_net_is_given_back_when_the_attack_fails(name: str) -> None:
    net, _, y = case()
    attack = ATTACKS[name].make(BALLS[0], 0)
    with unchanged(net), pytest.raises(ValueError, match="expected one that runs in eval mode"):
        attack(net, torch.rand(6, 7, 8, 8), y)


@pytest.mark.parametrize("name", options("attack"))
def test_every_attack_in_yaml_runs(name: str) -> None:
    """Composed as on the command line; shortened, for defaults are for real work."""
    cfg = config(f"+attack={name}")
    for part in (cfg.attack, cfg.attack.get("attack", {})):
        for key in {"steps", "search_steps", "queries"} & set(part):
            part[key] = 3
    attack = instantiate(cfg.attack, _convert_="all")
    net, x, y = case()
    found = attack(net.eval(), x, y)
    assert (attack.threat.distance(x, found) <= attack.threat.eps + 1e-6).all()
