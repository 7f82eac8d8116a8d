"""Interpretation-guided terms: the formulas, scale invariance, running weights, true gradients."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from glassarmor.defenses.training.regularizers import EVIDENCE_FLOOR, PSE, CAMDiscrepancy, UnitKL, UnitSensitivity
from glassarmor.defenses.training.terms import AdversarialCE, CleanCE, LogitPairing, MartBCE, MartKL, Ramp, TradesKL
from glassarmor.interpret.concepts.association import concept_weights
from glassarmor.interpret.concepts.dissection import dissect
from glassarmor.interpret.observation import Observation, observe
from glassarmor.interpret.signals.cam import cam_change
from glassarmor.interpret.signals.pse import unit_effects
from glassarmor.interpret.signals.sensitivity import equal_norm_noise, unit_sensitivity
from tests.reference import differences
from tests.reference import losses as reference_losses
from tests.reference import signals as reference
from tests.reference.nets import batch, conv_bn
from tests.reference.trained import attacked

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


@pytest.mark.parametrize(
    "options",
    [
        {"scale": "logits"},
        {"over": "activations"},
        {"over": "activations", "top": 0.1, "power": 2},
        {"promotion": 0.0},
        {"suppression": 0.0, "over": "both"},
        {"promotion": 0.3, "suppression": 2.0, "over": "positions", "scale": "none"},
    ],
)
def test_other_forms_of_pse_equal_the_slow_reference(options):
    net = conv_bn()
    obs = observed(net, "joined", n=6)
    head = (net.head.weight.detach().double().numpy(), net.head.bias.detach().double().numpy())
    usual = {"over": "units", "power": 1, "top": 1.0, "scale": "share", "promotion": 1.0, "suppression": 1.0}
    expected = reference.pse_regularizer(
        *acts(obs, "act2"), *head, obs.y.numpy(), obs.target.numpy(), floor=EVIDENCE_FLOOR, **{**usual, **options}
    )
    found = prepared(PSE(**options), obs)(obs)
    close(found, expected)
    assert not torch.allclose(found, prepared(PSE(), obs)(obs))


@pytest.mark.parametrize(
    "make", [lambda on: PSE(samples=on), lambda on: UnitSensitivity(samples=on)], ids=["pse", "sensitivity"]
)
def test_terms_on_what_the_attack_has_or_has_not_flipped(make):
    """Which sample is which follows the prediction at x' alone, and the two parts make up the whole."""
    obs = observed(conv_bn(), n=16)
    flipped = obs.adv.logits.argmax(1) != obs.y
    assert 0 < flipped.sum() < 16
    every, held, lost = (prepared(make(on), obs)(obs) for on in ("all", "held", "flipped"))
    assert (every > 0).all()
    torch.testing.assert_close(held + lost, every)
    assert torch.equal(held == 0, flipped)
    assert torch.equal(lost == 0, ~flipped)


def test_pse_by_the_norm_of_the_logits_does_not_fall_when_the_logits_shrink():
    net = conv_bn()
    _head_times(net, 1e4)
    once = prepared(PSE(scale="logits"), observed(net))(observed(net))
    _head_times(net, 2)
    torch.testing.assert_close(prepared(PSE(scale="logits"), observed(net))(observed(net)), once, rtol=1e-3, atol=0)
    assert once.max() > 1e-3


def _two_class_kl(clean: float, adv: float) -> float:
    """KL of the two-class predictions at these margins, from the probabilities."""
    p, q = (1 / (1 + np.exp(-m)) for m in (clean, adv))
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def test_unit_kl_equals_its_formula_and_bounds_the_kl_of_two_classes():
    net = conv_bn()
    for mode in differences.MODES:
        obs = observed(net, mode, n=8)
        value = prepared(UnitKL(), obs)(obs)
        margins = unit_effects(obs, "act2").margin.detach().double().numpy()
        clean = (obs.logit("true", "clean") - obs.logit("target", "clean")).detach().double().numpy()
        units = margins.shape[1]
        close(value, [np.mean([_two_class_kl(clean[i], clean[i] - units * m) for m in margins[i]]) for i in range(8)], 1e-3)
        whole = [_two_class_kl(clean[i], clean[i] - margins[i].sum()) for i in range(8)]
        assert (value.detach().numpy() >= np.array(whole) - 1e-6).all()
        assert max(whole) > 1e-3


def test_unit_kl_is_the_kl_where_all_units_move_alike():
    """One unit: nothing can cancel.  With the two classes of the net alone that is TRADES' KL itself."""
    torch.manual_seed(3)
    net = nn.Sequential(
        OrderedDict(body=nn.Conv2d(3, 1, 1), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(1, 2))
    )
    x, x_adv, y = batch(n=6, eps=0.3)
    obs = observe(net, x, x_adv, y % 2, layers=["body"])
    term = UnitKL(layers=["body"])
    torch.testing.assert_close(term(obs), TradesKL()(obs), rtol=1e-3, atol=1e-6)
    assert term(obs).max() > 1e-6


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


def test_noise_corrected_sensitivity_presses_on_what_the_attack_moves_beyond_noise():
    """ω against the slow reference: relative sensitivity to the attack less that to noise of its norm, above 0, mean 1."""
    net = conv_bn().eval()
    term = prepared(UnitSensitivity(noise_corrected=True), observed(net))
    pairs: dict[str, dict[str, list]] = {layer: {"attack": [], "noise": []} for layer in LAYERS}
    for step, (seed, n) in enumerate([(0, 40), (1, 7)]):
        x, x_adv, y = batch(n=n, seed=seed, eps=0.3)
        noisy = equal_norm_noise(x[:32], x_adv[:32], torch.Generator().manual_seed(step))
        both = {
            "attack": observe(net, x, x_adv, y, layers=LAYERS),
            "noise": observe(net, x[:32], noisy, y[:32], layers=LAYERS),
        }
        term.reseed(step)
        term(both["attack"])
        for layer in LAYERS:
            for kind, obs in both.items():
                pairs[layer][kind].append(acts(obs, layer))
    term.end_epoch()
    zero = 0
    for i, layer in enumerate(LAYERS):
        attack, noise = (
            reference.relative_sensitivity(*map(np.concatenate, zip(*pairs[layer][kind], strict=True)))
            for kind in ("attack", "noise")
        )
        excess = np.maximum(attack - noise, 0)
        close(term.get_buffer(f"omega{i}"), excess / excess.mean(), rtol=2e-3)
        zero += int((excess == 0).sum())
    assert zero, "some unit is moved by noise as much as by the attack, so that the correction shows"


def test_noise_of_the_correction_follows_the_step_and_leaves_the_net_alone():
    net = conv_bn().train()
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    found = []
    for step in (3, 3, 4):
        x, x_adv, y = batch(n=8, eps=0.3)
        obs = observe(net, x, x_adv, y, layers=LAYERS)
        net.load_state_dict(buffers, strict=False)
        term = prepared(UnitSensitivity(noise_corrected=True), obs)
        term.reseed(step)
        torch.manual_seed(7)
        term(obs)
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(7)))
        assert net.training
        assert all(torch.equal(value, buffers[name]) for name, value in net.named_buffers())
        found.append(term.noise[0].change)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


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


# Where attacks turn the prediction.  One unit a layer; the means of class 0 and 1 stand at 0 and 1 on the evidence axis of
# every layer, which the first epoch learns; then adversarial images of class 0 turn where the test puts them.


class Passes(nn.Module):
    """Three layers of one unit, each a scaled copy of a channel of the image; logits of two classes, read by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 1, 1, bias=False) for _ in range(3))
        with torch.no_grad():
            for channel, layer in enumerate((self.first, self.second, self.third)):
                layer.weight.copy_(nn.functional.one_hot(torch.tensor(channel), 3).view(1, 3, 1, 1) * (channel + 1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = [layer(x).mean((1, 2, 3)) for layer in (self.first, self.second, self.third)]
        return torch.stack(scores[:2], 1)


NAMES = ("third", "first", "second")  # told in another order than they run in
ORDER = ("first", "second", "third")


def passes(adversarial: list[list[float]], y: list[int]) -> Observation:
    """An observation of images that stand at their own class, and adversarial ones at these places by layer."""
    net, labels = Passes().eval(), torch.tensor(y)
    x = labels.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2) + torch.tensor([[-0.2, 0.2], [0.1, -0.1]])
    x_adv = torch.tensor(adversarial)[:, :, None, None].expand(-1, -1, 2, 2)
    return observe(net, x, x_adv, labels, target=1 - labels, layers=ORDER)


TURNS = [[0.9, 0.8, 1.0], [0.2, 0.9, 0.7], [0.9, 0.1, 0.6], [0.4, 0.9, 0.3], [0.0, 0.0, 0.9]]  # at 0, 1, 2, never, 2


def test_sensitivity_weighs_layers_by_where_the_prediction_turned():
    still = passes([[0.0] * 3, [1.0] * 3], [0, 1])
    turned = passes(TURNS, [0] * 5)
    terms = {at: UnitSensitivity(layers=NAMES, at=at) for at in ("all", "turning")}
    for term in terms.values():
        prepared(term, still)
    where = terms["turning"]
    assert where.layers == ORDER
    for obs in (turned, still):  # nothing turns before the centroids are known, whatever the attack does
        where(obs)
    where.end_epoch()
    assert where.turning.share.tolist() == [1, 1, 1]
    assert where.turning.centroids1.flatten().tolist() == pytest.approx([0.0, 2.0], abs=1e-6)
    where(turned)
    where.end_epoch()
    assert where.turning.share.tolist() == pytest.approx([0.75, 0.75, 1.5])  # 1 : 1 : 2
    for i in range(3):  # and the parts are weighed so
        where.get_buffer(f"omega{i}").fill_(1)
    parts = [prepared(UnitSensitivity(layers=[name]), still)(turned) for name in ORDER]
    torch.testing.assert_close(where(turned), 0.75 * parts[0] + 0.75 * parts[1] + 1.5 * parts[2])
    where.end_epoch()  # the last epoch held no class 1: its centroid is unknown now, nothing turned
    where(turned)
    where.end_epoch()
    assert where.turning.share.tolist() == [1, 1, 1]


def test_turning_estimates_survive_a_checkpoint_in_the_middle_of_an_epoch():
    still, turned = passes([[0.0] * 3, [1.0] * 3], [0, 1]), passes(TURNS, [0] * 5)
    terms = [prepared(UnitSensitivity(layers=ORDER, at="turning"), still) for _ in range(2)]
    terms[0](still)
    terms[0].end_epoch()
    terms[0](turned)
    terms[1].load_state_dict(terms[0].state_dict())
    for term in terms:
        term(passes(TURNS[:1], [0]))
        term.end_epoch()
        assert term.turning.share.tolist() == pytest.approx([1.2, 0.6, 1.2])  # 2 : 1 : 2
    assert all(
        torch.equal(value.nan_to_num(-1), terms[1].state_dict()[name].nan_to_num(-1))
        for name, value in terms[0].state_dict().items()
    )
    assert not terms[1].turning.share.requires_grad


def test_sensitivity_everywhere_keeps_no_estimates_of_turns():
    net = conv_bn()
    term = prepared(UnitSensitivity(at="all"), observed(net))
    assert [name for name in term.state_dict() if "turning" in name] == []
    beside = prepared(UnitSensitivity(at="turning"), observed(net))
    assert torch.equal(beside(observed(net, seed=1)), term(observed(net, seed=1)))  # the first epoch: all ones


CAM_OPTIONS = [(classes, scale) for classes in (None, 1, 2, 9) for scale in ("none", "share")]


@pytest.mark.parametrize(("classes", "scale"), CAM_OPTIONS)
def test_cam_discrepancy_equals_the_slow_reference(classes, scale):
    net = conv_bn()
    for mode in differences.MODES:
        obs = observed(net, mode)
        head = (net.head.weight.detach().double().numpy(), net.head.bias.detach().double().numpy())
        expected = reference.cam_discrepancy(*acts(obs, "act2"), *head, obs.y.numpy(), classes, scale, EVIDENCE_FLOOR)
        close(prepared(CAMDiscrepancy(classes=classes, scale=scale), obs)(obs), expected)
        assert expected.min() > 1e-3


def test_cam_discrepancy_with_fewer_classes_is_a_lower_bound():
    obs = observed(conv_bn())
    values = torch.stack([prepared(CAMDiscrepancy(classes=k), obs)(obs) for k in (1, 2, 3, 4, None)])
    assert (values.diff(dim=0) >= 0).all()
    assert (values[0] < values[-1]).all()
    torch.testing.assert_close(values[-2], values[-1])  # five classes have four wrong ones


def test_a_changed_prediction_costs_cam_discrepancy():
    """½(‖ΔCAM_t0‖₁ + ‖ΔCAM_c‖₁) ≥ (P/2)·(clean margin of t0 over c) where c wins at x' (the paper's bound, with biases)."""
    net, x, x_adv, y, _ = attacked(n=64)
    obs = observe(net, x, x_adv, y, layers=["act2"])
    flipped = (obs.adv.logits.argmax(1) != y) & (obs.clean.logits.argmax(1) == y)
    assert flipped.sum() > 8
    half = sum(cam_change(obs, "act2", label).abs().sum((1, 2)) for label in ("true", "target")) / 2
    bound = obs.adv.acts["act2"][0, 0].numel() / 2 * (obs.logit("true", "clean") - obs.logit("target", "clean"))
    assert (half >= bound * (1 - 1e-5))[flipped].all()
    assert (half / bound)[flipped].min() < 2.5  # close enough to mean something
    # and it is tight: one unit a class, all positions moved alike until both logits meet
    tight = [torch.tensor([[[[3.0]], [[1.0]]]]).expand(1, 2, 2, 2), torch.tensor([[[[2.0]], [[2.0]]]]).expand(1, 2, 2, 2)]
    head = nn.Sequential(
        OrderedDict(act=nn.Identity(), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(2, 2))
    )
    with torch.no_grad():
        head.head.weight.copy_(torch.eye(2))
        head.head.bias.zero_()
    obs = observe(head, *tight, torch.tensor([0]), layers=["act"])
    assert prepared(CAMDiscrepancy(layers=["act"]), obs)(obs).item() / 2 == 4 / 2 * (3 - 1)


def test_cam_discrepancy_asks_for_positions():
    obs = observe(conv_bn().eval(), *batch()[:2], batch()[2], layers=["flatten"])
    with pytest.raises(ValueError, match=r"regularizers\.cam_discrepancy\.layers: 'flatten' gives no map"):
        CAMDiscrepancy(layers=["flatten"]).prepare(obs, ())


@pytest.mark.parametrize(
    ("term", "options", "message"),
    [
        (
            UnitSensitivity,
            {"noise_corrected": 1},
            "regularizers.sensitivity.noise_corrected: expected true or false, found 1",
        ),
        (UnitSensitivity, {"at": "some"}, "regularizers.sensitivity.at: expected all or turning, found 'some'"),
        (
            UnitSensitivity,
            {"samples": "some"},
            "regularizers.sensitivity.samples: expected all, held or flipped; found 'some'",
        ),
        (CAMDiscrepancy, {"classes": 0}, "regularizers.cam_discrepancy.classes: expected null or a whole number >= 1"),
        (CAMDiscrepancy, {"scale": "margin"}, "regularizers.cam_discrepancy.scale: expected none or share, found 'margin'"),
    ],
)
def test_other_options_outside_the_list(term, options, message):
    with pytest.raises(ValueError, match=message):
        term(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over": "pixels"}, "regularizers.pse.over: expected units, positions, both or activations; found 'pixels'"),
        ({"power": 3}, "regularizers.pse.power: expected 1 or 2, found 3"),
        ({"top": 0}, r"regularizers.pse.top: expected a share in \(0, 1\], found 0"),
        ({"top": 1.5}, r"found 1.5"),
        ({"scale": "log"}, "regularizers.pse.scale: expected share, margin, logits or none; found 'log'"),
        ({"samples": "some"}, "regularizers.pse.samples: expected all, held or flipped; found 'some'"),
        ({"promotion": -1}, "regularizers.pse.promotion: expected a finite number >= 0, found -1"),
        ({"promotion": 0, "suppression": 0}, "expected it or suppression above 0, found both 0"),
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


def test_concepts_turn_the_weights_to_detectors_from_the_second_epoch_on() -> None:
    """Unit 0 copies the image and so detects its bright spot; unit 1 is constant; unit 2 sees the rest."""
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    weight, bias = torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1, 1), torch.tensor([0.0, 0.3, 0.5])
    with torch.no_grad():
        net[0].weight.copy_(weight)  # type: ignore[union-attr, operator]
        net[0].bias.copy_(bias)  # type: ignore[union-attr, operator]

    class Spot:
        concepts, categories = ("bright spot",), ("position",)

        def __len__(self) -> int:
            return 1

        def __iter__(self):  # type: ignore[no-untyped-def]
            image = torch.zeros(1, 1, 8, 8)
            image[..., 0, 0] = 1.0  # a share of pixels below the quantile
            yield image, (image > 0).long() - 1

    term = UnitSensitivity(layers=["0"], concepts=lambda size, channels: Spot(), mode="stabilise_detectors")
    x = torch.rand(6, 1, 8, 8)
    obs = observe(net, x, (x + 0.1 * torch.randn_like(x)).clamp(0, 1), torch.arange(6) % 2, layers=["0"])
    term.prepare(obs, ())
    term.train()
    term(obs)
    assert term.get_buffer("omega0").tolist() == [1, 1, 1]  # the first epoch knows nothing
    term.end_epoch()
    plain = term.get_buffer("omega0").clone()
    saved = {name: value.clone() for name, value in term.state_dict().items()}
    term(obs)
    found = dissect(net, Spot(), ["0"], quantile=0.02)["0"]
    expected = plain * concept_weights(found, "stabilise_detectors")
    assert found.detectors.tolist() != [False, False, False]
    torch.testing.assert_close(term.get_buffer("omega0"), expected / expected.mean())
    again = UnitSensitivity(layers=["0"], concepts=lambda size, channels: Spot())
    again.prepare(obs, ())
    again.load_state_dict(saved)  # a run that was stopped between the epochs
    again.train()
    again(obs)
    assert torch.equal(again.get_buffer("omega0"), term.get_buffer("omega0"))
    with pytest.raises(ValueError, match=r"regularizers.sensitivity.mode: expected .* found 'luck'"):
        UnitSensitivity(mode="luck")  # type: ignore[arg-type]
