"""Sanity checks: what must fail fails, what must pass passes, and a share of few images proves little."""

from __future__ import annotations

from functools import cache
from math import comb

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.evaluation.gradient import (
    gradient_error,
    has_gradient,
    largest_jump,
    rounding,
    watched,
    zero_gradients,
)
from glassarmor.defenses.evaluation.sampling import luck
from glassarmor.defenses.evaluation.sanity import (
    LIMITS,
    Check,
    SanityReport,
    guess_check,
    lower_limit,
    sanity_checks,
    share_check,
    suite_check,
)
from glassarmor.defenses.threat import L2, Linf
from glassarmor.lightning_modules.cards.report import sanity_table
from tests.honest import EPS as HONEST_EPS
from tests.honest import FAMILIES, IMAGES, Median
from tests.honest import trained as honest
from tests.planted import CUTS, DEFENSES, Cut, Planted, Saturated, Shattered
from tests.reference.nets import Linear, batch, conv_bn, seeded, smooth, unchanged, untidy
from tests.reference.trained import images

EPS = 0.03


@cache
def weights(robust: bool, seed: int) -> dict[str, Tensor]:
    """Of a small net trained in seconds, as usual or on PGD-3."""
    net = conv_bn(seed=seed)
    x, y = images(512, seed=seed + 10)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    attack = PGD(Linf(EPS), steps=3, seed=seed)
    for step in range(80):
        rows = torch.arange(step * 64, step * 64 + 64) % 512
        batch = attack(net, x[rows], y[rows]) if robust else x[rows]
        optimizer.zero_grad()
        F.cross_entropy(net.train()(batch), y[rows]).backward()
        optimizer.step()
    return net.state_dict()


def trained(robust: bool = True, seed: int = 0) -> nn.Sequential:
    net = conv_bn()
    net.load_state_dict(weights(robust, seed))
    return net.eval()


def judged(net: nn.Module, n: int = 64, seed: int = 0, **options) -> SanityReport:
    x, y = images(n, seed=seed + 50)
    return sanity_checks(net, x, y, Linf(EPS), **{"queries": 60, "steps": 10} | options)


def outcome(report: SanityReport, name: str) -> Check:
    (found,) = [check for check in report.checks if check.name == name]
    return found


# Intervals and the verdict


@pytest.mark.parametrize(("count", "n"), [(1, 16), (8, 256), (16, 16), (100, 1000)])
def test_the_lower_limit_is_exact(count, n):
    """At the limit, so many or more are seen once in a hundred times."""
    p = lower_limit(count, n)
    tail = sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(count, n + 1))
    assert tail == pytest.approx(0.01, rel=1e-6)
    assert lower_limit(0, n) == 0


def test_a_share_of_few_images_proves_little():
    assert LIMITS["PGD ≥ FGSM"] == (0.01, 0.05)
    assert share_check("PGD ≥ FGSM", 7, 256, "").passed
    assert not share_check("PGD ≥ FGSM", 8, 256, "").passed
    assert share_check("PGD ≥ FGSM", 1, 16, "").passed  # 6 %, but of 16
    assert not share_check("PGD ≥ FGSM", 8, 256, "").grave
    assert share_check("PGD ≥ FGSM", 64, 256, "").grave
    found = share_check("PGD ≥ FGSM", 64, 256, "fall")
    assert found.figure == 0.25
    assert found.sentence.startswith("64 of 256 images fall (25.0 %, at least 18.")


def test_the_verdict_follows_from_the_checks():
    passed = Check("a", True, 0.0, "", "fine")
    failed = Check("b", False, 0.1, "", "odd")
    grave = Check("c", False, 0.9, "", "broken", grave=True)
    assert SanityReport((passed,)).verdict == "trusted"
    assert SanityReport((passed,)).reasons == ()
    assert SanityReport((passed, failed)).verdict == "suspicious"
    both = SanityReport((failed, passed, grave))
    assert both.verdict == "invalid"
    assert both.reasons == ("broken", "odd")
    table = sanity_table(both)
    assert "invalid" in table.title
    assert [row[:2] for row in table.rows] == [("b", "failed"), ("a", "passed"), ("c", "failed")]
    assert all(len(row) == len(table.columns) for row in table.rows)


# The gradient


def test_the_slope_of_a_linear_and_of_a_smooth_net_is_exact():
    net = Linear((2, 4, 4), 3)
    x, _, y = batch(n=6, size=4, channels=2, classes=3)
    assert gradient_error(net, x, y).max() < 1e-12
    assert gradient_error(smooth().float(), x, y).max() < 1e-8
    assert not zero_gradients(net, x, y).any()


class HalfDetached(nn.Module):
    """Z = a², half of it detached: the reported gradient is half the true one."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.linear, self.cut = Linear((2, 4, 4), 3), cut

    def forward(self, x: Tensor) -> Tensor:
        a = self.linear(x)
        return a * (a.detach() if self.cut else a)


def test_what_a_detached_factor_misses_in_closed_form():
    """Half the slope in every direction: (1 − ½)² / (1 + ½²) = 0.2."""
    x, _, y = batch(n=6, size=4, channels=2, classes=3)
    torch.testing.assert_close(gradient_error(HalfDetached(True), x, y), torch.full((6,), 0.2), rtol=1e-4, atol=0)
    assert gradient_error(HalfDetached(False), x, y).max() < 1e-6


class InSinglePrecision(Planted):
    """Cannot run in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.net(x.float()).float(), torch.eye(3))


def test_the_slope_in_single_precision():
    """Where the net has no float64 copy, tolerances still tell right from wrong."""
    x, _, y = batch(n=6, size=4, channels=2, classes=3)
    assert gradient_error(InSinglePrecision(HalfDetached(False)), x, y).max() < 0.01
    assert gradient_error(InSinglePrecision(HalfDetached(True)), x, y).min() > 0.1


either = pytest.mark.parametrize("robust", [False, pytest.param(True, marks=pytest.mark.long)], ids=["undefended", "PGD-AT"])


class HalfFloats(Planted):
    """Computes in half floats inside: by autocast, or from a rounded image on."""

    def __init__(self, net: nn.Module, kind: torch.dtype, autocast: bool) -> None:
        super().__init__(net)
        self.kind, self.autocast = kind, autocast

    def forward(self, x: Tensor) -> Tensor:
        if not self.autocast:
            return self.net(x.to(self.kind).to(x.dtype))
        with torch.autocast("cpu", self.kind):
            return self.net(x).float()


HALF_FLOATS = [(torch.bfloat16, True), pytest.param(torch.bfloat16, False, marks=pytest.mark.long), (torch.float16, False)]


@pytest.mark.long
@pytest.mark.parametrize(("kind", "autocast"), HALF_FLOATS, ids=["bf16 autocast", "bf16 images", "fp16 images"])
@either
def test_rounding_inside_is_said_and_is_no_more_than_suspicious(robust, kind, autocast):
    net = HalfFloats(trained(robust), kind, autocast)
    assert rounding(net, images(2, seed=1)[0]) == torch.finfo(kind).eps / 2
    report = judged(net)
    assert report.verdict == "suspicious"
    (reason,) = report.reasons
    assert f"rounds inside to about {8 if kind == torch.bfloat16 else 11} bits" in reason
    assert "gradients beat Square" in {check.name for check in report.checks}, "the attacks have run"


@pytest.mark.long
def test_what_a_rounding_net_detaches_is_called_out_all_the_same():
    class Half(Planted):
        def forward(self, x: Tensor) -> Tensor:
            return self.net((x + x.detach()) / 2)

    class Levels(Planted):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x + ((x * 15).round() / 15 - x).detach())

    assert rounding(trained(), images(2, seed=1)[0]) == 0
    for hidden in (Half(trained()), DEFENSES["detached gate"](trained()), DEFENSES["quantised input"](trained())):
        report = judged(HalfFloats(hidden, torch.bfloat16, True))
        assert report.verdict == "invalid", type(hidden)
    assert judged(Levels(trained(False)), n=16, steps=2, queries=3).verdict != "trusted"


def test_zero_gradients():
    net = Linear((2, 4, 4), 3)
    x, _, _ = batch(n=6, size=4, channels=2, classes=3)
    y = net(x).argmax(1)
    top = net(x).detach().topk(2, 1).values
    scale = 60 / (top[:, 0] - top[:, 1])  # the second class at exp(−60), as the first is at 1

    class Scaled(Planted):
        factor = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * (scale * self.factor)[:, None]

    scaled = Scaled(net)
    assert not zero_gradients(scaled, x, y).any()
    scaled.factor = 2.0  # exp(−120) is no number of fp32
    assert zero_gradients(scaled, x, y).all()

    class Broken(Planted):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + (0 * x).sqrt().flatten(1).sum(1, keepdim=True)  # slope ∞ · 0

    assert zero_gradients(Broken(net), x, y).all()
    assert zero_gradients(DEFENSES["argmax"](net), x, y).all()


def test_autograd_inside_a_forward_is_seen():
    class Steered(Planted):
        def forward(self, x: Tensor) -> Tensor:
            inner = x.detach().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(self.net(inner).max(1).values.sum(), inner)
            return self.net(x + gradient.sign() * 0.01)

    class Cut(Planted):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                mask = x > 0.5
            return self.net(x * mask)

    x = torch.rand(2, 3, 8, 8)
    net = trained()
    assert watched(net, x) == ([], [])
    assert watched(Steered(net), x) == (["grad", "requires_grad_"], ["detach"])
    assert watched(Cut(net), x) == ([], ["no_grad"])
    assert not outcome(judged(Steered(net), n=16, steps=2, queries=3), "no autograd inside forward").passed


# Whole networks


@pytest.mark.parametrize("robust", [False, True], ids=["undefended", "PGD-AT"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 6))])
def test_honest_nets_are_trusted(robust, seed):
    report = judged(trained(robust, seed), seed=seed, transfer_from=trained(False, seed + 1))
    assert report.reasons == ()
    assert report.verdict == "trusted"
    assert {check.name for check in report.checks} >= set(LIMITS) - {"suite against the checks"}
    accuracy = report.accuracy
    assert accuracy["clean"] >= accuracy["FGSM"] >= accuracy["gradient attacks"] >= accuracy["with transfer"]
    if not robust:
        assert accuracy["gradient attacks"] < 0.5 < accuracy["clean"]


def test_honest_nets_are_trusted_on_few_images():
    for seed in range(2):
        assert judged(trained(False), n=16, seed=seed).verdict == "trusted"


CALLED_BY = {
    "quantised input": "gradients are not zero",
    "saturated logits": "gradients are not zero",
    "noise": "deterministic",
    "random resize": "deterministic",
    "compression in numpy": "gradients are not zero",
    "argmax": "outputs are logits",
    "detached gate": "gradient is the slope",
    "probabilities": "outputs are logits",
}


@either
@pytest.mark.parametrize("name", CALLED_BY)
def test_planted_defenses_are_called_out(name, robust):
    report = judged(DEFENSES[name](trained(robust)).eval())
    assert report.verdict == "invalid"
    assert outcome(report, CALLED_BY[name]).grave
    assert outcome(report, CALLED_BY[name]).sentence in report.reasons


@pytest.mark.parametrize("how", CUTS)
def test_no_gradient_is_a_reason_of_its_own(how):
    net = Cut(trained(), how)
    x, y = images(32, seed=50)
    y = torch.where(torch.arange(32) % 2 == 0, net(x).argmax(1), y)  # some are right, whatever is left of the net
    assert not has_gradient(net, x)
    report = sanity_checks(net, x, y, Linf(EPS))
    assert report.verdict == "invalid"
    assert outcome(report, "gradients are not zero").grave
    assert any("images have no gradient" in reason for reason in report.reasons)


def test_a_gradient_that_saturates_is_one():
    x, _ = images(8, seed=50)
    assert has_gradient(trained(), x)
    assert has_gradient(Saturated(trained()), x)
    assert has_gradient(Shattered(trained()), x)


@either
def test_winners_that_take_all_are_not_trusted(robust):
    """Its gradient is right wherever there is one; between, the outputs jump."""
    net = DEFENSES["winners take all"](trained(robust))
    report = judged(net)
    assert outcome(report, "gradient is the slope").passed
    jumps = outcome(report, "outputs do not jump")
    assert not jumps.passed
    assert not jumps.grave
    assert report.verdict != "trusted"


class Step(Planted):
    """Logits that jump by ``size`` where the first pixel crosses ½, beside the smooth ones of the net."""

    size = 0.3

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.size * (x[:, :1, 0, 0] > 0.5)


def test_the_size_of_a_jump_in_closed_form():
    """Wherever on the way it lies; and nothing where the way does not cross it, or for kinks and smooth nets."""
    net = Step(Linear((2, 4, 4), 3))
    x, _, _ = batch(n=6, size=4, channels=2, classes=3)
    ends = x.clone()
    x[:, 0, 0, 0] = torch.tensor([0.45, 0.499, 0.3, 0.6, 0.2, 0.1])
    ends[:, 0, 0, 0] = torch.tensor([0.55, 0.6, 0.51, 0.4, 0.49, 0.4])
    jumps = largest_jump(net, x, ends)
    torch.testing.assert_close(jumps, torch.tensor([0.3, 0.3, 0.3, 0.3, 0.0, 0.0]), rtol=1e-3, atol=1e-3)
    for continuous in (net.net, smooth().float(), InSinglePrecision(HalfDetached(False))):
        assert largest_jump(continuous, x, ends).max() < 1e-3
    x, _ = images(16, seed=3)
    assert largest_jump(trained(), x, (x + EPS).clamp(0, 1)).max() < 1e-3


def test_transfer_finds_what_gradients_hide():
    """The ripple's gradient is right, so only attacks that do not follow it can tell."""
    report = judged(Shattered(trained(False)), transfer_from=trained(False))
    assert outcome(report, "gradient is the slope").passed
    assert not outcome(report, "gradients are not zero").grave
    assert outcome(report, "gradients beat transfer").grave
    assert report.verdict == "invalid"


def test_a_thorough_look_at_zero_gradients_finds_them_useless():
    plain = judged(DEFENSES["quantised input"](trained(False)))
    assert "gradients beat Square" not in {check.name for check in plain.checks}
    report = judged(DEFENSES["quantised input"](trained(False)), thorough=True)
    assert outcome(report, "gradients beat Square").grave
    assert report.accuracy["with noise and Square"] < report.accuracy["gradient attacks"] - 0.15


def test_the_margin_sees_through_saturated_logits():
    report = judged(Saturated(trained(False)), thorough=True)
    assert outcome(report, "losses agree").grave
    assert outcome(report, "scale of the logits").grave


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_larger_and_smaller_logits_are_no_reproach(scale):
    class Scaled(Saturated):
        pass

    Scaled.scale = scale
    assert judged(Scaled(trained(False))).verdict == "trusted"


def test_outputs_that_are_no_logits():
    class LogSoftmax(Planted):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).log_softmax(1)

    class Sigmoid(Planted):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).sigmoid()

    logs = judged(LogSoftmax(trained()))
    assert logs.verdict == "trusted"  # neither cross-entropy nor margin sees the shift
    assert "log-probabilities" in outcome(logs, "outputs are logits").sentence
    assert not outcome(judged(Sigmoid(trained()), n=16, steps=2, queries=3), "outputs are logits").passed


@either
@pytest.mark.parametrize(("scale", "shift"), [(5, 0), (1, -0.1), (20, 3), (0.2, 0)])
def test_a_softmax_is_recognised_behind_a_scale_and_a_shift(robust, scale, shift):
    class Affine(Planted):
        def forward(self, x: Tensor) -> Tensor:
            return scale * self.net(x).softmax(1) + shift

    found = outcome(judged(Affine(trained(robust)), n=32), "outputs are logits")
    assert found.grave
    assert found.figure == pytest.approx(scale, rel=0.01)
    assert f"the outputs are {scale:.2g} · probabilities {shift:+.2g}: leave out the softmax" == found.sentence


@either
def test_a_softmax_is_recognised_behind_a_shift_of_each_class(robust):
    class Shifted(Planted):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).softmax(1) + torch.linspace(0, 0.1, 5)

    found = outcome(judged(Shifted(trained(robust)), n=32), "outputs are logits")
    assert found.grave
    assert found.sentence == "the outputs are 1 · probabilities, shifted by class: leave out the softmax"


@either
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_centred_logits_are_logits(robust, classes):
    """Their rows sum to zero, as those of a shifted softmax do; so do those of the two logits z and −z."""

    class Centred(Planted):
        def forward(self, x: Tensor) -> Tensor:
            logits = self.net(x)[:, :classes]
            return logits - logits.mean(1, keepdim=True)

    net = Centred(trained(robust))
    x, _ = images(64, seed=50)
    report = sanity_checks(net, x, net(x).argmax(1), Linf(EPS), queries=3, steps=2)
    assert outcome(report, "outputs are logits").passed


def test_a_softmax_of_two_classes_is_recognised():
    class Two(Planted):
        def forward(self, x: Tensor) -> Tensor:
            return 5 * (5 * self.net(x)[:, :2]).softmax(1) - 1

    x, _ = images(64, seed=50)
    net = Two(trained(False))
    report = sanity_checks(net, x, net(x).argmax(1), Linf(EPS), queries=3, steps=2)
    assert outcome(report, "outputs are logits").grave


def test_a_net_that_looks_at_the_whole_batch_is_invalid():
    class Centred(Planted):
        def forward(self, x: Tensor) -> Tensor:
            logits = self.net(x)
            return logits - logits.mean(0)

    report = judged(Centred(trained()))
    assert outcome(report, "deterministic").passed
    assert outcome(report, "independent of the batch").grave


class Decided(nn.Module):
    """A linear two-class net on interior images: everything that L∞ and L2 attacks do to it is known."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Linear((3, 4, 4), 2, seed=3)
        with torch.no_grad():
            self.net.head.weight.mul_(0.2)
            self.net.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - 0.5)


@pytest.mark.parametrize("threat", [Linf(0.02), L2(0.1)], ids=repr)
def test_accuracy_on_a_linear_net_is_the_closed_form(threat):
    net = Decided()
    x = torch.rand(96, 3, 4, 4, generator=seeded(5)) * 0.6 + 0.2
    margin = net(x).detach().diff(dim=1)[:, 0]
    y = (margin > 0).long()
    w = net.net.head.weight.detach().diff(dim=0)
    reach = threat.eps * (w.abs().sum() if threat.p > 2 else w.norm())
    report = sanity_checks(net, x, y, threat, queries=60)
    assert report.accuracy["clean"] == 1
    expected = float((margin.abs() > reach).double().mean())
    assert 0.1 < expected < 0.9
    assert report.accuracy["gradient attacks"] == pytest.approx(expected)
    assert report.accuracy["FGSM"] == pytest.approx(expected)
    assert report.verdict == "trusted"


def test_the_net_and_the_random_numbers_are_given_back():
    net = untidy(conv_bn(dropout=0.3))
    x, y = torch.rand(24, 3, 8, 8), torch.arange(24) % 5
    state = torch.get_rng_state()
    told: list[str] = []
    with unchanged(net):
        report = sanity_checks(net, x, y, Linf(EPS), queries=5, steps=2, thorough=True, tell=told.append)
        assert sanity_checks(net, x, y, Linf(EPS), queries=5, steps=2, thorough=True) == report
    assert torch.equal(torch.get_rng_state(), state)
    assert {"outputs", "gradients", "FGSM", "PGD-2", "PGD-10", "Square, 5 queries"} <= set(told)


def test_it_runs_under_inference_mode():
    net = trained()
    expected = judged(net, n=16, steps=2, queries=3)
    with torch.inference_mode():
        assert judged(net, n=16, steps=2, queries=3) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.rand(8, 3, 8, 8), "y": torch.zeros(8).long()}, "at least 16 images"),
        ({"y": torch.zeros(20).long()}, r"labels: expected int64 \(24,\), one an image; found torch.int64 \(20,\)"),
        ({"x": torch.rand(24, 3, 8, 8) * 255}, r"images: expected values in \[0,1\], found"),
        ({"y": torch.full((24,), 7)}, "labels: expected 0..4, for the net returns 5 logits"),
        ({"threat": Linf(0)}, "threat.eps: expected a ball with a radius"),
        ({"threat": L2(100)}, "threat.eps: images live in"),
    ],
)
def test_bad_input_is_refused(change, message):
    good = {"x": torch.rand(24, 3, 8, 8), "y": torch.arange(24) % 5, "threat": Linf(EPS)}
    with pytest.raises(ValueError, match=message):
        sanity_checks(conv_bn().eval(), **good | change)


def test_a_net_that_is_always_wrong_is_invalid():
    net = trained()
    x, _ = images(32, seed=3)
    report = sanity_checks(net, x, (net(x).argmax(1) + 1) % 5, Linf(EPS))
    assert (report.verdict, report.accuracy) == ("invalid", {"clean": 0})
    assert "0 of 32 images are classified rightly, no better than guessing: 1e+02 % of guessers reach that" in report.reasons


def test_luck_is_the_exact_tail():
    """Of 10 answers of which the first class gets 6 and has 5 images, the second 4 and 5: a guesser is right by ½."""
    y, answers = torch.tensor([0] * 5 + [1] * 5), torch.tensor([0] * 5 + [1] * 4 + [0])
    assert luck(answers, y, 2) == pytest.approx(sum(comb(10, k) for k in range(9, 11)) / 2**10)
    assert luck(answers, y, 1000) == luck(answers, y, 2), "the labels that exist decide, not how many logits there are"
    assert luck(torch.zeros(100, dtype=torch.long), torch.tensor([0] * 90 + [1] * 10), 2) > 0.5, "the best constant answer"


class Biased(Planted):
    """Its own logits, and so much of the first class that it answers nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + torch.tensor([100.0, 0, 0, 0, 0])


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_a_net_of_one_answer_withstands_everything_and_is_invalid(classes):
    x, _ = images(64, seed=50)
    report = sanity_checks(Biased(trained()), x, torch.arange(64) % classes, Linf(EPS), steps=2, queries=3)
    assert report.verdict == "invalid"
    assert outcome(report, "better than guessing").sentence.endswith("guessing: all images get one and the same answer")


def test_random_weights_are_invalid_and_few_right_answers_suspicious():
    x, y = images(64, seed=50)
    report = sanity_checks(conv_bn(seed=4).eval(), x, y, Linf(EPS), steps=2, queries=3)
    assert outcome(report, "better than guessing").grave, report.accuracy
    assert "no better than guessing" in report.reasons[0]
    assert [guess_check(chance, 9, 16, 2).grave for chance in (0.009, 0.04, 0.06)] == [False, False, True]
    assert [guess_check(chance, 9, 16, 2).passed for chance in (0.009, 0.04, 0.06)] == [True, False, False]


def test_a_suite_that_is_weaker_than_the_checks_is_not_trusted():
    def places(rows):
        held = torch.zeros(200, dtype=torch.bool)
        held[list(rows)] = True
        return held

    report = SanityReport((), {"clean": 0.9, "with noise and Square": 0.5}, 200, tuple(places(range(100)).tolist()))
    # As many withstand both, but others: the suite missed 30 images.
    assert suite_check(places(range(30, 130)), report) == suite_check(places(range(130)), report)
    assert suite_check(places(range(100)), report).passed
    assert suite_check(places(range(102)), report).passed, "an image or two are chance"
    weaker = suite_check(places(range(130)), report)
    assert not weaker.passed
    assert weaker.figure == pytest.approx(0.15)
    assert not weaker.grave
    assert suite_check(places(range(160)), report).grave


# Flat areas, and the suite that is judged


class Flat(nn.Module):
    """The largest, or the median, of each neighbourhood, summed with weights: kinks wherever neighbours are equal."""

    def __init__(self, median: bool) -> None:
        super().__init__()
        self.filter = Median() if median else nn.MaxPool2d(3, 1, 1)
        self.head = nn.Linear(3 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.filter(x).flatten(1))


@pytest.mark.parametrize("median", [False, True], ids=["max-pooling", "median"])
@pytest.mark.parametrize("level", [0.0, 0.003, 0.5, 0.999, 1.0])
def test_flat_areas_are_no_wrong_gradient(level, median):
    """Black, white and grey: the gradient of an honest net is its slope."""
    torch.manual_seed(0)
    x, y = images(32, seed=1)
    x[:, :, 2:] = level
    net = Flat(median)
    missed = gradient_error(net, x, y)
    assert (missed > 0.01).float().mean() < 0.15
    assert missed.max() < 0.1
    assert gradient_error(Cut(net, "detach"), x, y).min() == 1, "and a cut one is not"


def test_only_what_stands_in_the_suite_counts_against_it():
    """PGD with one loss misses what the suite felled: that says nothing of the suite."""
    net = Saturated(trained())
    x, y = images(64, seed=50)
    right = net(x).argmax(1) == y
    options = {"steps": 10, "queries": 60, "thorough": True}
    alone = sanity_checks(net, x, y, Linf(EPS), **options)
    standing = torch.tensor(alone.standing)
    weak, strong = (sanity_checks(net, x, y, Linf(EPS), held=held, **options) for held in (right, standing))
    assert outcome(alone, "scale of the logits").figure == outcome(weak, "scale of the logits").figure > 0
    assert outcome(weak, "suite against the checks").grave
    for check in strong.checks:
        if check.name in (*ATTACKED, "suite against the checks"):
            assert check.passed, check
            assert check.figure == 0 or check.name == "nothing withstands a large ε"
    with pytest.raises(ValueError, match=r"held: expected bool \(64,\)"):
        sanity_checks(net, x, y, Linf(EPS), held=right[1:])


ATTACKED = (
    "PGD ≥ FGSM",
    "enough steps",
    "enough restarts",
    "losses agree",
    "scale of the logits",
    "gradients beat noise",
    "gradients beat Square",
)


class Unanswered(Planted):
    """No number for the first images of a batch that are bright."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).masked_fill((x.mean((1, 2, 3)) > 0.5)[:, None], torch.nan)


def test_logits_that_are_no_numbers_are_counted():
    x, y = images(64, seed=50)
    bright = int((x.mean((1, 2, 3)) > 0.5).sum())
    assert 0 < bright < 64
    report = sanity_checks(Unanswered(trained()), x, y, Linf(EPS))
    assert report.verdict == "invalid"
    assert report.reasons == (f"{bright} of 64 images have logits that are not finite",)


@pytest.mark.parametrize("family", ["max-pool on the image", "perceptron"])
def test_an_honest_net_on_black_images_is_trusted(family):
    """A handful of what ``benchmarks/verdicts.py`` judges."""
    net = honest(family, "black", steps=80, robust=False)
    x, y = IMAGES["black"](32, 7)
    report = sanity_checks(net, x, y, Linf(0.03), steps=5, queries=20)
    assert report.verdict == "trusted", report.reasons


@pytest.mark.long
@pytest.mark.parametrize("images_", IMAGES)
def test_honest_nets_of_all_families_are_never_invalid(images_):
    verdicts = {}
    for family in FAMILIES:
        x, y = IMAGES[images_](64, 7)
        verdicts[family] = sanity_checks(honest(family, images_), x, y, Linf(HONEST_EPS), queries=100).verdict
    assert "invalid" not in verdicts.values(), verdicts
    assert [*verdicts.values()].count("suspicious") <= 1, verdicts
