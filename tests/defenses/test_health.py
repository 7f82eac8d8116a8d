"""Health: measures in closed form, rules on histories, planted masked gradients reported and honest nets not."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from glassarmor.defenses.attacks.free import Free
from glassarmor.defenses.attacks.objectives import NuclearCE
from glassarmor.defenses.attacks.pgd import FGSM, FGSMRS, NFGSM, PGD
from glassarmor.defenses.monitoring.alarms import (
    CHECKS,
    KINDS,
    Limits,
    better,
    guesses,
    indicators,
    judge,
    safer,
    withstands,
)
from glassarmor.defenses.monitoring.readings import (
    FEW,
    LUCK,
    MULTI_STEP,
    Images,
    Reading,
    count_nonfinite,
    dead_units,
    gradients,
    guessing,
    kinds,
    measure,
    total_variation,
    turning,
    watched_logits,
)
from glassarmor.defenses.threat import L2, Linf
from glassarmor.interpret.network.layouts import layouts_of
from glassarmor.interpret.observation import observe
from glassarmor.interpret.signals.pse import KIND_NAMES, unit_effects
from glassarmor.interpret.views.page.page import ReportPage, read_script
from glassarmor.interpret.views.panels.health import POINTS, health_view
from glassarmor.interpret.views.view import Answer
from tests.reference.nets import batch, conv_bn, seeded, unchanged, untidy

LAYERS = ("act1", "act2")
BALL = Linf(0.03)


def of(net: nn.Module, n: int = 12, **options: object) -> Images:
    """Images that the net answers rightly, and a background with every class."""
    x, _, _ = batch(n=n, **options)
    with torch.no_grad():
        y = net.eval()(x).argmax(1)
    return Images(x, y, (torch.rand(40, *x.shape[1:], generator=seeded(9)), torch.arange(40) % 5))


class Linearised(nn.Sequential):
    """Without a kink: logits of two classes, through a layer that can be observed."""

    def __init__(self) -> None:
        super().__init__(
            OrderedDict(
                act1=nn.Conv2d(3, 4, 1), act2=nn.Conv2d(4, 6, 3, padding=1), flatten=nn.Flatten(), head=nn.Linear(384, 2)
            )
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=seeded(3)) * 0.3)


class Before(nn.Module):
    """A net behind something done to the image, whose layers keep their names."""

    def __init__(self, net: nn.Module, change) -> None:
        super().__init__()
        self.net, self.change = net, change

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.change(x))


class Louder(nn.Module):
    """The same answers from logits that are so many times as large."""

    def __init__(self, net: nn.Module, by: float) -> None:
        super().__init__()
        self.net, self.by = net, by

    def forward(self, x: Tensor) -> Tensor:
        return self.by * self.net(x)


# ---- measures ---------------------------------------------------------------------------------------------------------


def test_on_a_linear_net_of_two_classes_nothing_drifts() -> None:
    """One step finds the worst corner of the ball, so more steps find the same; the gradient points one way everywhere."""
    torch.manual_seed(0)
    net = Linearised()
    images = replace(of(net), background=(torch.rand(20, 3, 8, 8), torch.arange(20) % 2))
    found = measure(net, images, BALL, LAYERS, steps=5, thorough=True)
    assert found["misalignment"] == pytest.approx(0, abs=1e-5)
    for name in ("gap", "kind_drift", "turning_drift", "margin_gain", "step_gain", "noise_wins", "zero_gradient", "dead"):
        assert found[name] == 0, name
    # the worst corner moves the margin of each image by ε · Σ|∂(Z_0 − Z_1)/∂x|, the clamp to [0,1] aside (images in .15….85)
    x = images.x.clone().requires_grad_()
    logits = net(x)
    margin = (logits[:, 0] - logits[:, 1]) * (1 - 2 * images.y)
    slope = torch.autograd.grad(margin.sum(), x)[0].abs().flatten(1).sum(1)
    assert found["pgd"] == pytest.approx(float((margin > BALL.eps * slope).float().mean()))
    assert found["clean"] == 1


def test_the_net_is_left_as_it_was() -> None:
    net = conv_bn()
    images = of(net)
    untidy(net)
    state = torch.get_rng_state()
    with unchanged(net):
        first = measure(net, images, BALL, LAYERS)
    assert torch.equal(state, torch.get_rng_state())
    assert measure(net, images, BALL, LAYERS) == first, "readings of the same weights are the same"


def test_weights_that_are_not_finite_are_counted_and_nothing_else_is_read() -> None:
    net = conv_bn()
    images = of(net)
    with torch.no_grad():
        net.head.weight[1, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
        net.bn1.running_mean[0] = float("nan")
    held = sum(value.numel() for value in net.state_dict().values() if value.is_floating_point())
    found = measure(net, images, BALL, LAYERS)
    assert found == {"nonfinite": 4.0, "weights": held}
    assert count_nonfinite(net) == (4, held)
    (alarm,) = judge([Reading(0, 1, found)], Limits())
    assert alarm.text == f"not finite: 4 of {held:,} weights"


def test_logits_that_overflow_are_counted_too() -> None:
    net = conv_bn()
    images = of(net)
    with torch.no_grad():
        net.head.weight[0] = 3e38
    found = measure(net, images, BALL, LAYERS)
    assert found.keys() == {"nonfinite", "logits"}
    assert found["nonfinite"] >= len(images.y)
    assert found["logits"] == 3 * 5 * len(images.y)
    (alarm,) = judge([Reading(0, 1, found)], Limits())
    assert alarm.text.endswith(f"of {found['logits']:.0f} logits")


def test_logits_are_watched_on_every_image_that_is_judged() -> None:
    class Big(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) * 3e38

    net = Big()
    with watched_logits(net) as seen:
        assert seen == []
        net(torch.full((2, 1, 1, 2), 0.5))
        assert not any(seen)
        net(torch.full((2, 1, 1, 2), 2.0))
        net(torch.full((2, 1, 1, 2), 0.5))
    assert [bool(flag) for flag in seen] == [True], "once is enough"
    net(torch.ones(1, 1, 1, 2))
    assert len(seen) == 1
    assert not net._forward_hooks


def test_guessing_by_hand() -> None:
    """Of 60 images of 10 classes a guesser is right for 13 or more with probability 0.8 %, for 12 or more with 2 %."""
    tail = lambda k: sum(math.comb(60, i) * 0.1**i * 0.9 ** (60 - i) for i in range(k, 61))  # noqa: E731
    assert tail(13) < LUCK < tail(12)
    y = torch.arange(60) % 10

    def at(right: int) -> dict[str, float]:  # the wrong answers are the next class, so that all classes are as frequent
        return guessing(torch.where(torch.arange(60) < right, y, (y + 1) % 10), y, 10)

    assert [at(right)["guess"] for right in (0, 6, 13, 26, 60)] == pytest.approx([13, 13 / 6, 1, 1 / 2, 13 / 60])
    assert at(60)["one_class"] == 0
    constant = guessing(torch.zeros_like(y), y, 10)
    assert constant["guess"] > 1
    assert constant["one_class"] == 1


def test_one_answer_for_all_is_guessing_where_classes_are_uneven_too() -> None:
    y = torch.tensor([0] * 48 + [1] * 16)
    constant = guessing(torch.zeros_like(y), y, 2)  # right for 75 %, as anybody would be who always says so
    assert constant["guess"] == pytest.approx(57 / 48)  # P(B(64, ¾) ≥ 57) = 0.4 %, ≥ 56 = 1.1 %
    assert constant["one_class"] == 1
    good = guessing(y, y, 2)
    assert good["guess"] < 1
    assert good["one_class"] == 0
    absent = guessing(torch.full((64,), 2), torch.arange(64) % 2, 10)  # an answer that is never right
    assert absent["guess"] > 1


def test_few_images_rule_out_nothing() -> None:
    y = torch.tensor([0, 1, 0, 1])
    assert "guess" not in guessing(y, y, 2)  # 4 of 4 by luck: 1/16
    assert guessing(y[:1], y[:1], 2) == {}


@given(st.integers(2, 12), st.integers(20, 300), st.integers(0, 2**31 - 1))
def test_a_guesser_is_rarely_taken_for_a_net_and_more_right_answers_never_look_worse(classes, n, seed) -> None:
    generator = seeded(seed)
    y = torch.arange(n) % classes
    draws = torch.randint(classes, (200, n), generator=generator)
    taken = sum(guessing(draw, y, classes).get("guess", 2.0) <= 1 for draw in draws)
    assert taken <= 12, "one in a hundred, and what 200 draws scatter"
    better = torch.where(torch.arange(n) < n // 2, y, draws[0])
    assert guessing(better, y, classes).get("one_class", 0.0) <= 1
    assert guessing(y, y, classes).get("guess", 0.0) <= 1


def test_a_net_that_says_one_class_is_read_as_guessing() -> None:
    net = conv_bn()
    images = of(net, n=24)
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.copy_(torch.tensor([0.0, 1, 0, 0, 0]))
    found = measure(net, Images(images.x, torch.arange(24) % 5, images.background), BALL, LAYERS)
    assert found["one_class"] == 1
    assert found["guess"] > 1
    assert guesses(found, Limits())
    assert not guesses(found, Limits(guess=None, one_class=None))


def test_misalignment_is_one_minus_the_cosine() -> None:
    """On logits (‖x‖²/2, 0), two classes: the gradient at x is x times a number, so the cosine is that of x and x + η."""

    class Bowl(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            half = x.flatten(1).square().sum(1) / 200
            return torch.stack([half, torch.zeros_like(half)], 1)

    x, _, _ = batch(n=6)
    y = torch.zeros(6, dtype=torch.long)
    eta = BALL.noise(x, torch.Generator().manual_seed(7 * 1_000_003))
    cosine = torch.cosine_similarity(x.flatten(1).double(), (x + eta).flatten(1).double())
    found = gradients(Bowl(), x, y, BALL, seed=7)
    assert found["misalignment"] == pytest.approx(float((1 - cosine).mean()), rel=1e-3)
    assert found["zero_gradient"] == 0


def test_dead_units_are_those_that_never_change() -> None:
    net = conv_bn()
    with torch.no_grad():
        net.bn1.weight[[0, 4]] = 0  # constant, one of them positive
        net.bn1.bias[0], net.bn1.bias[4] = 1.0, -1.0
        net.bn2.bias[:] = -100  # silent behind the ReLU
        net.bn2.bias[3] = 1.0
    x, x_adv, y = batch()
    found = dead_units(observe(net.eval(), x, x_adv, y, layers=LAYERS))
    assert found == {"dead": pytest.approx(7 / 8), "dead/act1": pytest.approx(2 / 6), "dead/act2": pytest.approx(7 / 8)}


def test_a_unit_that_only_the_attack_wakes_is_not_dead() -> None:
    net = nn.Sequential(
        OrderedDict(act1=nn.Sequential(nn.Conv2d(3, 1, 1), nn.ReLU()), flatten=nn.Flatten(), head=nn.Linear(64, 5))
    )
    with torch.no_grad():
        net.act1[0].weight.fill_(1.0)
        net.act1[0].bias.fill_(-2.0)
    x = torch.full((2, 3, 8, 8), 0.5)
    awake = x.clone()
    awake[1, :, 3, 3] = 0.9
    y = torch.zeros(2, dtype=torch.long)
    assert dead_units(observe(net, x, awake, y, layers=["act1"]))["dead"] == 0
    assert dead_units(observe(net, x, x + 0.01, y, layers=["act1"]))["dead"] == 1


def test_drifts_compare_the_two_halves() -> None:
    """The same attack twice: no drift.  None against one: as far as the attack has units that count."""
    net = conv_bn()
    x, x_adv, y = batch(n=6)
    background = of(net).background
    with torch.enable_grad():
        same = observe(net.eval(), x.repeat(2, 1, 1, 1), x_adv.repeat(2, 1, 1, 1), y.repeat(2), layers=LAYERS)
        one = observe(net, x.repeat(2, 1, 1, 1), torch.cat([x, x_adv]), y.repeat(2), layers=LAYERS)
    assert kinds(same, "act2")["kind_drift"] == 0
    assert turning(net, same, background, LAYERS)["turning_drift"] == 0
    found = kinds(one, "act2")
    active = float((unit_effects(one, "act2").kind[6:] != KIND_NAMES.index("inactive")).float().mean())
    assert active > 0.5
    assert found["kind_drift"] == pytest.approx(active)
    assert found["kinds_one/inactive"] == 1
    for side in ("one", "many"):
        assert sum(found[f"kinds_{side}/{name}"] for name in KIND_NAMES) == pytest.approx(1)
    # where nothing is attacked nothing turns
    assert turning(net, one, background, LAYERS)["depth_one"] == 1


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6), st.lists(st.floats(0.01, 1), min_size=6, max_size=6))
def test_total_variation_is_a_distance_in_0_1(first: list[float], second: list[float]) -> None:
    p, q = (torch.tensor(v, dtype=torch.float64) for v in (first, second[: len(first)]))
    p, q = p / p.sum(), q / q.sum()
    distance = total_variation(p, q)
    assert 0 <= distance <= 1 + 1e-12
    assert distance == pytest.approx(total_variation(q, p))
    assert distance == pytest.approx(float((p - q).clamp_min(0).sum()))
    assert total_variation(p, p) == 0


# ---- planted masks ----------------------------------------------------------------------------------------------------


def masked(found: dict[str, float]) -> tuple[str, ...]:
    alarms = judge([Reading(0, 1, found)], Limits(), ("masked",))
    return tuple(alarms[0].values) if alarms else ()


def test_masked_gradients_are_reported_and_honest_ones_are_not() -> None:
    net = conv_bn(seed=1)
    images, layers, ball = of(net, n=32), [f"net.{layer}" for layer in LAYERS], Linf(0.2)
    honest = measure(Before(net, lambda x: x), images, ball, layers)
    assert masked(honest) == ()
    assert honest["pgd"] < honest["noise"], "so that an attack has something to find"
    quantised = measure(Before(net, lambda x: (x * 8).round() / 8), images, ball, layers)
    assert "zero_gradient" in masked(quantised)
    assert quantised["zero_gradient"] == 1
    saturated = measure(Louder(net, 1e5), images, ball, layers)
    assert {"zero_gradient", "margin_gain"} <= set(masked(saturated)), saturated
    assert saturated["margin"] == pytest.approx(honest["margin"], abs=0.1), "the net is as weak as before"


def test_an_attack_that_needs_many_steps_and_noise_that_wins_are_reported() -> None:
    rows = {"pgd": 0.6, "longer": 0.3, "step_gain": 0.3, "noise_wins": 0.0}
    assert masked(rows) == ("step_gain",)
    assert masked({**rows, "step_gain": 0.05}) == ()
    assert masked({"noise_wins": 0.2}) == ("noise_wins",)


def test_the_gap_is_that_of_the_strongest_attack_and_all_are_of_the_same_images() -> None:
    net = conv_bn(seed=1)
    images, layers, ball = of(net, n=FEW + 16), [f"net.{layer}" for layer in LAYERS], Linf(0.2)
    for by in (1.0, 1e5):  # the louder net's cross-entropy has no gradient, its margin has
        found = measure(Before(Louder(net, by), lambda x: x), images, ball, [f"net.{layer}" for layer in layers], steps=1)
        assert found["gap"] == found["fgsm"] - min(found[name] for name in MULTI_STEP)
        assert found["margin_gain"] == pytest.approx(found["pgd"] - found["margin"])
        assert found["step_gain"] == pytest.approx(found["pgd"] - found["longer"])
        for name in MULTI_STEP:
            count = found[name] * (FEW + 16)
            assert count == pytest.approx(round(count), abs=1e-4), f"{name}: of all images"
    assert found["gap"] > found["fgsm"] - found["pgd"] + 0.2, "the cross-entropy alone sees nothing"


def test_a_suspicious_gap_is_looked_into() -> None:
    net = conv_bn(seed=1)
    images = of(net, n=8)
    plain = measure(net, images, BALL, LAYERS, steps=1, thorough=False)
    assert "longer" not in plain
    assert "longer" in measure(net, images, BALL, LAYERS, steps=1, thorough=False, suspect=plain["gap"])
    assert "longer" not in measure(net, images, BALL, LAYERS, steps=1, thorough=False, suspect=plain["gap"] + 0.01)


@pytest.mark.parametrize("thorough", [False, True])
def test_while_eps_climbs_the_gap_is_that_of_the_ball_that_training_has_reached(thorough: bool) -> None:
    net, layers, ball = conv_bn(seed=1), LAYERS, Linf(0.2)
    images = of(net, n=16)
    options = {"steps": 2, "thorough": thorough}
    full = measure(net, images, ball, layers, **options)
    half = measure(net, images, ball, layers, eps_share=0.5, **options)
    there = measure(net, images, Linf(0.1), layers, **options)
    assert half["eps_share"] == 0.5
    assert "eps_share" not in full
    assert half["gap"] >= there["fgsm"] - there["pgd"]
    assert half["gap"] == pytest.approx(there["fgsm"] - min(there[n] for n in ("pgd", "longer") if n in there))
    assert {k: v for k, v in half.items() if k not in ("gap", "eps_share")} == {k: v for k, v in full.items() if k != "gap"}
    assert measure(net, images, ball, layers, eps_share=0.0, **options)["gap"] == 0, "the image alone"


# ---- rules ------------------------------------------------------------------------------------------------------------


def history(*values: dict[str, float]) -> list[Reading]:
    return [Reading(i, 10 * i, v) for i, v in enumerate(values)]


def found(*values: dict[str, float], limits: Limits | None = None) -> set[str]:
    return {alarm.kind for alarm in judge(history(*values), limits or Limits())}


HONEST = {"nonfinite": 0.0, "fgsm": 0.5, "pgd": 0.45, "gap": 0.05, "dead": 0.1, "zero_gradient": 0.0, "robust": 0.45}


def test_catastrophic_overfitting_is_a_gap_or_a_fall() -> None:
    assert found(HONEST, HONEST) == set()
    assert found({**HONEST, "gap": 0.21}) == {"catastrophic"}
    assert found(HONEST, {**HONEST, "pgd": 0.24}) == {"catastrophic"}
    assert found(HONEST, {**HONEST, "pgd": 0.26}) == set()
    assert found({"nonfinite": 1.0}) == {"nonfinite"}
    (alarm,) = judge(history(HONEST, {**HONEST, "gap": 0.6, "pgd": 0.0}), Limits())
    assert set(alarm.values) == {"gap", "fall"}
    assert (alarm.epoch, alarm.step) == (1, 10)
    assert "60 points above" in alarm.text
    assert "fell by 45 points" in alarm.text


def test_the_reading_of_issue_eighteen_rings() -> None:
    """FGSM .609, PGD .453: no gap of 20 points; four times the steps .312: one of 30."""
    reading = {
        **HONEST,
        "fgsm": 0.609,
        "pgd": 0.453,
        "longer": 0.312,
        "margin": 0.44,
        "step_gain": 0.141,
        "gap": 0.609 - 0.312,
    }
    assert found(reading) == {"catastrophic"}


def test_a_fall_is_that_of_an_attack_against_itself() -> None:
    before, after = {**HONEST, "longer": 0.44}, {**HONEST, "longer": 0.20}
    assert found(before, after) == {"catastrophic"}
    assert found({**HONEST, "pgd": 0.5}, {**HONEST, "longer": 0.25}) == set(), "more steps than before are no fall"


@pytest.mark.parametrize("climbs", [(1,), (0,), (0, 1)])
def test_while_eps_climbs_a_fall_in_the_full_ball_is_no_news_and_a_gap_says_where_it_is(climbs: tuple[int, ...]) -> None:
    rows = [HONEST, {**HONEST, "pgd": 0.05}]
    assert found(*rows) == {"catastrophic"}
    assert found(*({**row, "eps_share": 0.5} if i in climbs else row for i, row in enumerate(rows))) == set()
    (alarm,) = judge(history({**HONEST, "gap": 0.3, "eps_share": 0.5}), Limits())
    assert "30 points at 50 % of ε above" in alarm.text
    view = health_view({"gap": 0.3, "eps_share": 0.5}, {"gap": 0.2})
    assert ", at 50.0 % of ε" in view.table.rows[0][0]


def test_what_a_net_withstands_and_which_withstands_more() -> None:
    limits = Limits()
    assert withstands({"pgd": 0.5, "longer": 0.3, "clean": 0.9, "guess": 0.4}, limits) == {"pgd": 0.5, "longer": 0.3}
    assert withstands({"pgd": 0.5, "guess": 1.2}, limits) == withstands({"pgd": 0.5, "one_class": 0.95}, limits) == {}
    assert better({"pgd": 0.1}, {})
    assert not better({"pgd": 0.0}, {}), "nothing is no more than nothing"
    assert not better({}, {})
    assert not better({}, {"pgd": 0.0})
    assert better({"pgd": 0.4, "longer": 0.1}, {"pgd": 0.3}), "by the attacks that both were read with"
    assert not better({"pgd": 0.6, "longer": 0.1}, {"pgd": 0.3, "longer": 0.2}), "by the strongest of them"
    assert not better({"pgd": 0.3}, {"pgd": 0.3})
    assert better({"pgd": 0.5}, {"pgd": 0.45})
    assert not better({"pgd": 0.5}, {"pgd": 0.45}, images=64), "luck"
    assert better({"pgd": 0.5}, {"pgd": 0.45}, images=10_000)
    assert better({"pgd": 0.5}, {}, images=4), "a net that guesses is no matter of luck"


LOST = {**HONEST, "guess": 1.3, "one_class": 1.0}
KNEW = {**HONEST, "guess": 0.3, "one_class": 0.2}
EDGE = {**HONEST, "guess": 0.85, "one_class": 0.5}


def test_a_net_that_falls_back_to_guessing_rings_at_once() -> None:
    assert found(KNEW, KNEW) == set()
    assert found(KNEW, LOST) == {"guessing"}
    assert found(KNEW, {**KNEW, "one_class": 0.95}) == {"guessing"}
    (alarm,) = judge(history(KNEW, LOST), Limits())
    assert "no better than guessing: its clean accuracy is 77 % of what luck alone reaches once in 100" in alarm.text
    assert "100 % of the images of other classes get one and the same answer" in alarm.text
    assert found(EDGE, LOST) == set(), "that net had hardly learned anything: it is waited for"


def test_a_net_that_starts_by_guessing_is_given_time() -> None:
    """Readings at steps 0, 10, 20, …: three of them, and the steps of grace."""

    def rings(*rows: dict[str, float], grace: int = 0) -> bool:
        return bool(judge(history(*rows), Limits(), ("guessing",), grace))

    assert not rings(LOST)
    assert not rings(LOST, LOST)
    assert rings(LOST, LOST, LOST)
    assert not rings(LOST, LOST, LOST, grace=21)
    assert rings(LOST, LOST, LOST, grace=20)
    assert not rings(*[LOST] * 20, grace=191)
    assert not rings(LOST, LOST, EDGE), "a start"
    assert not rings(LOST, LOST, EDGE, LOST)
    assert rings(LOST, LOST, EDGE, LOST, LOST, LOST)
    assert not rings(*[HONEST] * 5), "what was not read says nothing"
    assert "guess" not in indicators(history(LOST))
    assert indicators(history(LOST, {**LOST, "guess": 1.1}, LOST))["guess"] == 1.1


def test_the_last_reading_of_a_run_waits_for_nothing() -> None:
    def rings(*rows: dict[str, float]) -> bool:
        return bool(judge(history(*rows), Limits(), ("guessing",), grace=None))

    assert rings(LOST)
    assert rings(LOST, LOST)
    assert not rings(LOST, EDGE)
    assert not rings(EDGE, LOST), "it had begun to learn: no better than before, but not blind"


def test_masked_gradients_stay_masked_until_a_reading_measures_that_they_are_not() -> None:
    sick, well = {**HONEST, "noise_wins": 0.3, "step_gain": 0.0}, {**HONEST, "noise_wins": 0.0, "step_gain": 0.0}
    assert found(sick) == found(sick, HONEST) == found(sick, HONEST, {"nonfinite": 0.0}) == {"masked"}
    assert found(sick, well) == found(sick, well, HONEST) == found(well, HONEST) == set()
    (alarm,) = judge(history(sick, HONEST), Limits())
    assert (alarm.values, alarm.step) == ({"noise_wins": 0.3}, 10)
    assert found({**HONEST, "zero_gradient": 0.9}, HONEST) == set(), "what each reading measures is as it is now"


def test_robust_overfitting_is_a_fall_while_training_goes_on_to_win() -> None:
    best, worse = {"robust": 0.5, "train_robust": 0.5}, {"robust": 0.3, "train_robust": 0.7}
    assert found(best, worse) == {"overfitting"}
    assert indicators(history(best, worse))["behind"] == pytest.approx(0.2)
    assert found(best, {"robust": 0.3, "train_robust": 0.3}) == set(), "both fell: no overfitting"
    assert found(best, {}, {"robust": 0.47, "train_robust": 0.9}) == set()
    assert found(worse, best) == set()


VALUES = st.fixed_dictionaries({}, optional={c.name: st.floats(0, 1) for c in CHECKS if c.name not in ("fall", "behind")})
LIMITS = st.builds(Limits, **{field.name: st.none() | st.floats(0, 1) for field in fields(Limits)})


@given(st.lists(VALUES, min_size=1, max_size=4), LIMITS, st.floats(0, 1))
def test_wider_limits_never_raise_an_alarm_and_a_steady_run_never_falls(rows, limits, by) -> None:
    wider = Limits(**{f.name: None if (v := getattr(limits, f.name)) is None else min(1.0, v + by) for f in fields(Limits)})
    assert found(*rows, limits=wider) <= found(*rows, limits=limits)
    off = Limits(**{f.name: None for f in fields(Limits)})
    assert found(*rows, limits=off) <= {"nonfinite"}
    assert indicators(history({"pgd": 0.3}, {"pgd": 0.3}))["fall"] == 0
    assert judge(history(*rows), limits, ()) == ()


def test_a_reading_that_is_no_number_is_no_good_news() -> None:
    assert found({**HONEST, "gap": float("nan")}) == {"catastrophic"}


@pytest.mark.parametrize("value", [-0.1, 1.5, "much", True, float("nan")])
def test_limits_are_shares(value) -> None:
    with pytest.raises(ValueError, match=r"health\.limits\.gap: expected null or a share"):
        Limits(gap=value)


def test_every_check_has_a_limit_and_a_kind() -> None:
    assert {check.name for check in CHECKS if check.unit == "points"} == set(POINTS), "alarm and panel agree"
    assert {check.name for check in CHECKS} == {field.name for field in fields(Limits)} | {"nonfinite"}
    assert {check.kind for check in CHECKS} == set(KINDS)


# ---- safety measures --------------------------------------------------------------------------------------------------


def test_safer_attacks() -> None:
    noisy = safer(FGSM(Linf("8/255"), seed=5), "noise")
    assert isinstance(noisy, NFGSM)
    assert (noisy.step_size, noisy.noise_ball.eps, noisy.seed) == (8 / 255, 16 / 255, 5)
    for attack in (FGSM(Linf("8/255")), FGSMRS(Linf("8/255")), NFGSM(Linf("8/255"))):
        twice = safer(attack, "two_steps")
        assert isinstance(twice, PGD)
        assert twice.threat.eps == pytest.approx(8 / 255)
        assert (twice.steps, twice.step_size) == (2, pytest.approx(4 / 255))
    shorter = safer(PGD(L2(0.5), steps=4, step_size=0.3), "smaller_step")
    assert shorter.step_size == pytest.approx(0.15)
    assert shorter.threat.eps == 0.5
    assert isinstance(safer(PGD(BALL, 1, 0.03, "bernoulli", objective=NuclearCE()), "two_steps").objective, NuclearCE)


def test_measures_that_are_not_about_an_attack() -> None:
    assert safer(NFGSM(BALL), "noise") is None
    assert safer(PGD(BALL, 10), "noise") is None
    assert safer(PGD(BALL, 10), "two_steps") is None
    assert safer(FGSM(BALL), "lower_rate") is None
    for short in (FGSM(BALL), NFGSM(BALL), PGD(BALL, 2, BALL.eps / 2), PGD(L2(0.5), steps=4, step_size=0.2)):
        assert safer(short, "smaller_step") is None, "it would no longer reach the edge: another, weaker threat"
    for name in ("noise", "two_steps", "smaller_step"):
        assert safer(None, name) is None
        assert safer(Free(BALL), name) is None
    with pytest.raises(ValueError, match=r"health\.safer"):
        safer(FGSM(BALL), "prayer")


# ---- what is shown ----------------------------------------------------------------------------------------------------


def test_the_panel_says_whether_the_defense_is_healthy() -> None:
    values = {"gap": 0.31, "dead": 0.1, "misalignment": 0.4, "pgd": 0.2}
    well = health_view(values, {"gap": 0.5, "dead": 0.5, "misalignment": None})
    assert well.headline.startswith("Healthy")
    assert well.name == "health"
    bad = health_view(values, {"gap": 0.2, "dead": 0.5, "misalignment": None}, "catastrophic overfitting: …", 40, "N-FGSM")
    assert "Not healthy: catastrophic overfitting" in bad.headline
    assert "N-FGSM" in bad.headline
    rows = {row[0]: row[1:] for row in bad.charts[0].rows}
    assert rows["FGSM − strongest PGD accuracy"] == ("31.0 points", "20.0 points", "⚠ beyond")
    assert rows["dead units, worst layer"] == ("10.0 %", "50.0 %", "✓ within")
    assert rows["misaligned gradients, 1 − cos"][1:] == ("–", "not judged")
    used = bad.charts[1]
    assert used.values == pytest.approx((0.31 / 0.2, 0.1 / 0.5))
    assert bad.scalars["health/pgd"] == 0.2
    for view in (well, bad):
        assert view.answers == (Answer("healthy", view.headline),), "page and panel agree"
    told = health_view(values, {"gap": 0.2}, "dead units: …", remedy="half the learning rate", command="python train.py …")
    assert told.answers == (Answer("healthy", f"{told.headline} To try: half the learning rate.", "python train.py …"),)
    assert bad.table is bad.charts[0]


def test_the_panel_says_of_which_images_and_when_a_number_is() -> None:
    values = {"gap": 0.1, "dead": 0.1, "noise_wins": 0.05}
    view = health_view(values, {"gap": 0.2, "noise_wins": 0.1}, step=40, held={"noise_wins": 10}, images=(64, 32))
    assert [row[0] for row in view.charts[0].rows] == [
        "FGSM − strongest PGD accuracy",
        "right under PGD, wrong under noise, read at step 10",
        "dead units, worst layer, first 32 images",
    ]
    assert view.scalars.keys() == {"health/gap", "health/dead"}, "a number is logged where it was measured"
    assert "first" not in health_view(values, {}, images=(20, 20)).charts[0].rows[-1][0], "all of them"
    guess = health_view(values, {"gap": 0.2}, guesses=True)
    assert guess.headline.startswith("No better than guessing so far; healthy: none of 1")
    assert "so far" not in health_view(values, {"gap": 0.2}, "no better than guessing: …", guesses=True).headline


def test_the_page_keeps_alarms_and_a_resumed_run_forgets_later_ones(tmp_path) -> None:
    page = ReportPage(tmp_path, "run")
    page.add_alarm(1, 20, "catastrophic overfitting: …", "rolled back")
    ReportPage(tmp_path, "run").add_alarm(3, 60, "dead units <b>", "warned")
    again = ReportPage(tmp_path, "run")
    manifest = lambda: read_script(tmp_path / "data" / "manifest.js")["alarms"]  # noqa: E731
    assert [(a["epoch"], a["step"], a["action"]) for a in manifest()] == [(1, 20, "rolled back"), (3, 60, "warned")]
    again.drop_alarms(20)
    assert [a["step"] for a in manifest()] == [20]


def test_what_a_reading_costs() -> None:
    """Forwards of a reading, in passes over the images: what the docstring of ``measure`` says."""
    net = conv_bn()
    images, seen = of(net, n=FEW + 4), []
    layouts_of(net, images.x)  # learned once
    net.register_forward_pre_hook(lambda _m, inputs: seen.append(len(inputs[0])))
    for thorough, passes in ((False, 3 + 4), (True, 3 + 4 + 5 * 3 + 6)):
        seen.clear()
        measure(net, images, BALL, LAYERS, steps=3, thorough=thorough)
        assert sum(seen) == passes * (FEW + 4) + 8 * FEW + 40
