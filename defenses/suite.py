"""Suites of attacks, as data: which attacks, in which order, on how many images.

A suite is an ordered list (:class:`Suite`); :func:`make_suite` makes the four that have names, and
:func:`defenses.robustness.evaluate_robustness` runs any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from torch import Tensor, nn

from defenses.adaptive import AdaptivePGD
from defenses.apgd import APGD, APGDT
from defenses.attacks import PGD, Attack
from defenses.autoattack import TARGETS, AutoAttackPart
from defenses.objectives import CrossEntropy, Margin
from defenses.square import Square
from defenses.terms import Term
from defenses.threat import Threat

SuiteName = Literal["probe", "fast", "standard", "adaptive"]
SUITES: Final = ("probe", "fast", "standard", "adaptive")


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
    all images.  adaptive: the attacks of fast at full length, many starts on the margin, PGD of 200 steps, attacks that also
    raise or lower the regularisers of the defense, transfer from a twin, and Square, which reads no gradient.

    Where there are fewer than 4 classes the targeted DLR loss does not exist: there APGD-T goes by the margin Z_t − Z_y, in
    standard too.

    Args:
        terms: regularisers of the defense, for adaptive; without any, those attacks are left out.
        twin: a net of the same classes on the same images, best an undefended one; without it there is no transfer.

    Raises:
        ValueError: another name.
    """
    loss: Literal["dlr", "margin"] = "dlr" if classes >= 4 else "margin"
    targets = min(TARGETS, classes - 1)

    def towards(steps: int, count: int, name: str = "APGD-T") -> Step:
        attack = APGDT(threat, steps, count, loss=loss, seed=seed)
        return Step(name, attack, 2 * (steps + 1) * min(count, classes - 1))

    if name == "probe":
        return Suite(name, (Step("PGD-20", PGD(threat, steps=20, seed=seed), 40),), subset=1000)
    if name == "fast":
        return Suite(name, (Step("APGD-CE", APGD(threat, 50, seed=seed), 102), towards(50, TARGETS)), subset=1000)
    if name == "standard":
        first = Step("APGD-CE", AutoAttackPart(threat, "apgd-ce", seed=seed), 202)
        second = Step("APGD-T", AutoAttackPart(threat, "apgd-t", seed=seed), 203 * targets)
        rest = (
            Step("FAB-T", AutoAttackPart(threat, "fab-t", seed=seed), 310 * targets),
            Step("Square", AutoAttackPart(threat, "square", seed=seed), 5000),
        )
        return Suite(name, (first, second if loss == "dlr" else towards(100, TARGETS), *rest))
    if name == "adaptive":
        steps = [
            Step("APGD-CE", APGD(threat, 100, seed=seed), 202),
            towards(100, TARGETS),
            Step("APGD margin, 5 starts", APGD(threat, 100, restarts=5, objective=Margin(), seed=seed), 1010),
            Step("PGD-200 margin", PGD(threat, 200, step_size=threat.eps / 8, objective=Margin(), seed=seed), 400),
        ]
        for sign, word in ((1.0, "raises"), (-1.0, "hides from")):
            for objective in (CrossEntropy(), Margin()) if terms else ():
                attack = AdaptivePGD(threat, terms or {}, sign, steps=50, objective=objective, seed=seed)
                steps.append(Step(f"adaptive {type(objective).__name__}, {word} the terms", attack, 150))
        if twin is not None:
            steps.append(Step("transfer, CE", Transfer(twin, APGD(threat, 100, seed=seed)), 2))
            steps.append(Step("transfer, margin", Transfer(twin, PGD(threat, 100, objective=Margin(), seed=seed)), 2))
        steps.append(Step("Square", AutoAttackPart(threat, "square", queries=2000, seed=seed), 2000))
        left_out = []
        if not terms:
            left_out.append(
                "no attack knew the regularisers of the defense, for none were given: regularizers=... names them "
                "(terms= in Python); a run folder brings its own"
            )
        if twin is None:
            left_out.append("no transfer attack, for no twin was given: twin=RUN names an undefended net (twin= in Python)")
        return Suite(name, tuple(steps), subset=1000, notes=tuple(f"adaptive: {words}" for words in left_out))
    raise ValueError(f"suite: expected {', '.join(SUITES)}; found {name!r}")


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
