"""Suites: who is attacked by what, who fell to what, what is counted, and that a stopped evaluation ends the same."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from torch import Tensor, nn

from glassarmor.defenses import L2, PGD, Linf, evaluate_robustness, make_suite
from glassarmor.defenses.attacks.apgd import APGD
from glassarmor.defenses.attacks.autoattack import AutoAttackPart
from glassarmor.defenses.attacks.square import Square
from glassarmor.defenses.evaluation.corruptions import CORRUPTIONS, corrupted_accuracy
from glassarmor.defenses.evaluation.fingerprint import described, net_hash
from glassarmor.defenses.evaluation.robustness import STANDS, WRONG, Progress
from glassarmor.defenses.evaluation.sampling import stratified_rows, wilson
from glassarmor.defenses.evaluation.sanity import Noise
from glassarmor.defenses.evaluation.suite import Step, Suite, Transfer
from glassarmor.defenses.masking import UnitMask, masked
from glassarmor.defenses.threat import Threat
from glassarmor.defenses.training.regularizers import PSE
from tests.defenses.test_apgd import mlp
from tests.planted import CUTS, SAME, Cut
from tests.reference.nets import Linear, conv_bn, seeded, unchanged, untidy


class Threshold(nn.Module):
    """Class 1 where the first pixel is above ½; the second pixel is an image's name, and moves nothing."""

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0, 0, 0]
        return torch.stack([0.5 - first, first - 0.5], 1)


class Names:
    """Fells the images of these names by moving their first pixel by ``size``; remembers whom it was given."""

    def __init__(self, names: set[int], size: float = 0.2) -> None:
        self.names, self.size = names, size
        self._seen: list[list[int]] = []
        self._calls: list[int] = []

    threat = Linf(0.2)

    def reseed(self, call: int) -> None:
        self._calls.append(call)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        names = (x[:, 0, 0, 1] * 100).round().long().tolist()
        self._seen.append(names)
        move = torch.tensor([self.size if name in self.names else 0.0 for name in names])
        x_adv = x.clone()
        x_adv[:, 0, 0, 0] += torch.where(y == 1, -move, move)
        return x_adv


def named(n: int = 10) -> tuple[Tensor, Tensor]:
    """Images 0..n−1 of class i mod 2, 0.1 from the threshold; the last is mislabelled."""
    x = torch.zeros(n, 1, 1, 2)
    y = torch.arange(n) % 2
    x[:, 0, 0, 0] = torch.where(y == 1, 0.6, 0.4)
    x[:, 0, 0, 1] = torch.arange(n) / 100
    y[-1] = 1 - y[-1]
    return x, y


def test_the_books_are_right_with_hand_made_attacks() -> None:
    x, y = named()
    attacks = [Names({0, 1, 2}), Names({2, 3, 9}), Names({5}, size=0.3), Names(set())]
    suite = Suite("hand", tuple(Step(f"a{i}", attack) for i, attack in enumerate(attacks)))
    net = Threshold()
    found = evaluate_robustness(net, x, y, Linf(0.2), suite, batch_size=4)
    assert found.felled_by == ("a0", "a0", "a0", "a1", None, None, None, None, None, "clean")
    assert found.felled.tolist() == [0, 0, 0, 1, STANDS, STANDS, STANDS, STANDS, STANDS, WRONG]
    assert found.standing.tolist() == [False] * 4 + [True] * 5 + [False]
    # Only those that stand are attacked, in batches of four; nobody is who was misclassified before.
    assert attacks[0]._seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert attacks[1]._seen == [[3, 4, 5, 6], [7, 8]]
    # The third left the ball: its images are misclassified, and do not count.
    assert attacks[2]._seen == attacks[3]._seen == [[4, 5, 6, 7], [8]]
    assert attacks[0]._calls == [0, 1, 2]
    assert [(a.attacked, a.felled, a.accuracy) for a in found.attacks] == [
        (9, 3, 0.6),
        (6, 1, 0.5),
        (5, 0, 0.5),
        (5, 0, 0.5),
    ]
    assert (found.clean_accuracy, found.accuracy, found.n) == (0.9, 0.5, 10)
    assert found.interval == wilson(5, 10)
    record = json.loads(json.dumps(found.record()))
    assert record["felled_by"][3] == "a1"
    assert record["standing"] == found.standing.tolist()


def test_the_order_of_attacks_decides_who_felled_but_not_who_stands() -> None:
    x, y = named()
    one, two = Step("one", Names({0, 1, 2})), Step("two", Names({2, 3}))
    found = [evaluate_robustness(Threshold(), x, y, Linf(0.2), Suite("s", steps)) for steps in ((one, two), (two, one))]
    assert torch.equal(found[0].standing, found[1].standing)
    assert found[0].felled_by[2] == "one"
    assert found[1].felled_by[2] == "two"


class Stop(Exception):
    """The process was killed."""


def interrupted(after: int):
    told: list[Progress] = []

    def progress(now: Progress) -> None:
        told.append(now)
        if len(told) == after:
            raise Stop

    return progress


def real_suite(threat) -> Suite:
    return Suite(
        "s", (Step("pgd", PGD(threat, 3, step_size=threat.eps / 8), 6), Step("apgd", APGD(threat, 5, restarts=2), 24))
    )


def test_a_stopped_evaluation_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    """Killed at each batch in turn, work of that batch lost: at the end the same numbers, counts of passes included."""
    net, threat = mlp(), Linf(0.03)
    x = torch.rand(40, 1, 6, 6, generator=seeded(1)) * 0.8 + 0.1
    y = net(x).argmax(1)
    whole = evaluate_robustness(net, x, y, threat, real_suite(threat), batch_size=8)
    assert 0 < int(whole.standing.sum()) < 40
    assert len(set(whole.felled.tolist())) == 3
    for after in range(1, 8):
        state = tmp_path / f"{after}.json"
        with pytest.raises(Stop):
            evaluate_robustness(
                net, x, y, threat, real_suite(threat), batch_size=8, state=state, progress=interrupted(after)
            )
        again = evaluate_robustness(net, x, y, threat, real_suite(threat), batch_size=8, state=state)
        assert torch.equal(again.felled, whole.felled)
        counts = [(a.attacked, a.felled, a.accuracy, a.forwards, a.backwards) for a in again.attacks]
        assert counts == [(a.attacked, a.felled, a.accuracy, a.forwards, a.backwards) for a in whole.attacks]
    # And a finished one does no work again.
    spent: list[Progress] = []
    evaluate_robustness(net, x, y, threat, real_suite(threat), batch_size=8, state=state, progress=spent.append)
    assert spent == []


@pytest.mark.parametrize("what", ["weights", "images", "settings"])
def test_something_else_starts_anew_and_says_so(tmp_path: Path, what: str) -> None:
    net, threat, state = mlp(), Linf(0.03), tmp_path / "state.json"
    x = torch.rand(16, 1, 6, 6, generator=seeded(1)) * 0.8 + 0.1
    y = net(x).argmax(1)
    with pytest.raises(Stop):
        evaluate_robustness(net, x, y, threat, real_suite(threat), batch_size=4, state=state, progress=interrupted(2))
    suite = real_suite(threat)
    if what == "weights":
        with torch.no_grad():
            net[3].bias[0] += 1e-3
    elif what == "images":
        x = x.clone()
        x[0, 0, 0, 0] += 0.01
    else:
        suite = replace(suite, steps=(suite.steps[0], Step("apgd", APGD(threat, 6, restarts=2), 24)))
    with pytest.warns(UserWarning, match=f"other {what}.*starting anew"):
        found = evaluate_robustness(net, x, y, threat, suite, batch_size=4, state=state)
    fresh = evaluate_robustness(net, x, y, threat, suite, batch_size=4)
    assert torch.equal(found.felled, fresh.felled)
    assert [a.forwards for a in found.attacks] == [a.forwards for a in fresh.attacks]
    state.write_text("{")
    with pytest.warns(UserWarning, match="no readable state"):
        evaluate_robustness(net, x, y, threat, suite, batch_size=4, state=state)


@pytest.mark.parametrize("threat", [Linf(0.03), pytest.param(L2(0.12), marks=pytest.mark.long)], ids=str)
def test_the_standard_attacks_give_the_packages_own_verdict(threat) -> None:
    """Image by image, against the package's own loop with the same seed; Square with fewer queries in both."""
    net = mlp(4)
    x = torch.rand(24, 1, 6, 6, generator=seeded(2)) * 0.8 + 0.1
    y = net(x).argmax(1)
    y[0] = (y[0] + 1) % 4
    package = AutoAttack(net, norm=threat.name, eps=threat.eps, seed=0, version="standard")
    package.apgd_targeted.n_target_classes = package.fab.n_target_classes = 3
    package.square.n_queries = 30
    _, predicted = package.run_standard_evaluation(x.clone(), y.clone(), batch_size=100)
    ours = make_suite("standard", threat, classes=4)
    assert [step.name for step in ours.steps] == ["APGD-CE", "APGD-T", "FAB-T", "Square"]
    ours.steps[3].attack.queries = 30
    before = torch.get_rng_state()
    with unchanged(net):
        found = evaluate_robustness(net, x, y, threat, ours)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found.standing, predicted == y)
    assert 0 < int(found.standing.sum()) < 23


@pytest.mark.parametrize(("name", "classes"), [("standard", 2), ("fast", 3)])
def test_suites_with_few_classes(name: str, classes: int) -> None:
    net = Linear((1, 3, 3), classes)
    x = torch.rand(6, 1, 3, 3, generator=seeded(3)) * 0.6 + 0.2
    y = net(x).argmax(1)
    suite = make_suite(name, Linf(0.05), classes)
    if name == "standard":
        suite.steps[3].attack.queries = 5
    found = evaluate_robustness(net, x, y, Linf(0.05), suite)
    assert "goes by the margin" in found.notes[0]
    with pytest.raises(ValueError, match="apgd-t needs 4 classes"):
        AutoAttackPart(Linf(0.05), "apgd-t")(net, x, y)


def test_the_package_says_nothing_of_its_settings(caplog: pytest.LogCaptureFixture) -> None:
    net = mlp(4)
    x = torch.rand(4, 1, 6, 6, generator=seeded(2))
    with caplog.at_level(logging.DEBUG):
        AutoAttackPart(Linf(0.05), "apgd-ce")(net, x, net(x).argmax(1))
        assert caplog.records == []
        logging.getLogger("auto-attack").info("of someone else")
    assert [record.message for record in caplog.records] == ["of someone else"]


class Rounded(nn.Module):
    """A net behind a step function: no gradient comes through."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 64).round() / 64)


@pytest.mark.long
@pytest.mark.parametrize("how", CUTS)
def test_a_net_without_gradient_is_judged_by_square(how: str) -> None:
    net, threat = mlp(5), Linf(0.05)
    x = torch.rand(20, 1, 6, 6, generator=seeded(4)) * 0.8 + 0.1
    hidden = Cut(net, how)
    y = hidden(x).argmax(1)
    with unchanged(hidden):
        found = evaluate_robustness(hidden, x, y, threat, "probe")
    assert [a.name for a in found.attacks] == ["Square"]
    assert (found.gradient, found.clean_accuracy, found.backwards) == (False, 1.0, 0)
    assert "no gradient reaches the images" in found.notes[0]
    if how in SAME:  # what Square finds on the net as it is, image by image
        bare = evaluate_robustness(net, x, y, threat, Suite("square", (Step("Square", Square(threat, 1000)),)))
        assert bare.gradient
        assert torch.equal(found.felled, bare.felled)
        assert 0 < found.accuracy < 1
    else:
        assert found.accuracy < 1
    assert found.fingerprint["weights"] == net_hash(hidden)


def test_a_net_without_gradient_keeps_transfers_and_a_suite_of_ones_own() -> None:
    net, threat = mlp(5), Linf(0.05)
    x = torch.rand(8, 1, 6, 6, generator=seeded(4)) * 0.8 + 0.1
    hidden = Cut(net, "no_grad")
    y = net(x).argmax(1)
    found = evaluate_robustness(hidden, x, y, threat, "adaptive", twin=net)
    assert [a.name for a in found.attacks] == ["Square", "transfer, CE", "transfer, margin"]
    own = evaluate_robustness(hidden, x, y, threat, Suite("own", (Step("pgd", PGD(threat, 2)),)))
    assert [a.name for a in own.attacks] == ["pgd"]
    assert "attacks of this suite that follow one find next to nothing" in own.notes[0]


class Numbers(Threshold):
    """The class itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


class Pair(Threshold):
    """Something else, and logits behind it."""

    def forward(self, x: Tensor) -> tuple[None, Tensor]:
        return None, super().forward(x)


class Training(Threshold):
    """Runs in training mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raise RuntimeError("no eval mode here")
        return super().forward(x)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Numbers(), r"found class numbers \(N,\), which tell no attack anything: return a score a class"),
        (Pair(), "found a tuple; say which entry holds them: output=NAME"),
        (Training(), r"runs in eval mode on images \(N, 1, 1, 2\), found RuntimeError: no eval mode here"),
        (nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), "runs in eval mode on images .*found RuntimeError: mat1 and mat2"),
    ],
    ids=["class numbers", "tuple", "training only", "other images"],
)
def test_what_no_attack_can_ask_is_refused_with_the_reason(net: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(net, *named(), Linf(0.1), "probe")


def test_the_adaptive_suite_tries_what_the_others_cannot() -> None:
    net = mlp()
    x = torch.rand(20, 1, 6, 6, generator=seeded(4)) * 0.8 + 0.1
    hidden = Rounded(net)
    y = hidden(x).argmax(1)
    threat = Linf(0.05)
    gradient = Suite("g", (Step("pgd", PGD(threat, 10)),))
    transfer = Suite("t", (Step("transfer", Transfer(net, PGD(threat, 10))),))
    by_gradient = evaluate_robustness(hidden, x, y, threat, gradient)
    by_transfer = evaluate_robustness(hidden, x, y, threat, transfer)
    assert by_transfer.accuracy < by_gradient.accuracy - 0.2
    whole = make_suite("adaptive", threat, 5, terms={"pse": PSE()}, twin=net)
    names = [step.name for step in whole.steps]
    assert names == [
        "APGD-CE",
        "APGD-T",
        "FAB-T",
        "Square",
        "APGD margin, 5 starts",
        "adaptive CrossEntropy, raises the terms",
        "adaptive Margin, raises the terms",
        "adaptive CrossEntropy, hides from the terms",
        "adaptive Margin, hides from the terms",
        "transfer, CE",
        "transfer, margin",
    ]
    bare = make_suite("adaptive", threat, 5)
    assert [step.name for step in bare.steps] == names[:5]
    assert make_suite("adaptive", threat, 5, terms={"pse": PSE()}, twin=net).notes == ()
    knew, moved = bare.notes
    assert "regularizers=" in knew
    assert "twin=" in moved
    assert make_suite("adaptive", threat, 5, twin=net).notes == (knew,)
    assert make_suite("fast", threat, 5).notes == ()


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.5)], ids=repr)
def test_the_strong_suites_nest(threat: Threat, classes: int) -> None:
    """The same attacks with the same settings, in the same order: what falls in one falls in the next."""
    suites = [make_suite(name, threat, classes, 3, {"pse": PSE()}, mlp()) for name in ("standard", "strong", "adaptive")]
    described_ = [[(step.name, json.dumps(described(step.attack))) for step in suite.steps] for suite in suites]
    for weaker, stronger in itertools.pairwise(described_):
        assert len(stronger) > len(weaker)
        assert stronger[: len(weaker)] == weaker
    assert [suite.subset for suite in suites] == [None, None, 1000]


SIZES = [(12, 20), (32, 48), (28, 20), (4, 4), (12, 12), (20, 28), (32, 32), (7, 9), (3, 30)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_square_runs_in_l2_on_images_of_any_size(size: tuple[int, int]) -> None:
    """The package's own where that can lay its first tiles, else ours, which a note says."""
    net = Linear((1, *size), 4)
    x = torch.rand(3, 1, *size, generator=seeded(5)) * 0.6 + 0.2
    y, threat = net(x).argmax(1), L2(0.01)
    part = AutoAttackPart(threat, "square", queries=4)
    package = part._attack(net, x.device, 0, 4)
    try:
        package.perturb(x, y)
        runs = True
    except (RuntimeError, ZeroDivisionError):
        runs = False
    assert part.replaced(size) != runs
    found = evaluate_robustness(net, x, y, threat, Suite("s", (Step("Square", part),)))
    assert found.accuracy == 1
    assert any("ours took its place" in note for note in found.notes) != runs


class Missing(Threshold):
    """No number for images of some brightness: under ``low`` or above ``high``."""

    low, high = 0.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        logits, mean = super().forward(x), x.mean((1, 2, 3))
        return torch.where(((mean < self.low) | (mean > self.high))[:, None], torch.nan, logits)


def test_images_without_finite_logits_are_counted_and_never_robust() -> None:
    x = torch.tensor([0.1, 0.3, 0.4, 0.7, 0.88]).view(-1, 1, 1, 1).expand(-1, 1, 1, 2)
    net, sound = Missing(), Threshold()
    y = sound(x).argmax(1)
    net.low, net.high = 0.2, 0.9
    suite = Suite("s", (Step("pgd", PGD(Linf(0.05), 5)), Step("noise", Noise(Linf(0.05)))))
    assert evaluate_robustness(sound, x, y, Linf(0.05), suite).unanswered == ()
    found = evaluate_robustness(net, x, y, Linf(0.05), suite)
    assert 0 in found.unanswered  # clean
    assert not found.standing[0]
    assert found.felled[0] == WRONG
    assert set(found.unanswered) >= {0}
    assert not any(found.standing[place] for place in found.unanswered)
    assert found.record()["unanswered"] == found.unanswered


@pytest.mark.long
def test_the_whole_adaptive_suite_runs_and_is_the_worst_case() -> None:
    net = conv_bn().eval()
    x = torch.rand(3, 3, 8, 8, generator=seeded(4)) * 0.8 + 0.1
    y, threat = net(x).argmax(1), Linf(0.02)
    suite = make_suite("adaptive", threat, 5, terms={"pse": PSE()}, twin=conv_bn(seed=1).eval())
    for step in suite.steps:  # the same attacks, shorter
        inner = getattr(step.attack, "attack", step.attack)
        for name in ("steps", "queries"):
            if hasattr(inner, name):
                setattr(inner, name, 2)
    with unchanged(net):
        found = evaluate_robustness(net, x, y, threat, suite)
    assert [a.attacked for a in found.attacks] == [3] * 11  # a net that nothing of this length fells: all are tried
    assert found.accuracy == 1


def test_masks_are_attacked_through() -> None:
    """A masked net is an ordinary net: its evaluation equals that of the same function written out."""
    net = conv_bn().eval()
    keep = torch.tensor([True, False, True, True, False, True, True, True])
    other = conv_bn().eval()
    with torch.no_grad():
        other.head.weight[:, ~keep] = 0
    behind = masked(net, UnitMask({"act2": keep}, {"act2": torch.zeros(8)})).eval()
    x = torch.rand(8, 3, 8, 8, generator=seeded(6))
    torch.testing.assert_close(behind(x), other(x))
    y, threat = other(x).argmax(1), Linf(0.5)
    found = [evaluate_robustness(each, x, y, threat, real_suite(threat)) for each in (behind, other)]
    assert torch.equal(found[0].felled, found[1].felled)
    assert found[0].accuracy < 1


def test_passes_are_counted_and_the_time_left_falls_to_nothing() -> None:
    net = mlp()
    x = torch.rand(10, 1, 6, 6, generator=seeded(5))
    y = net(x).argmax(1)
    told: list[Progress] = []
    suite = Suite("s", (Step("pgd", PGD(Linf(0.0), 3), 6), Step("apgd", APGD(Linf(0.0), 5), 12)))
    found = evaluate_robustness(net, x, y, Linf(0.0), suite, batch_size=4, progress=told.append)
    assert [(a.forwards, a.backwards) for a in found.attacks] == [(30, 30), (10 * 7, 50)]
    assert (found.forwards, found.backwards) == (100, 80)
    assert [(t.attack, t.batch, t.batches, t.standing) for t in told] == [
        (name, batch, 3, 10) for name in ("pgd", "apgd") for batch in (1, 2, 3)
    ]
    assert told[0].left > 0
    assert told[-1].left == 0
    assert told[-1].accuracy == 1


def test_the_net_is_left_alone_and_judged_in_eval_mode() -> None:
    net = untidy(conv_bn(dropout=0.5))
    x = torch.rand(6, 3, 8, 8, generator=seeded(6))
    judged = conv_bn(dropout=0.5).eval()
    y, threat = judged(x).argmax(1), Linf(0.1)
    with unchanged(net), torch.autocast("cpu", torch.bfloat16):
        found = evaluate_robustness(net, x, y, threat, real_suite(threat), corruptions=True)
    expected = evaluate_robustness(judged, x, y, threat, real_suite(threat))
    assert found.clean_accuracy == 1
    assert torch.equal(found.felled, expected.felled)
    assert list(found.corruptions) == list(CORRUPTIONS)


def test_a_subset_keeps_the_classes_in_their_shares() -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate((50, 30, 15, 5))])
    labels = labels[torch.randperm(100, generator=seeded(0))]
    for n in (1, 20, 37, 100):
        rows = stratified_rows(labels, n, seed=1)
        assert len(rows) == len(rows.unique()) == n
        assert (rows.diff() > 0).all()
        assert ((torch.bincount(labels[rows], minlength=4) - n * labels.bincount() / 100).abs() < 1).all()
    assert torch.equal(stratified_rows(labels, 20, seed=1), stratified_rows(labels, 20, seed=1))
    assert not torch.equal(stratified_rows(labels, 20, seed=1), stratified_rows(labels, 20, seed=2))
    net = Linear((1, 2, 2), 4)
    x = torch.rand(100, 1, 2, 2, generator=seeded(1))
    found = evaluate_robustness(net, x, labels, Linf(0.01), real_suite(Linf(0.01)), subset=20, seed=1)
    assert torch.equal(found.rows, stratified_rows(labels, 20, seed=1))
    assert torch.equal(found.labels, labels[found.rows])
    assert torch.equal(found.felled != WRONG, net(x[found.rows]).argmax(1) == found.labels)


@pytest.mark.parametrize(("successes", "n"), [(0, 7), (7, 7), (3, 10), (500, 1000), (9990, 10000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_interval_is_wilsons(successes: int, n: int, confidence: float) -> None:
    z, share = NormalDist().inv_cdf(0.5 + confidence / 2), successes / n
    for end in wilson(successes, n, confidence):  # (share − p)² = z² p (1 − p) / n
        assert (share - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, abs=1e-12)


def test_corruptions_grow_with_severity_and_stay_images() -> None:
    x = F.interpolate(torch.rand(4, 3, 8, 8, generator=seeded(1)) * 0.6 + 0.2, 32, mode="bilinear")
    for name, corrupt in CORRUPTIONS.items():
        images = [corrupt(x, severity, seeded(2)) for severity in range(5)]
        assert all(0 <= float(image.min()) <= float(image.max()) <= 1 and image.shape == x.shape for image in images), name
        sizes = [float((image - x).abs().mean()) for image in images]
        assert sizes == sorted(sizes), name
        assert sizes[0] > 0, name
    flat = torch.full((1, 1, 9, 9), 0.25)
    for name in ("blur", "contrast", "pixelate", "JPEG"):  # nothing to lose but the codec's coarse greys
        torch.testing.assert_close(
            CORRUPTIONS[name](flat, 4, seeded(0)), flat, atol=0.02 if name == "JPEG" else 1e-6, rtol=0
        )
    assert torch.equal(CORRUPTIONS["brightness"](flat, 4, seeded(0)), flat + 0.3)


def test_accuracy_under_corruptions_is_counted_over_all_batches() -> None:
    x, y = torch.full((10, 1, 4, 4), 0.42), torch.zeros(10, dtype=torch.long)
    y[:3] = 1  # class 1 is what is brighter than a half
    x[:3] = 0.9
    found = corrupted_accuracy(Threshold(), x, y, batch_size=4)
    assert found["brightness"] == (1.0, 0.3, 0.3, 0.3, 0.3)
    assert found["blur"] == found["contrast"] == (1.0,) * 5
    assert found["gaussian noise"][4] < 1  # 0.2 of standard deviation crosses the half
    assert corrupted_accuracy(Threshold(), x, y, batch_size=4) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(4, 3, 8, 8) * 255}, r"images: expected values in \[0,1\].*found"),
        ({"images": torch.rand(4, 3, 8, 8) - 0.5}, "images: expected values in"),
        ({"images": torch.full((4, 3, 8, 8), torch.nan)}, "images: expected values in"),
        ({"images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, "divide by 255"),
        ({"images": torch.zeros(0, 3, 8, 8), "labels": torch.zeros(0, dtype=torch.long)}, "at least one"),
        ({"labels": torch.tensor([0, 1, 2, 5])}, r"labels: expected 0..4, for the net returns 5 logits; found 0..5"),
        ({"labels": torch.tensor([0, 1, 2, -1])}, "found -1..2"),
        ({"labels": torch.tensor([0, 1, 2])}, r"labels: expected int64 \(4,\)"),
        ({"labels": torch.zeros(4)}, "labels: expected int64"),
        ({"net": conv_bn().half()}, "net: an evaluation runs in fp32, found weights in .*torch.float16"),
        ({"net": nn.Flatten(0)}, "net: expected logits"),
        ({"suite": "autoattack"}, "suite: expected probe, fast, standard, strong, adaptive; found 'autoattack'"),
        ({"subset": 5}, "subset: expected 1 to 4 images"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"threat": L2(100)}, "threat.eps"),
        ({"twin": Linear((3, 8, 8), 7)}, "twin: expected 5 logits"),
    ],
)
def test_bad_input_is_refused_with_one_clear_message(change, message) -> None:
    given = {"net": conv_bn(), "images": torch.rand(4, 3, 8, 8), "labels": torch.arange(4), "threat": Linf(0.1)}
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(**{**given, **change})


def test_a_suite_needs_attacks_with_names_of_their_own() -> None:
    step = Step("a", PGD(Linf(0.1)))
    for steps in ((), (step, step)):
        with pytest.raises(ValueError, match="a name of its own"):
            Suite("s", steps)


def test_settings_are_described_and_hashes_tell_nets_apart() -> None:
    found = described(PGD(Linf("8/255"), steps=7))
    assert found["class"] == "PGD"
    assert found["steps"] == 7
    assert found["threat"] == {"class": "Linf", "eps": 8 / 255}
    assert found["objective"] == {"class": "CrossEntropy"}
    attack = PGD(Linf(0.1))
    before = described(attack)
    attack.reseed(7)
    assert described(attack) == before
    assert json.dumps(described(Transfer(mlp(), PGD(Linf(0.1)))))
    assert net_hash(mlp()) == net_hash(mlp())
    assert net_hash(mlp()) != net_hash(mlp(6))
    strided, dilated = (nn.Conv2d(1, 1, 3, **option) for option in ({"stride": 2}, {"dilation": 2}))
    dilated.load_state_dict(strided.state_dict())
    assert net_hash(strided) != net_hash(dilated)


@pytest.mark.parametrize("suite", ["probe", pytest.param("standard", marks=pytest.mark.long)])
def test_rows_of_features_are_judged_as_in_closed_form(suite):
    """A linear rule on two of 20 features: an example stands as long as the ball, cut by the box, keeps their order."""
    torch.manual_seed(0)
    net, x = nn.Linear(20, 2, bias=False), torch.rand(64, 20)
    with torch.no_grad():
        net.weight.zero_()
        net.weight[:, :2] = torch.tensor([[-9.0, 9.0], [9.0, -9.0]])
    y = (x[:, 0] > x[:, 1]).long()
    larger, smaller = x[:, :2].amax(1), x[:, :2].amin(1)
    stands = (larger - 0.1).clamp_min(0) > (smaller + 0.1).clamp_max(1)
    assert evaluate_robustness(net, x, y, Linf(0.1), suite=suite).accuracy == float(stands.float().mean())
