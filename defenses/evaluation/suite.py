"""Suites of attacks, as data: which attacks, in which order, on how many images.

A suite is an ordered list (:class:`Suite`); :func:`make_suite` makes the five that have names, and
:func:`.evaluate_robustness` runs any.  The three strongest nest: ``strong`` begins with the attacks of
``standard``, ``adaptive`` with those of ``strong``, so that on the same images a stronger suite never leaves more standing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

from torch import Tensor, nn

from glassarmor.defenses.attacks.apgd import APGD, APGDT
from glassarmor.defenses.attacks.autoattack import TARGETS, AutoAttackPart
from glassarmor.defenses.attacks.objectives import CrossEntropy, Margin
from glassarmor.defenses.attacks.pgd import PGD, Attack
from glassarmor.defenses.attacks.square import Square
from glassarmor.defenses.evaluation.adaptive import AdaptivePGD
from glassarmor.defenses.options import require_whole
from glassarmor.defenses.threat import Threat
from glassarmor.defenses.training.terms import Term

SuiteName = Literal["probe", "fast", "standard", "strong", "adaptive"]
SUITES: Final = get_args(SuiteName)
MARGIN_STARTS: Final = 5


@dataclass(frozen=True)
class Step:
    """One attack of a suite.

    passes: forwards and backwards that an image costs which never falls, for the time left; 0 where unknown.
    """

    name: str
    attack: Attack
    passes: int = 0


@dataclass(frozen=True)
class Suite:
    """Attacks in the order in which they run.

    subset: images that are judged, where there are more and no other number was asked for; None: all.
    notes: what a reader must know of it, e.g. what was left out.

    Raises:
        ValueError: no attack, or two of one name.
    """

    name: str
    steps: tuple[Step, ...]
    subset: int | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [step.name for step in self.steps]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"suite: expected one attack or more, each with a name of its own; found {names}")


@dataclass(frozen=True, eq=False)
class SuiteSettings:
    """How a suite is run; see :func:`.evaluate_robustness` for each.

    Raises:
        ValueError: a batch size that is no whole number >= 1.
    """

    suite: SuiteName | str | Suite = "fast"
    subset: int | None = None
    batch_size: int = 256
    seed: int = 0
    terms: Mapping[str, Term] | None = None
    twin: nn.Module | None = None
    corruptions: bool = False

    def __post_init__(self) -> None:
        require_whole("batch_size", self.batch_size, 1)

    def attacks(self, threat: Threat, classes: int) -> Suite:
        """The suite itself, which is made of its name where it has one."""
        if isinstance(self.suite, Suite):
            return self.suite
        return make_suite(self.suite, threat, classes, self.seed, self.terms, self.twin)


class Transfer:
    """An attack on another net, the twin: what a defense that hides its gradients cannot hide.

    Its forwards and backwards are the twin's.
    """

    def __init__(self, twin: nn.Module, attack: Attack) -> None:
        self.twin = twin
        self.attack = attack

    @property
    def threat(self) -> Threat:
        return self.attack.threat

    def reseed(self, call: int) -> None:
        self.attack.reseed(call)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.attack(self.twin, x, y)


def make_suite(
    name: SuiteName | str,
    threat: Threat,
    classes: int,
    seed: int = 0,
    terms: Mapping[str, Term] | None = None,
    twin: nn.Module | None = None,
) -> Suite:
    """One of the suites that have names.

    probe: PGD-20.  fast: APGD-CE and APGD-T, on a subset.  standard: AutoAttack's standard version, through its package, on
    all images.  strong: standard, then five starts of APGD on the margin, which has felled images that AutoAttack leaves.
    adaptive: strong on a subset, then attacks that also raise or lower the regularisers of the defense, and transfer from a
    twin.

    Where there are fewer than 4 classes the targeted DLR loss does not exist: there APGD-T goes by the margin Z_t − Z_y, in
    standard too.

    Args:
        terms: regularisers of the defense, for adaptive; without any, those attacks are left out.
        twin: a net of the same classes on the same images, best an undefended one; without it there is no transfer.

    Raises:
        ValueError: another name.
    """
    if name == "probe":
        return Suite(name, (Step("PGD-20", PGD(threat, steps=20, seed=seed), 40),), subset=1000)
    if name == "fast":
        first = Step("APGD-CE", APGD(threat, 50, seed=seed), 102)
        return Suite(name, (first, _targeted(threat, classes, 50, seed)), subset=1000)
    if name not in SUITES:
        raise ValueError(f"suite: expected {', '.join(SUITES)}; found {name!r}")
    steps = _standard(threat, classes, seed)
    if name == "standard":
        return Suite(name, steps)
    margin = APGD(threat, 100, restarts=MARGIN_STARTS, objective=Margin(), seed=seed)
    steps = (*steps, Step(f"APGD margin, {MARGIN_STARTS} starts", margin, MARGIN_STARTS * 202))
    if name == "strong":
        return Suite(name, steps)
    left_out = []
    if not terms:
        left_out.append(
            "no attack knew the regularisers of the defense, for none were given: regularizers=... names them "
            "(terms= in Python); a run folder brings its own"
        )
    if twin is None:
        left_out.append("no transfer attack, for no twin was given: twin=RUN names an undefended net (twin= in Python)")
    steps = (*steps, *_knowing(threat, terms or {}, seed), *_transfers(threat, twin, seed))
    return Suite(name, steps, subset=1000, notes=tuple(f"adaptive: {words}" for words in left_out))


def _targeted(threat: Threat, classes: int, steps: int, seed: int) -> Step:
    loss: Literal["dlr", "margin"] = "dlr" if classes >= 4 else "margin"
    attack = APGDT(threat, steps, TARGETS, loss=loss, seed=seed)
    return Step("APGD-T", attack, 2 * (steps + 1) * min(TARGETS, classes - 1))


def _standard(threat: Threat, classes: int, seed: int) -> tuple[Step, ...]:
    """AutoAttack's four, through its package; where that has no loss for so few classes, APGD-T is ours."""
    targets = min(TARGETS, classes - 1)
    targeted = Step("APGD-T", AutoAttackPart(threat, "apgd-t", seed=seed), 203 * targets)
    return (
        Step("APGD-CE", AutoAttackPart(threat, "apgd-ce", seed=seed), 202),
        targeted if classes >= 4 else _targeted(threat, classes, 100, seed),
        Step("FAB-T", AutoAttackPart(threat, "fab-t", seed=seed), 310 * targets),
        Step("Square", AutoAttackPart(threat, "square", seed=seed), 5000),
    )


def _knowing(threat: Threat, terms: Mapping[str, Term], seed: int) -> tuple[Step, ...]:
    """Attacks that know the terms of the defense: both signs of their weight, on two losses."""
    if not terms:
        return ()
    return tuple(
        Step(
            f"adaptive {type(objective).__name__}, {word} the terms",
            AdaptivePGD(threat, terms, sign, steps=50, objective=objective, seed=seed),
            150,
        )
        for sign, word in ((1.0, "raises"), (-1.0, "hides from"))
        for objective in (CrossEntropy(), Margin())
    )


def _transfers(threat: Threat, twin: nn.Module | None, seed: int) -> tuple[Step, ...]:
    if twin is None:
        return ()
    return (
        Step("transfer, CE", Transfer(twin, APGD(threat, 100, seed=seed)), 2),
        Step("transfer, margin", Transfer(twin, PGD(threat, 100, objective=Margin(), seed=seed)), 2),
    )


def without_gradient(suite: Suite, threat: Threat, seed: int = 0) -> Suite:
    """What a suite that has a name becomes for a net whose gradient is zero: Square, and the transfers of the suite.

    Square takes 1000 queries in probe and fast, and the 5000 of AutoAttack in the others.
    """
    queries = 1000 if suite.name in ("probe", "fast") else 5000
    transfers = tuple(step for step in suite.steps if isinstance(step.attack, Transfer))
    square = Step("Square", Square(threat, queries, seed=seed), queries)
    words = (
        f"no gradient reaches the images, so that Square, {queries} queries, took the place of all attacks that follow one: "
        "the number is an upper limit, and not to be trusted"
    )
    return replace(suite, steps=(square, *transfers), notes=(words, *(note for note in suite.notes if "transfer" in note)))
