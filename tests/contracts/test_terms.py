"""What every term of a loss keeps, whatever it measures: one row a term, and one more an option that changes its formula."""

from __future__ import annotations

import inspect
import itertools
import random
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch

from glassarmor import defenses
from glassarmor.defenses import (
    PSE,
    AdversarialCE,
    AuxiliaryCE,
    CAMDiscrepancy,
    CleanCE,
    FeatureConsistency,
    GradAlign,
    GradientNorm,
    Linf,
    LocalLinearity,
    LogitPairing,
    MartBCE,
    MartKL,
    NuclearNorm,
    Term,
    TradesKL,
    UnitKL,
    UnitSensitivity,
)
from glassarmor.interpret.modes import buffers_kept
from glassarmor.interpret.observation import Observation, observe
from tests.composing import CONFIGS, options
from tests.reference import differences
from tests.reference.nets import batch, conv_bn, unchanged, untidy

LAYERS = ("act1", "act2")
BALL = Linf(0.05)


class Row(NamedTuple):
    make: Callable[[], Term]
    zero: bool = True  # without an attack: it compares x and x'
    modes: tuple[str, ...] = differences.MODES  # in which its gradient is that of its value
    layers: tuple[str, ...] = LAYERS  # recorded for it


TERMS: dict[str, Row] = {
    **{
        f"pse {over} {power} {top} {scale}": Row(lambda o=over, p=power, t=top, s=scale: PSE(1.0, LAYERS, o, p, t, s))
        for over, power, top, scale in itertools.product(
            ("units", "positions", "both"), (1, 2), (1.0, 0.3), ("share", "none")
        )
    },
    "pse margin": Row(lambda: PSE(1.0, LAYERS, scale="margin"), modes=()),  # the margin is held fixed
    "pse logits": Row(lambda: PSE(1.0, LAYERS, scale="logits")),
    "pse activations": Row(lambda: PSE(1.0, LAYERS, "activations", 2)),  # squared: one of so many sits at the relu's kink
    "pse apart, held": Row(lambda: PSE(1.0, LAYERS, promotion=0.3, suppression=2.0, samples="held")),
    "unit kl": Row(lambda: UnitKL(1.0, LAYERS)),
    "sensitivity": Row(lambda: UnitSensitivity(layers=LAYERS)),
    "sensitivity above noise": Row(lambda: UnitSensitivity(layers=LAYERS, noise_corrected=True)),
    "sensitivity turning": Row(lambda: UnitSensitivity(layers=LAYERS, at="turning")),
    **{
        f"cam {classes} {scale}": Row(lambda k=classes, s=scale: CAMDiscrepancy(1.0, LAYERS, k, s))
        for classes, scale in itertools.product((1, 9), ("none", "share"))
    },
    "consistency": Row(lambda: FeatureConsistency(layers=LAYERS)),
    "trades": Row(TradesKL),
    "mart kl": Row(MartKL),
    "pairing": Row(LogitPairing),
    "nuclear": Row(NuclearNorm),
    "adversarial ce": Row(AdversarialCE, zero=False),
    "clean ce": Row(CleanCE, zero=False),
    "mart bce": Row(MartBCE, zero=False),
    "auxiliary": Row(lambda: AuxiliaryCE(layers=["head"]), zero=False, layers=("act1", "act2", "head")),
    "grad align": Row(lambda: GradAlign(BALL), zero=False),
    "local linearity": Row(lambda: LocalLinearity(BALL)),
    "gradient norm": Row(GradientNorm, zero=False),
}
each = pytest.mark.parametrize("name", TERMS)


def test_every_public_term_and_every_yaml_has_a_row() -> None:
    made = {type(row.make()).__name__ for row in TERMS.values()}
    public = [getattr(defenses, name) for name in defenses.__all__]
    assert {c.__name__ for c in public if inspect.isclass(c) and issubclass(c, Term) and c is not Term} == made
    for name in options("regularizers"):
        text = (CONFIGS / f"regularizers/{name}.yaml").read_text()
        targets = re.findall(r"^ *_target_: glassarmor\.defenses\.(\w+)", text, re.M)
        assert set(targets) & made, name


def prepared(term: Term, obs: Observation) -> Term:
    term.prepare(obs, LAYERS)
    return term


@pytest.mark.parametrize(("mode", "name"), [(mode, name) for name, row in TERMS.items() for mode in row.modes])
def test_the_gradient_is_that_of_the_value(mode: str, name: str, double_precision: None) -> None:
    """In eval mode, in a joined train-mode pass and with shared statistics; by central differences in float64."""
    row = TERMS[name]
    net, make = differences.setting(mode, layers=row.layers)
    term = prepared(row.make(), make())
    if isinstance(term, UnitSensitivity):
        term(make())
        term.end_epoch()  # weights that are not all one; no gradient goes through them
        if term.turning is not None:
            term.turning.share.copy_(torch.tensor([0.4, 1.6]))

    def value() -> torch.Tensor:
        term.reseed(5)
        with buffers_kept(net):  # running statistics move with the weights; terms with passes of their own read them
            obs = make()
        return differences.weighted(term(obs))

    differences.check(net, value)


@each
def test_values_are_finite_one_a_sample_and_zero_without_an_attack_where_x_is_compared_with_itself(name: str) -> None:
    row = TERMS[name]
    net = conv_bn().train()
    x, x_adv, y = batch(eps=0.3)
    for images in (x_adv, x.clone()):
        obs = observe(net, x, images, y, layers=row.layers, joined=True, create_graph=True)
        term = prepared(row.make(), obs)
        term.reseed(3)
        value = term(obs)
        assert value.shape == (() if isinstance(term, NuclearNorm) else (len(x),))
        assert value.isfinite().all()
        if images is x_adv and getattr(term, "samples", "all") == "all":
            assert value.detach().abs().max() > 1e-6
        net.zero_grad()
        value.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    if row.zero:
        assert value.detach().abs().max() < 1e-4


@each
def test_the_net_and_all_generators_are_as_they_were_and_the_same_step_says_the_same(name: str) -> None:
    row = TERMS[name]
    net = conv_bn(dropout=0.3).eval()
    x, x_adv, y = batch()
    obs = observe(net, x, x_adv, y, layers=row.layers, create_graph=True)
    term = prepared(row.make(), obs).eval()
    untidy(net)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    values = []
    with unchanged(net):
        for _ in range(2):
            term.reseed(7)
            values.append(term(obs).detach())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    assert torch.equal(*values)
