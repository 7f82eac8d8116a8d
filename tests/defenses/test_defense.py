"""A defense: its passes are budgeted, weight 0 is absence (invariant 2), ramps stay warm, errors come before training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from glassarmor.defenses.attacks.objectives import KLToClean, NuclearCE
from glassarmor.defenses.attacks.pgd import FGSMRS, NFGSM, PGD
from glassarmor.defenses.threat import Linf
from glassarmor.defenses.training.defense import Defense
from glassarmor.defenses.training.regularizers import PSE, CAMDiscrepancy, UnitSensitivity
from glassarmor.defenses.training.terms import (
    AdversarialCE,
    CleanCE,
    LogitPairing,
    MartBCE,
    MartKL,
    NuclearNorm,
    Ramp,
    TradesKL,
)
from glassarmor.interpret.observation import observe
from tests.reference.nets import Linear, Residual, batch, conv_bn, unchanged, untidy

STEPS = 3
BALL = Linf(0.05)
# Each: attack and base loss, made anew; passes over the batch without and with regularisers.
DEFENSES = {
    "none": (lambda: (None, {"ce": CleanCE()}), 1, None),
    "pgd_at": (lambda: (PGD(BALL, STEPS), {"ce": AdversarialCE()}), STEPS + 1, STEPS + 2),
    "trades": (
        lambda: (PGD(BALL, STEPS, start="gaussian", objective=KLToClean()), {"ce": CleanCE(), "kl": TradesKL()}),
        STEPS + 3,
        STEPS + 3,
    ),
    "mart": (lambda: (PGD(BALL, STEPS), {"bce": MartBCE(), "kl": MartKL()}), STEPS + 2, STEPS + 2),
    "alp": (lambda: (PGD(BALL, STEPS), {"ce": AdversarialCE(), "pairing": LogitPairing()}), STEPS + 2, STEPS + 2),
    "nuat": (
        lambda: (PGD(BALL, STEPS, start="bernoulli", objective=NuclearCE()), {"ce": CleanCE(), "nuclear": NuclearNorm()}),
        STEPS + 3,
        STEPS + 3,
    ),
    "fgsm_rs": (lambda: (FGSMRS(BALL), {"ce": AdversarialCE()}), 2, 3),
    "n_fgsm": (lambda: (NFGSM(BALL), {"ce": AdversarialCE()}), 2, 3),
}
REGULARIZERS = {
    "": dict,
    "pse": lambda: {"pse": PSE(0.5)},
    "sensitivity": lambda: {"sensitivity": UnitSensitivity(0.1)},
    "cam": lambda: {"cam": CAMDiscrepancy(0.01)},
    "pse+sensitivity": lambda: {"pse": PSE(0.5), "sensitivity": UnitSensitivity(0.1)},
}
ROBUST = [name for name in DEFENSES if name != "none"]
# Without an attack there is nothing for a regulariser to compare: refused, tested below.
PAIRS = [("none", ""), *((name, regularizers) for name in ROBUST for regularizers in REGULARIZERS)]


def compose(name: str, regularizers: dict | None = None, net: nn.Module | None = None) -> Defense:
    attack, loss = DEFENSES[name][0]()
    defense = Defense(attack, loss, regularizers)
    if net is not None:
        x, _, y = batch(n=2)
        defense.prepare(net, x, y)
    return defense


@pytest.mark.parametrize(("name", "regularizers"), PAIRS)
def test_budget_of_forwards(name, regularizers):
    _, without, with_regularizers = DEFENSES[name]
    expected = with_regularizers if regularizers else without
    net = conv_bn().train()
    defense = compose(name, REGULARIZERS[regularizers](), net)
    samples = []
    net.register_forward_pre_hook(lambda _m, inputs: samples.append(len(inputs[0])))
    x, _, y = batch(n=4)
    output = defense(net, x, y)
    assert sum(samples) == expected * 4
    output.loss.backward()
    assert sum(samples) == expected * 4
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("regularizers", REGULARIZERS)
@pytest.mark.parametrize("name", ROBUST)
def test_loss_is_the_weighted_sum_of_the_terms_read_from_one_observation(name, regularizers):
    net = conv_bn().train()
    defense = compose(name, REGULARIZERS[regularizers](), net)
    x, _, y = batch(n=4)
    output = defense(net, x, y)
    assert list(output.terms) == list(DEFENSES[name][0]()[1]) + list(REGULARIZERS[regularizers]())
    assert defense.regularizer_names == tuple(REGULARIZERS[regularizers]())
    terms = defense.named_terms()
    total = sum(terms[n].weight_at(0) * value for n, value in output.terms.items())
    torch.testing.assert_close(output.loss.detach(), total)
    assert output.loss.requires_grad
    for n, value in output.terms.items():
        assert not value.requires_grad
        torch.testing.assert_close(terms[n].eval()(output.obs).mean().detach(), value)
    assert torch.equal(output.obs.y, y)
    distance = (output.obs.adv.x - x).abs().max()
    assert 0 < distance <= (0.15 if name == "n_fgsm" else 0.05) + 1e-6
    assert all(value.abs() > 1e-6 for value in output.terms.values())


@pytest.mark.parametrize("name", ["pgd_at", "trades"])
def test_pse_trains_the_layers_above_through_the_slope(name):
    """Its gradient reaches the head only if the observation's slopes are in the graph; terms without slopes don't pay."""
    net = conv_bn().train()
    x, _, y = batch()
    live = compose(name, {"pse": PSE(layers=["act2"], scale="none")}, net)
    value = live.named_terms()["pse"](live(net, x, y).obs).mean()
    (gradient,) = torch.autograd.grad(value, net.head.weight)
    assert gradient.abs().max() > 1e-4
    assert not compose(name, {"sensitivity": UnitSensitivity()}, net)(net, x, y).obs.create_graph


def train(name: str, regularizers: dict | None, steps: int = 3, epoch: float = 0.0, warm: bool = False):
    """Final state of a BatchNorm net with dropout after a few steps of SGD with momentum, and the defense."""
    net = conv_bn(dropout=0.2).train()
    defense = compose(name, regularizers, net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    torch.manual_seed(1)
    for step in range(steps):
        x, _, y = batch(n=6, seed=step)
        defense.at(epoch, step)
        optimizer.zero_grad()
        defense(net, x, y).loss.backward()
        optimizer.step()
    return net.state_dict(), defense


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ROBUST)
def test_weight_0_is_absence_bit_for_bit(name):
    plain, _ = train(name, None)
    zero, defense = train(name, {"pse": PSE(0.0), "sensitivity": UnitSensitivity(Ramp(0, 0, 5))})
    assert equal(plain, zero)
    assert defense.regularizer_names == ()
    live, _ = train(name, {"pse": PSE(0.5)})
    assert not equal(plain, live)


@pytest.mark.parametrize("name", ROBUST)
def test_a_ramp_that_starts_at_0_changes_no_weight_and_keeps_its_estimates_warm(name):
    plain, _ = train(name, None)
    terms = {"pse": PSE(Ramp(0, 1, epochs=2, delay=1)), "sensitivity": UnitSensitivity(Ramp(0, 1, epochs=2, delay=1))}
    ramped, defense = train(name, terms)
    assert equal(plain, ramped)
    sensitivity = defense.named_terms()["sensitivity"]
    assert sensitivity.running[0].samples == 18
    defense.end_epoch()
    assert not torch.equal(sensitivity.omega0, torch.ones_like(sensitivity.omega0))
    assert sensitivity.omega0.mean() == pytest.approx(1, rel=1e-4)
    terms = {"pse": PSE(Ramp(0, 1, epochs=2, delay=1)), "sensitivity": UnitSensitivity(Ramp(0, 1, epochs=2, delay=1))}
    assert not equal(plain, train(name, terms, epoch=2.0)[0])


@pytest.mark.parametrize("name", ["pgd_at", "trades"])
def test_a_term_still_at_weight_0_does_not_disturb_the_gradient_of_another(name):
    alone, _ = train(name, {"sensitivity": UnitSensitivity(0.5)})
    beside, _ = train(name, {"pse": PSE(Ramp(0, 1, epochs=2, delay=1)), "sensitivity": UnitSensitivity(0.5)})
    assert equal(alone, beside)


@pytest.mark.long
@pytest.mark.parametrize(("name", "regularizers"), PAIRS)
def test_the_same_step_twice_gives_the_same_weights(name, regularizers):
    first, second = (train(name, REGULARIZERS[regularizers](), steps=2)[0] for _ in range(2))
    assert equal(first, second)


def test_at_names_the_step_so_that_a_resumed_run_repeats():
    net = conv_bn().eval()
    defense = compose("pgd_at")
    x, _, y = batch()
    defense.at(0, 0)
    defense(net, x, y)
    second = defense(net, x, y).obs.adv.x
    resumed = compose("pgd_at")
    resumed.at(0, 1)
    assert torch.equal(resumed(net, x, y).obs.adv.x, second)


@pytest.mark.parametrize("name", ["pgd_at", pytest.param("trades", marks=pytest.mark.long)])
def test_regularizers_lower_what_they_measure(name):
    """A few steps on one batch with a regulariser, and the same without: its own value ends lower."""

    def value_after(term, live: bool) -> float:
        net = conv_bn().train()
        defense = compose(name, {"term": term}, net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        x, _, y = batch(n=16)
        for _ in range(20):
            defense.at(0, 0)
            output = defense(net, x, y)
            loss = output.loss if live else output.loss - term.weight * term(output.obs).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(defense(net, x, y).terms["term"])

    for make in (lambda: PSE(5.0), lambda: UnitSensitivity(5.0), lambda: CAMDiscrepancy(0.05)):
        assert value_after(make(), True) < 0.9 * value_after(make(), False)


def test_base_loss_decides_whether_the_passes_are_joined():
    net = conv_bn().train()
    x, _, y = batch()
    for name, joined in (("pgd_at", False), ("alp", True), ("trades", True), ("mart", True), ("n_fgsm", False)):
        for regularizers in REGULARIZERS.values():
            output = compose(name, regularizers(), net)(net, x, y)
            assert (output.obs.joined is not None) == joined, name


# Errors, and choosing layers, before training.


@pytest.mark.parametrize(("term", "name"), [(PSE(), "pse"), (UnitSensitivity(), "sensitivity")])
def test_a_regularizer_needs_an_attack(term, name):
    with pytest.raises(ValueError, match=rf"regularizers\.{name}: .*no attack; choose e\.g\. defense=pgd_at"):
        compose("none", {name: term})
    compose("none", {name: type(term)(0.0)})  # absent


def test_a_base_loss_that_needs_an_attack():
    with pytest.raises(ValueError, match=r"defense\.loss\.kl: compares clean and adversarial"):
        Defense(None, {"ce": CleanCE(), "kl": TradesKL()})


def test_names_must_differ_and_a_loss_is_needed():
    with pytest.raises(ValueError, match="regularizers: kl is a term of the base loss too; rename it"):
        compose("trades", {"kl": PSE()})
    for loss in ({}, {"ce": AdversarialCE(0.0)}):
        with pytest.raises(ValueError, match=r"defense\.loss: expected at least one term with a weight other than 0"):
            Defense(PGD(BALL), loss, {"pse": PSE()})


@pytest.mark.parametrize(
    ("net", "term", "message"),
    [
        (conv_bn, PSE(layers=["act3"]), r"regularizers\.r\.layers: the network has no layer 'act3'; close names: .*act2"),
        (conv_bn, UnitSensitivity(layers=["act2", "nope"]), r"regularizers\.r\.layers: the network has no layer 'nope'"),
        (lambda: Linear((3, 8, 8), 5), PSE(), r"regularizers\.r\.layers: no layer of the network can be observed"),
        (conv_bn, PSE(layers=["flatten"], over="positions"), r"layers: 'flatten' has no positions; use over=units"),
        (conv_bn, PSE(layers=["flatten"], over="both"), r"layers: 'flatten' has no positions; use over=units"),
    ],
)
def test_prepare_refuses_layers_that_do_not_fit_and_leaves_the_net_alone(net, term, message):
    net = untidy(net())
    defense = compose("pgd_at", {"r": term})
    x, _, y = batch(n=2)
    with unchanged(net), pytest.raises(ValueError, match=message):
        defense.prepare(net, x, y)


@pytest.mark.parametrize(("net", "stages"), [(conv_bn, ("act1", "act2")), (Residual, ("block1", "norm"))])
def test_prepare_chooses_layers_and_leaves_the_net_alone(net, stages):
    net = untidy(net())
    with unchanged(net):
        defense = compose("trades", {"pse": PSE(), "sensitivity": UnitSensitivity()}, net)
    terms = defense.named_terms()
    assert terms["pse"].layers == stages[-1:]
    assert terms["sensitivity"].layers == stages
    assert set(defense.layers) == set(stages)
    named = compose("pgd_at", {"pse": PSE(layers="flatten")}, conv_bn()) if isinstance(net, nn.Sequential) else None
    assert named is None or named.layers == ("flatten",)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # a metric that was loaded, not updated
def test_running_estimates_are_part_of_the_checkpoint():
    _, defense = train("trades", {"sensitivity": UnitSensitivity(0.1)})
    fresh = compose("trades", {"sensitivity": UnitSensitivity(0.1)}, conv_bn())
    assert set(fresh.state_dict()) == set(defense.state_dict())
    fresh.load_state_dict(defense.state_dict())
    for d in (defense, fresh):
        d.end_epoch()
    assert equal(defense.state_dict(), fresh.state_dict())
    assert not torch.equal(fresh.state_dict()["terms.sensitivity.omega1"], torch.ones(8))


def test_epsilon_0_attack_is_no_attack():
    """PGD-AT at ε = 0 is ordinary training."""
    net, plain = conv_bn().train(), conv_bn().train()
    x, _, y = batch()
    loss = Defense(PGD(Linf(0)), {"ce": AdversarialCE()})(net, x, y).loss
    torch.testing.assert_close(loss, nn.functional.cross_entropy(plain(x), y))


def test_trades_step_equals_the_formula_on_the_joined_batch():
    net, plain = conv_bn().train(), conv_bn().train()
    x, _, y = batch()
    output = compose("trades")(net, x, y)
    x_adv = compose("trades").attack(plain, x, y)
    z, z_adv = plain(torch.cat([x, x_adv])).chunk(2)
    kl = (z.softmax(1) * (z.log_softmax(1) - z_adv.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(z, y) + 6 * kl)
    output.loss.backward()
    (nn.functional.cross_entropy(z, y) + 6 * kl).backward()
    torch.testing.assert_close(net.conv1.weight.grad, plain.conv1.weight.grad, rtol=1e-3, atol=1e-5)


def test_training_time_signal_sees_a_channel_shift():
    """Invariant 3 from the top: the regulariser of PGD-AT is live where two separate passes would see nothing."""
    net = conv_bn().train()
    term = UnitSensitivity(layers=["bn1"])
    x, _, y = batch()
    obs = observe(net, x, x + 0.1, y, layers=["bn1"])
    term.prepare(obs, ())
    assert float(term(obs).mean().detach()) > 0.01


def without_normalisation(net: nn.Module) -> nn.Module:
    for name, module in list(net.named_children()):
        if isinstance(module, nn.BatchNorm2d):
            setattr(net, name, nn.Identity())
    return net


@pytest.mark.parametrize(("net", "gapless"), [(conv_bn(), False), (without_normalisation(conv_bn()), True)])
def test_signal_gap_compares_modes_and_disturbs_nothing(net, gapless):
    """Without BatchNorm both modes are one; with running statistics far from the batch's they are not."""
    x, x_adv, y = batch(8)
    defense = compose("pgd_at", REGULARIZERS["pse+sensitivity"](), untidy(net))
    before = {key: value.clone() for key, value in defense.state_dict().items()}
    with unchanged(net):
        gaps = defense.signal_gap(net, x, x_adv, y)
    assert set(gaps) == {"pse", "sensitivity"}
    assert all(torch.equal(value, before[key]) for key, value in defense.state_dict().items())
    assert all(mode.training for mode in defense.modules())
    for value, gap in gaps.values():
        assert value > 0
        assert (abs(gap) < 1e-5 * value) == gapless
