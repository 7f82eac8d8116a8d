"""Every door: images and labels of any kind get a right answer, or one clear sentence; nothing leaves the ball."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

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
    AdversarialCE,
    CarliniWagner,
    CleanCE,
    Defense,
    ElasticNet,
    Free,
    GroupSparse,
    Linf,
    Square,
    Supported,
    accuracy_under,
    evaluate_robustness,
    sanity_checks,
)
from glassarmor.defenses.attacks.autoattack import AutoAttackPart
from glassarmor.defenses.evaluation.card import accuracy_curve
from glassarmor.defenses.evaluation.corruptions import corrupted_accuracy
from glassarmor.defenses.evaluation.sanity import Noise
from glassarmor.defenses.evaluation.suite import Step, Suite
from glassarmor.interpret.inputs import TOLERANCE, checked
from glassarmor.interpret.observation import observe
from glassarmor.lightning_modules.callbacks.dashboard import Dashboard
from tests.reference.nets import conv_bn, seeded, unchanged

BALL = Linf(0.1)
ATTACKS: dict[str, Callable[[], object]] = {
    "PGD": lambda: PGD(BALL, 2),
    "PGD, restarts": lambda: PGD(BALL, 2, restarts=2),
    "PGD, L2": lambda: PGD(L2(0.5), 2),
    "FGSM": lambda: FGSM(BALL),
    "FGSM-RS": lambda: FGSMRS(BALL),
    "N-FGSM": lambda: NFGSM(BALL),
    "APGD": lambda: APGD(BALL, 3),
    "APGD, L2": lambda: APGD(L2(0.5), 3),
    "APGD-T": lambda: APGDT(BALL, 3, targets=1, loss="margin"),
    "Square": lambda: Square(BALL, 4),
    "Square, L2": lambda: Square(L2(0.5), 4),
    "C&W": lambda: CarliniWagner(steps=2, search_steps=1),
    "EAD": lambda: ElasticNet(steps=2, search_steps=1),
    "group sparse": lambda: GroupSparse(steps=2, search_steps=1),
    "adaptive": lambda: AdaptivePGD(BALL, {"pse": PSE()}, steps=1),
    "supported": lambda: Supported(PGD(BALL, 1)),
    "AutoAttack's APGD": lambda: AutoAttackPart(BALL, "apgd-ce"),
    "noise": lambda: Noise(BALL, draws=2),
    "free": lambda: Free(BALL),
}
SUITE = Suite("s", (Step("PGD", PGD(BALL, 2)),))


def _dashboard(net: nn.Module, x: Tensor, y: Tensor) -> object:
    return Dashboard({}, x, y, [str(i) for i in range(len(x))], PGD(BALL, 1), "abcde")


DOORS: dict[str, Callable[[nn.Module, Tensor, Tensor], object]] = {
    **{name: lambda net, x, y, make=make: make()(net, x, y) for name, make in ATTACKS.items()},
    "defense": lambda net, x, y: Defense(PGD(BALL, 1), {"ce": AdversarialCE()})(net, x, y).loss,
    "defense without attack": lambda net, x, y: Defense(None, {"ce": CleanCE()})(net, x, y).loss,
    "evaluate_robustness": lambda net, x, y: evaluate_robustness(net, x, y, BALL, SUITE).accuracy,
    "accuracy_under": lambda net, x, y: accuracy_under(net, [(x, y)], {"PGD": PGD(BALL, 1)}, torch.device("cpu")),
    "accuracy_curve": lambda net, x, y: accuracy_curve(net, x, y, BALL, scales=(1.0,), attack=lambda ball: PGD(ball, 1)),
    "corrupted_accuracy": lambda net, x, y: corrupted_accuracy(net, x, y),
    "sanity_checks": lambda net, x, y: sanity_checks(net, x, y, BALL, steps=1, queries=3),
    "dashboard": _dashboard,
}
SIXTEEN = "sanity_checks"


def sample(n: int = 16, classes: int = 5) -> tuple[nn.Module, Tensor, Tensor]:
    net = conv_bn(classes=classes).eval()
    x = torch.rand(n, 3, 8, 8, generator=seeded(1))
    return net, x, net(x).argmax(1)


KINDS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "float64": lambda x, y: (x.double(), y),
    "float16": lambda x, y: (x.half(), y),
    "bfloat16": lambda x, y: (x.bfloat16(), y),
    "int32 labels": lambda x, y: (x, y.int()),
    "uint8 labels": lambda x, y: (x, y.byte()),
    "int8 labels": lambda x, y: (x, y.to(torch.int8)),
    "not contiguous": lambda x, y: (x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), y.repeat_interleave(2)[::2]),
    "rounding above 1": lambda x, y: (x + (1 + TOLERANCE / 2 - x.max()) * (x == x.max()), y),
}


@pytest.mark.parametrize("door", ATTACKS)
def test_images_and_labels_of_other_kinds_are_attacked_in_fp32_inside_the_ball(door: str) -> None:
    net, x, y = sample(2)
    usual = ATTACKS[door]()(net, x, y).detach()
    for kind, change in KINDS.items():
        given, labels = change(x, y)
        attack, before = ATTACKS[door](), given.clone()
        found = attack(net, given, labels).detach()
        assert torch.equal(given, before)
        assert found.dtype == torch.float32
        assert 0 <= found.min() <= found.max() <= 1
        assert (attack.threat.distance(given.float(), found) <= attack.threat.eps + TOLERANCE).all()
        if kind in EXACT:
            torch.testing.assert_close(found, usual, atol=1e-5, rtol=0)


@pytest.mark.parametrize("door", [door for door in DOORS if door not in ATTACKS and door != SIXTEEN])
def test_every_other_door_takes_them_too(door: str) -> None:
    net, x, y = sample(4)
    expected = DOORS[door](net, x, y)
    for kind, change in KINDS.items():
        found = DOORS[door](net, *change(x, y))
        if kind in EXACT and door != "dashboard":
            assert str(found) == str(expected)


EXACT = ("float64", "int32 labels", "uint8 labels", "int8 labels", "not contiguous")
WRONG: dict[str, tuple[Callable[[Tensor, Tensor], tuple[object, object]], str]] = {
    "normalised": (lambda x, y: ((x - 0.5) / 0.25, y), r"images: expected values in \[0,1\], found .*normalised\(net"),
    "0..255": (lambda x, y: (x * 255, y), r"images: expected values in \[0,1\], found .*divide by 255"),
    "uint8": (lambda x, y: ((x * 255).byte(), y), "images: expected floats .*divide by 255"),
    "not a number": (lambda x, y: (x / 0 * 0, y), r"images: expected values in \[0,1\], found nan"),
    "one image without its batch": (lambda x, y: (x[0], y[:1]), r"images: expected floats \(N, C, H, W\)"),
    "no image": (lambda x, y: (x[:0], y[:0]), "images: expected floats .*at least one"),
    "an array": (lambda x, y: (x.numpy(), y), "images: expected floats .*found ndarray"),
    "float labels": (lambda x, y: (x, y.float()), "labels: expected int64 .*found torch.float32"),
    "one-hot labels": (
        lambda x, y: (x, nn.functional.one_hot(y, 5)),
        r"labels: expected int64 .*found torch.int64 \(16, 5\)",
    ),
    "boolean labels": (lambda x, y: (x, y > 2), "labels: expected int64 .*found torch.bool"),
    "too few labels": (lambda x, y: (x, y[1:]), r"labels: expected int64 \(16,\)"),
    "a label below 0": (lambda x, y: (x, y - 5), "labels: expected classes from 0 on, found -"),
}
UNKNOWN_CLASS = "labels: expected 0..4, for the net returns 5 logits; found .*7"


@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_image_or_no_label_is_refused_at_every_door(door: str) -> None:
    net, x, y = sample()
    with unchanged(net):
        for wrong, (change, message) in WRONG.items():
            trains = door in ATTACKS or door.startswith("defense")  # where NaN passes, for the loss to show it
            if (door, wrong) != ("accuracy_under", "an array") and not (trains and wrong == "not a number"):
                with pytest.raises(ValueError, match=message):
                    DOORS[door](net, *change(x, y))


@pytest.mark.parametrize("door", [door for door in ATTACKS if door != "free"])
def test_a_class_that_the_net_has_not_and_a_net_of_one_logit_are_refused(door: str) -> None:
    net, x, y = sample(3)
    with unchanged(net), pytest.raises(ValueError, match=UNKNOWN_CLASS):
        DOORS[door](net, x, torch.full_like(y, 7))
    with pytest.raises(ValueError, match=r"two classes at least; found \(\d, 1\); for two classes return two logits"):
        DOORS[door](conv_bn(classes=1).eval(), x, torch.zeros_like(y))
    with pytest.raises(ValueError, match=r"net: expected weights in fp32, found torch\.bfloat16"):
        DOORS[door](conv_bn().eval().bfloat16(), x, y)


class Constant(nn.Module):
    """The same logits for every image, by a graph that leads to it."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.act1 = nn.Conv2d(3, 4, 3)  # something to observe

    def forward(self, x: Tensor) -> Tensor:
        return self.logits + 0 * self.act1(x).mean((1, 2, 3))[:, None]


@pytest.mark.parametrize("door", ATTACKS)
@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_one_image_and_constant_logits(door: str, classes: int) -> None:
    net, x, _ = sample(1, classes)
    for each in (net, Constant(torch.arange(float(classes))).eval(), Constant(torch.zeros(classes)).eval()):
        found = ATTACKS[door]()(each, x, each(x).argmax(1))
        assert found.shape == x.shape
        assert found.isfinite().all()
        assert (each(found).argmax(1) == each(x).argmax(1)).all() or each is net


@pytest.mark.parametrize("logits", [torch.zeros(3), torch.tensor([1.0, 0.0, -1.0]), torch.full((3,), 1 / 3)], ids=str)
def test_a_net_that_does_not_look_is_invalid(logits: Tensor) -> None:
    net, (_, x, _) = Constant(logits).eval(), sample()
    report = sanity_checks(net, x, torch.zeros(16, dtype=torch.long), BALL)
    assert (report.verdict, report.reasons) == ("invalid", ("all images have the same logits",))


def test_a_net_of_float64_is_attacked_in_float64() -> None:
    net, x, y = sample(2)
    found = PGD(BALL, 2)(net.double(), x, y)
    assert found.dtype == torch.float64
    assert BALL.distance(x.double(), found).max() <= BALL.eps + 1e-12


def test_what_no_gradient_reaches_is_said() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().flatten(1)[:, :5]

    _, x, y = sample(2)
    for attack in (PGD(BALL, 1), APGD(BALL, 1), CarliniWagner(steps=1, search_steps=1)):
        with pytest.raises(ValueError, match="net: expected logits that a gradient leads from to the images"):
            attack(Cut(), x, y)


def test_the_check_returns_what_is_right_already_untouched_and_cuts_only_rounding() -> None:
    net, x, y = sample(2)
    same, labels, found = checked(net, x, y)
    assert same is x
    assert labels is y
    assert found == range(int(y.min()), int(y.max()) + 1)
    assert checked(net, x * (1 + TOLERANCE / 2), y)[0].max() <= 1
    with pytest.raises(ValueError, match="expected values"):
        checked(net, x - x.min() - 2 * TOLERANCE, y)


def test_an_attack_reads_values_once_a_call_and_not_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading waits for a GPU."""
    net, x, y = sample(2)
    read: list[int] = []
    whole = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: read.append(1) or whole(self))
    for steps in (1, 9):
        PGD(BALL, steps)(net, x, y)
    assert len(read) == 2


def test_observing_takes_labels_of_any_whole_numbers_and_images_of_any_floats() -> None:
    net, x, y = sample(2)
    plain = observe(net, x, x.flip(0), y, layers=["act1"])
    other = observe(net, x.double(), x.flip(0).double(), y.int(), layers=["act1"])
    torch.testing.assert_close(plain.delta("act1"), other.delta("act1"))
    assert torch.equal(plain.logit("target"), other.logit("target"))
    with pytest.raises(ValueError, match="labels: expected int64"):
        observe(net, x, x, y.float())


class Changed(nn.Module):
    """A net behind something that is done to its images or to its answer."""

    def __init__(self, net: nn.Module, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.act1, self.before, self.after = net, before, after

    def forward(self, x: Tensor) -> object:
        return self.after(self.act1(self.before(x)))


def itself(x: Tensor) -> Tensor:
    return x


def observed(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return observe(net, x, x.clone() if isinstance(x, Tensor) else x, y, layers=["act1"]).logit("target")


IN_PLACE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "sub_": (lambda x: x.sub_(0.5), lambda x: x - 0.5),
    "clamp_": (lambda x: x.clamp_(0.4, 0.6), lambda x: x.clamp(0.4, 0.6)),
    "data": (lambda x: x.data.mul_(2) * 0 + x, lambda x: x * 2),
}
ALL = {**DOORS, "observe": observed}


@pytest.mark.long
@pytest.mark.parametrize("door", ALL)
def test_a_net_that_changes_its_images_in_place_changes_nobody_elses(door: str) -> None:
    net, x, _ = sample()
    before = x.clone()
    for way, (there, apart) in IN_PLACE.items():
        if way == "data" and door in ("sanity_checks", "dashboard"):
            continue
        y = Changed(net, apart, itself)(x).argmax(1)  # type: ignore[attr-defined]
        found, expected = (ALL[door](Changed(net, each, itself).eval(), x, y) for each in (there, apart))
        assert torch.equal(x, before), way
        if isinstance(expected, Tensor):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        elif door not in ("sanity_checks", "dashboard"):
            assert str(found) == str(expected), way


BAD_NETS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], object], str]] = {
    "a tuple of no logits": (itself, lambda z: (None, z), r"net: expected logits \(N, classes\), found a tuple"),
    "a dict of others": (
        itself,
        lambda z: {"scores": z, "features": z},
        r"net: expected logits \(N, classes\), found a dict with scores, features",
    ),
    "one number an image": (itself, lambda z: z[:, 0], r"net: expected logits \(\d+, classes\), two classes at least"),
    "class numbers": (itself, lambda z: z.argmax(1), r"net: expected logits \(N, classes\), found class numbers"),
    "other channels": (
        lambda x: x[:, :1],
        itself,
        r"net: expected one that runs in \w+ mode on images \(N, 3, 8, 8\), found RuntimeError",
    ),
}
LOOKING = [door for door in ALL if door not in ("free", "dashboard")]  # the others run no net


@pytest.mark.parametrize("door", LOOKING)
def test_a_net_that_returns_no_logits_is_refused_at_every_door(door: str) -> None:
    net, x, y = sample()
    for before, after, message in BAD_NETS.values():
        with pytest.raises(ValueError, match=message):
            ALL[door](Changed(net, before, after).eval(), x, y)
    with pytest.raises(ValueError, match=UNKNOWN_CLASS):
        ALL[door](net, x, torch.full_like(y, 7))
    with pytest.raises(ValueError, match="labels: expected classes from 0 on, found -"):
        ALL[door](net, x, y - 5)
    if door not in ("accuracy_under", "corrupted_accuracy"):
        with pytest.raises(ValueError, match=r"images: expected floats .*found list"):
            ALL[door](net, x.tolist(), y)  # type: ignore[arg-type]


def test_observing_refuses_what_are_no_images() -> None:
    """By their type; their values are the business of the doors that attack and judge: here nobody waits for a GPU."""
    net, x, y = sample()
    change, message = WRONG["uint8"]
    with pytest.raises(ValueError, match=message):
        observed(net, *change(x, y))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["images that ask for gradients", "centred over the batch", "no number for the first"])
def test_whether_a_gradient_reaches_the_images_is_a_matter_of_the_net(kind: str) -> None:
    net, x, y = sample(48)
    if kind == "images that ask for gradients":
        x = x.requires_grad_()
    elif kind == "centred over the batch":
        net = Changed(net, itself, lambda z: z - z.mean(0)).eval()  # type: ignore[attr-defined]
    else:
        x[:20] *= 0.1
        own = net
        net = Changed(nn.Identity(), itself, lambda x: own(x) / (x.mean((1, 2, 3)) > 0.3)[:, None]).eval()  # type: ignore[attr-defined]
    found = evaluate_robustness(net, x, y, BALL, "probe")
    assert found.gradient
    assert [attack.name for attack in found.attacks] == ["PGD-20"]
