"""Interpretation-guided terms: the formulas, scale invariance, running weights, true gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from defenses.regularizers import EVIDENCE_FLOOR, PSE, UnitSensitivity
from defenses.terms import AdversarialCE, CleanCE, LogitPairing, MartBCE, MartKL, Ramp, TradesKL
from interpret.observation import Observation, observe
from interpret.pse import unit_effects
from interpret.sensitivity import unit_sensitivity
from tests.reference import differences
from tests.reference import losses as reference_losses
from tests.reference import signals as reference
from tests.reference.nets import batch, conv_bn

LAYERS = ("act1", "act2")


def observed(net: nn.Module, mode: str = "eval", seed: int = 0, n: int = 4, create_graph: bool = False) -> Observation:
    x, x_adv, y = batch(n=n, seed=seed, eps=0.3)
    net.train(mode != "eval")
    return observe(net, x, x_adv, y, layers=LAYERS, joined=mode == "joined", create_graph=create_graph)


def acts(obs: Observation, layer: str) -> tuple[np.ndarray, np.ndarray]:
    return tuple(obs.side(side).acts[layer].detach().double().numpy() for side in ("clean", "adv"))


def prepared(term, obs: Observation):
    term.prepare(obs, LAYERS)
    return term


def close(found: torch.Tensor, expected, rtol: float = 2e-4) -> None:
    assert found.shape == np.shape(expected)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=rtol, atol=1e-6)


OPTIONS = [
    (over, power, top, scale)
    for over in ("units", "positions", "both")
    for power in (1, 2)
    for top in (1.0, 0.3)
    for scale in ("share", "margin", "none")
]


@pytest.mark.parametrize(("over", "power", "top", "scale"), OPTIONS)
def test_pse_equals_the_slow_reference(over, power, top, scale):
    net = conv_bn()
    term = PSE(over=over, power=power, top=top, scale=scale)
    for mode in differences.MODES:
        obs = observed(net, mode)
        head = (net.head.weight.detach().double().numpy(), net.head.bias.detach().double().numpy())
        expected = reference.pse_regularizer(
            *acts(obs, "act2"), *head, obs.y.numpy(), obs.target.numpy(), over, power, top, scale, EVIDENCE_FLOOR
        )
        close(prepared(term, obs)(obs), expected)
        assert expected.max() > 1e-3


def test_pse_reads_the_last_feature_layer_unless_told_and_means_over_layers():
    net = conv_bn()
    obs = observed(net)
    assert prepared(PSE(), obs).layers == ("act2",)
    both, one, two = (prepared(PSE(layers=names), obs)(obs) for names in (LAYERS, ["act1"], "act2"))
    torch.testing.assert_close(both, (one + two) / 2)
    assert not torch.allclose(one, two)


def test_pse_bounds_the_margin_that_the_attack_gains():
    """Z_t0 − Z_t at x' ≥ the clean margin − Σ relu(m): the reason for the term."""
    obs = observed(conv_bn(), n=32)
    value = prepared(PSE(scale="none"), obs)(obs)
    clean, adv = (obs.logit("true", side) - obs.logit("target", side) for side in ("clean", "adv"))
    assert (adv >= clean - value - 1e-4).all()
    assert (adv < clean).any()


def _head_times(net: nn.Module, factor: float) -> None:
    with torch.no_grad():
        net.head.weight.mul_(factor)
        net.head.bias.mul_(factor)


@pytest.mark.parametrize("over", ["units", "positions", "both"])
def test_pse_share_does_not_fall_when_the_logits_shrink(over):
    """The raw form is cheapest to meet by shrinking the logits; the share is not, up to EVIDENCE_FLOOR."""
    net = conv_bn()
    _head_times(net, 1e4)  # evidence far above the floor
    values = {}
    for factor in (1, 2):
        _head_times(net, factor)
        obs = observed(net)
        values[factor] = {s: prepared(PSE(over=over, scale=s), obs)(obs) for s in ("share", "none")}
    torch.testing.assert_close(values[2]["share"], values[1]["share"], rtol=1e-3, atol=0)
    torch.testing.assert_close(values[2]["none"], values[1]["none"] * 2, rtol=1e-3, atol=1e-3)
    assert values[1]["share"].max() > 1e-3


def test_pse_margin_scale_does_not_fall_when_the_logits_shrink():
    net = conv_bn()
    _head_times(net, 1e4)
    obs = observed(net)
    term = prepared(PSE(scale="margin"), obs)
    clean = obs.logit("true", "clean") - obs.logit("target", "clean")
    once = term(obs)
    _head_times(net, 2)
    right = clean > 1
    assert right.any()
    torch.testing.assert_close(term(observed(net))[right], once[right], rtol=1e-3, atol=0)


def test_sensitivity_does_not_fall_when_activations_shrink():
    net = conv_bn()
    values = []
    for factor in (1, 2):
        with torch.no_grad():
            net.bn2.weight.mul_(factor)  # ReLU follows: the layer's activations double
            net.bn2.bias.mul_(factor)
        obs = observed(net)
        term = UnitSensitivity(layers=["act2"])
        values.append((prepared(term, obs)(obs), unit_sensitivity(obs, "act2")))
    torch.testing.assert_close(values[1][0], values[0][0], rtol=1e-3, atol=0)
    torch.testing.assert_close(values[1][1], values[0][1] * 2, rtol=1e-4, atol=0)


def test_sensitivity_equals_the_slow_reference_over_two_epochs():
    """ω is 1 in the first epoch, then the relative sensitivity over all samples of the epoch before, scaled to mean 1."""
    net = conv_bn()
    epochs = [[(0, 4), (1, 7)], [(2, 5)], [(3, 4)]]  # seed and size of each batch
    term = prepared(UnitSensitivity(), observed(net))
    assert term.layers == LAYERS
    omegas = [np.ones(6), np.ones(8)]
    for epoch in epochs:
        seen: dict[str, list] = {layer: [] for layer in LAYERS}
        for seed, n in epoch:
            obs = observed(net, "shared", seed, n)
            pairs = [acts(obs, layer) for layer in LAYERS]
            close(term(obs), reference.sensitivity_regularizer(pairs, omegas), rtol=1e-3)
            for layer, pair in zip(LAYERS, pairs, strict=True):
                seen[layer].append(pair)
        term.end_epoch()
        omegas = [reference.omega(seen[layer]) for layer in LAYERS]
        for i, omega in enumerate(omegas):
            close(term.get_buffer(f"omega{i}"), omega, rtol=1e-3)
            assert np.ptp(omega) > 0.1
    before = [term.get_buffer(f"omega{i}").clone() for i in range(2)]
    term.end_epoch()  # an epoch without a batch changes nothing
    assert all(torch.equal(term.get_buffer(f"omega{i}"), before[i]) for i in range(2))


def test_sensitivity_state_survives_a_checkpoint_in_the_middle_of_an_epoch():
    net = conv_bn()
    terms = [prepared(UnitSensitivity(), observed(net)) for _ in range(2)]
    terms[0](observed(net, seed=1))
    terms[0].end_epoch()
    terms[0](observed(net, seed=2))
    terms[1].load_state_dict(terms[0].state_dict())
    probe = observed(net, seed=3)
    assert torch.equal(terms[1](probe), terms[0](probe))
    for term in terms:
        term.end_epoch()
    assert torch.equal(terms[1](probe), terms[0](probe))


def test_sensitivity_counts_only_in_training():
    net = conv_bn()
    obs = observed(net)
    term = prepared(UnitSensitivity(), obs).eval()
    term(obs)
    assert term.running[0].samples == 0


@pytest.mark.parametrize("term", [PSE(), PSE(over="both", power=2), UnitSensitivity()])
def test_no_attack_effect_is_value_zero_and_finite_gradient(term):
    net = conv_bn().train()
    x, _, y = batch()
    obs = observe(net, x, x.clone(), y, layers=LAYERS, joined=True, create_graph=True)
    value = prepared(term, obs)(obs)
    assert value.abs().max() < 1e-4
    value.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over": "pixels"}, "regularizers.pse.over: expected units, positions or both; found 'pixels'"),
        ({"power": 3}, "regularizers.pse.power: expected 1 or 2, found 3"),
        ({"top": 0}, r"regularizers.pse.top: expected a share in \(0, 1\], found 0"),
        ({"top": 1.5}, r"found 1.5"),
        ({"scale": "log"}, "regularizers.pse.scale: expected share, margin or none; found 'log'"),
    ],
)
def test_options_outside_the_list(options, message):
    with pytest.raises(ValueError, match=message):
        PSE(**options)


def test_base_terms_equal_the_papers():
    obs = observed(conv_bn())
    z, z_adv, y = obs.clean.logits.tolist(), obs.adv.logits.tolist(), obs.y.tolist()
    samples = range(len(y))
    r = reference_losses
    close(AdversarialCE()(obs), [r.cross_entropy(z_adv[i], y[i]) for i in samples])
    close(AdversarialCE(label_smoothing=0.1)(obs), [r.cross_entropy(z_adv[i], y[i], 0.1) for i in samples])
    close(CleanCE()(obs), [r.cross_entropy(z[i], y[i]) for i in samples])
    close(TradesKL()(obs), [r.kl(z[i], z_adv[i]) for i in samples], rtol=1e-3)
    close(MartBCE()(obs), [r.mart_bce(z_adv[i], y[i]) for i in samples])
    close(MartKL()(obs), [r.mart_kl(z[i], z_adv[i], y[i]) for i in samples], rtol=1e-3)
    close(LogitPairing()(obs), [r.logit_pairing(z[i], z_adv[i]) for i in samples], rtol=1e-3)
    assert (TradesKL().weight, MartKL().weight, LogitPairing().weight) == (6, 5, 0.5)  # as published


def test_ramp():
    ramp = Ramp(0.0, 2.0, epochs=4, delay=1)
    assert [ramp(e) for e in (0, 1, 2, 3, 5, 9)] == [0, 0, 0.5, 1, 2, 2]
    assert [Ramp(1, 0, epochs=0, delay=2)(e) for e in (0, 1.9, 2, 3)] == [1, 1, 0, 0]
    assert TradesKL(Ramp(0, 0, 5)).absent
    assert not TradesKL(Ramp(0, 1, 5)).absent
    assert TradesKL(0).absent


TERMS = {
    "pse units share": lambda: PSE(layers=LAYERS),
    "pse both squared": lambda: PSE(layers=LAYERS, over="both", power=2),
    "pse positions top none": lambda: PSE(layers=LAYERS, over="positions", top=0.5, scale="none"),
    "pse both raw": lambda: PSE(layers=LAYERS, over="both", scale="none"),
    "sensitivity": lambda: UnitSensitivity(layers=LAYERS),
    "trades": TradesKL,
    "mart bce": MartBCE,
    "mart kl": MartKL,
    "pairing": LogitPairing,
}


@pytest.mark.parametrize(("mode", "name"), differences.every(*TERMS))
def test_gradients_are_true(mode, name, double_precision):
    net, make = differences.setting(mode)
    term = prepared(TERMS[name](), make())
    if isinstance(term, UnitSensitivity):
        term(make())
        term.end_epoch()  # weights that are not all one; no gradient goes through them
    differences.check(net, lambda: differences.weighted(term(make())))


def test_the_margin_scale_is_held_fixed(double_precision):
    """scale="margin" divides by a detached margin: its gradient is that of the raw term over a constant."""
    net, make = differences.setting("eval")
    obs = make()
    raw, scaled = (prepared(PSE(layers=["act2"], scale=s), obs) for s in ("none", "margin"))
    margin = (obs.logit("true", "clean") - obs.logit("target", "clean")).detach().clamp_min(EVIDENCE_FLOOR)
    expected = torch.autograd.grad((raw(obs) / margin).sum(), net.conv1.weight, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(scaled(obs).sum(), net.conv1.weight)[0], expected)


def test_the_number_trained_on_is_the_number_shown():
    """Invariant 10: the raw term is the sum of the positive margins that the dashboard draws."""
    obs = observed(conv_bn())
    shown = unit_effects(obs, "act2").margin.relu().sum(1)
    torch.testing.assert_close(prepared(PSE(scale="none"), obs)(obs), shown, rtol=1e-4, atol=1e-5)
