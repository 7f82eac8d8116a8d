"""Which readings are bad news, and what a run can do to go on more safely.  Pure rules on a history of readings."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final, Literal

from glassarmor.defenses.attacks.pgd import NFGSM, PGD, Attack
from glassarmor.defenses.monitoring.readings import MULTI_STEP, Reading
from glassarmor.defenses.options import require_number


@dataclass(frozen=True)
class Check:
    """An alarm of this kind is raised where the indicator of this name is above its limit."""

    kind: str
    name: str
    says: str  # of the value
    unit: Literal["%", "points", "number", "count"] = "%"


CHECKS: Final = (
    Check("nonfinite", "nonfinite", "{value}", "count"),
    Check("catastrophic", "gap", "FGSM accuracy is {value} above multi-step accuracy: only one step is answered", "points"),
    Check("catastrophic", "fall", "multi-step accuracy fell by {value} since the reading before", "points"),
    Check("guessing", "guess", "its clean accuracy is {value} of what luck alone reaches once in 100"),
    Check("guessing", "one_class", "{value} of the images of other classes get one and the same answer"),
    Check("masked", "zero_gradient", "{value} of the images have an input gradient of exactly zero"),
    Check("masked", "noise_wins", "plain noise turns {value} of the images that PGD leaves right"),
    Check("masked", "margin_gain", "PGD on the margin loss is {value} stronger than on the cross-entropy", "points"),
    Check("masked", "step_gain", "four times the steps make PGD {value} stronger", "points"),
    Check("alignment", "misalignment", "1 − cos of input gradients at an image and at noise beside it: {value}", "number"),
    Check("drift", "kind_drift", "one-step and multi-step attacks move units unlike: distance {value}", "number"),
    Check("drift", "turning_drift", "one-step and multi-step attacks turn at other layers: distance {value}", "number"),
    Check("dead", "dead", "{value} of a layer's units never change"),
    Check("overfitting", "behind", "held-out robust accuracy is {value} below its best, training further above", "points"),
)
GUESSING: Final = ("guess", "one_class")
# ``guess`` of a net that surely knew something: one at the edge would fall back again and again.
KNOWS: Final = 0.8
SELDOM: Final = ("noise_wins", "margin_gain", "step_gain")  # measured in thorough readings only
PATIENCE: Final = 3  # readings in a row
KINDS: Final = tuple(dict.fromkeys(check.kind for check in CHECKS))
ABOUT_ATTACKS: Final = frozenset({"catastrophic", "alignment", "drift", "overfitting"})  # else meaningless
TITLES: Final = {
    "nonfinite": "not finite",
    "catastrophic": "catastrophic overfitting",
    "guessing": "no better than guessing",
    "masked": "masked gradients",
    "alignment": "misaligned gradients",
    "drift": "signals drift",
    "dead": "dead units",
    "overfitting": "robust overfitting",
}


@dataclass(frozen=True)
class Limits:
    """Largest value of each indicator that is no alarm, shares in [0,1]; None: never judged.

    ``gap`` and ``fall`` are the field's usual 20 points, ``guess`` is a test at :data:`.LUCK`; the others
    are ours, far above what honest runs showed (``docs/findings.md``).  None of the interpretation signals is judged by
    default: they were not shown to warn earlier.

    Raises:
        ValueError: a limit that is no share; names the config key.
    """

    gap: float | None = 0.2
    fall: float | None = 0.2
    guess: float | None = 1.0
    one_class: float | None = 0.9
    zero_gradient: float | None = 0.2
    noise_wins: float | None = 0.1
    margin_gain: float | None = 0.2
    step_gain: float | None = 0.2
    misalignment: float | None = None
    kind_drift: float | None = None
    turning_drift: float | None = None
    dead: float | None = 0.5
    behind: float | None = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            require_number(f"health.limits.{field.name}", getattr(self, field.name), "[0, 1]", null=True)

    def of(self, name: str) -> float | None:
        """The limit of an indicator; of ``nonfinite`` always 0."""
        value: float | None = 0.0 if name == "nonfinite" else getattr(self, name)
        return value


@dataclass(frozen=True)
class Alarm:
    """``text``: one sentence a check that failed; ``values``: their indicators."""

    kind: str
    epoch: int
    step: int
    text: str
    values: Mapping[str, float]


def indicators(history: Sequence[Reading], grace: int | None = 0) -> dict[str, float]:
    """What the checks look at: the last reading's values, with ``fall`` and ``behind``, which need those before.

    What is measured ``SELDOM`` is as it was last measured: gradients are masked until a reading finds them not to be.

    ``guess`` and ``one_class`` are left out where they are no news, for every net begins there: they stay if an earlier
    reading was clearly better (:data:`KNOWS`), or if the last :data:`PATIENCE` readings found nothing better, after
    ``grace`` steps; of a ``grace`` of None, which is for a run's last reading, nothing is waited for.

    ``fall`` is left out while the attack's ε climbs: what a net does in a ball it is not yet trained in comes and goes.

    ``behind``: best − latest held-out robust accuracy (``robust``), but at most by how much training robust accuracy
    (``train_robust``) is above the latest: a run in which both fall is not overfitting.
    """
    if not history:
        return {}
    last = history[-1].values
    held = {name: reading.values[name] for reading in history for name in SELDOM if name in reading.values}
    found = held | {name: value for name, value in last.items() if name not in GUESSING} | _guessing(history, grace)
    climbs = any("eps_share" in reading.values for reading in history[-2:])
    if (
        not climbs
        and len(history) > 1
        and (both := [name for name in MULTI_STEP if name in last and name in history[-2].values])
    ):
        found["fall"] = max(history[-2].values[name] - last[name] for name in both)  # each attack against itself
    if "robust" in last and "train_robust" in last:
        best = max(reading.values["robust"] for reading in history if "robust" in reading.values)
        found["behind"] = min(best - last["robust"], last["train_robust"] - last["robust"])
    return found


def _guessing(history: Sequence[Reading], grace: int | None) -> dict[str, float]:
    """``guess`` and ``one_class`` where they are news, the best of the readings that were waited for."""
    read = [found for r in history if (found := {name: r.values[name] for name in GUESSING if name in r.values})]
    if not read or not history[-1].values.keys() & read[-1].keys():
        return {}
    knew = any(found.get("guess", float("inf")) <= KNOWS for found in read[:-1])
    recent = read[-1:] if knew else read[-PATIENCE:]
    if not knew and grace is not None and (len(recent) < PATIENCE or history[-1].step < grace):
        return {}
    return {name: min(found[name] for found in recent if name in found) for name in read[-1]}


def guesses(values: Mapping[str, float], limits: Limits) -> bool:
    """Is the net of this reading no better than guessing, be that news or not?  Then it is nothing to go back to."""
    known = {name: values[name] for name in GUESSING if name in values}
    return any((limit := limits.of(name)) is not None and not value <= limit for name, value in known.items())


def withstands(values: Mapping[str, float], limits: Limits) -> dict[str, float]:
    """Accuracies under multi-step attacks; none of a net that guesses or is not finite, whose accuracies mean nothing."""
    return {} if guesses(values, limits) else {name: values[name] for name in MULTI_STEP if name in values}


def better(one: Mapping[str, float], other: Mapping[str, float], images: int = 0) -> bool:
    """Does the first of two readings (:func:`withstands`) withstand more, by the strongest attack that both hold?

    Args:
        images: of how many both are; then by more than a standard error of the difference of two such shares.  0: by
            anything.
    """
    if not other:
        return bool(one) and min(one.values()) > 0
    both = one.keys() & other.keys()
    if not both:
        return False
    high, low = (min(reading[name] for name in both) for reading in (one, other))
    luck = math.sqrt((high * (1 - high) + low * (1 - low)) / images) if images else 0.0
    return high - low > luck


def judge(
    history: Sequence[Reading], limits: Limits, watch: Collection[str] = KINDS, grace: int | None = 0
) -> tuple[Alarm, ...]:
    """The alarms of the last reading, one a kind; a value that is no number counts as not finite.

    Args:
        history: readings in order, those of a past that was rolled back left out.
        watch: the kinds that are judged.
        grace: steps before a net that never knew anything is ill; None: it is at once.
    """
    found = indicators(history, grace)
    sentences: dict[str, list[Check]] = {}
    for check in CHECKS:
        value, limit = found.get(check.name), limits.of(check.name)
        if check.kind in watch and value is not None and limit is not None and not value <= limit:
            sentences.setdefault(check.kind, []).append(check)
    return tuple(
        Alarm(
            kind,
            history[-1].epoch,
            history[-1].step,
            f"{TITLES[kind]}: " + "; ".join(check.says.format(value=_shown(check, found)) for check in checks),
            {check.name: found[check.name] for check in checks},
        )
        for kind, checks in sentences.items()
    )


def _shown(check: Check, found: Mapping[str, float]) -> str:
    value = found[check.name]
    if check.name == "guess":  # measured the other way round, so that large is bad
        return f"{100 / value:.0f} %"
    if check.unit == "count":
        return next((f"{value:,.0f} of {found[of]:,.0f} {of}" for of in ("weights", "logits") if of in found), "the loss")
    here = f" at {100 * found['eps_share']:.0f} % of ε" if check.name == "gap" and "eps_share" in found else ""
    return f"{value:.2f}" if check.unit == "number" else f"{100 * value:.0f} {check.unit}{here}"


def remedy(kind: str, regularizers: Sequence[str], rate: float) -> tuple[str, str]:
    """What another run can try against an alarm of this kind: in words, and as words for its command line.

    GradAlign against collapse under one-step attacks (Andriushchenko & Flammarion 2020), where it is on already an ε that
    climbs; an average of the weights against robust overfitting (Gowal et al. 2020); else half the learning rate.  Masked
    gradients are no matter of training harder: ("", "").

    Args:
        regularizers: names of those that are on.
        rate: the learning rate.
    """
    if kind == "masked":
        return "", ""
    if kind == "overfitting":
        return "an average of the weights", "ema=0.999"
    if kind in ABOUT_ATTACKS and "grad_align" not in regularizers:
        return "hold input gradients aligned", f"regularizers=[{','.join([*regularizers, 'grad_align'])}]"
    if kind in ABOUT_ATTACKS:
        return "let ε climb", "'defense.eps_share={_target_:glassarmor.defenses.Ramp,start:0,end:1,epochs:5}'"
    return "half the learning rate", f"optimizer.lr={rate / 2:g}"


MEASURES: Final = ("noise", "two_steps", "smaller_step", "lower_rate")


def safer(attack: Attack | None, measure: str) -> Attack | None:
    """The training attack after a safety measure; None where the measure is not about this attack.

    ``noise``: a one-step attack starts from noise of 2ε and is not projected (N-FGSM, de Jorge et al. 2022);
    ``two_steps``: two steps of ε/2 from a uniform start instead of one; ``smaller_step``: half the step, where the steps
    still reach from the middle of the ball to its edge, else it would be another threat; ``lower_rate``: is about the
    optimiser.

    Raises:
        ValueError: an unknown measure.
    """
    if measure not in MEASURES:
        raise ValueError(f"health.safer: expected any of {', '.join(MEASURES)}; found {measure!r}")
    one_step = isinstance(attack, PGD) and attack.steps == 1
    if measure == "noise" and isinstance(attack, PGD) and one_step and not isinstance(attack, NFGSM):
        return NFGSM(attack.threat, objective=attack.objective, seed=attack.seed)
    if measure == "two_steps" and isinstance(attack, PGD) and one_step:
        # N-FGSM declares the larger ball that its noise fills; its step is the ball's own radius.
        ball = (
            attack.threat
            if not isinstance(attack, NFGSM)
            else attack.noise_ball.scaled(attack.step_size / attack.noise_ball.eps)
        )
        return PGD(ball, steps=2, step_size=ball.eps / 2, objective=attack.objective, seed=attack.seed)
    if measure == "smaller_step" and isinstance(attack, PGD) and attack.steps * attack.step_size / 2 >= attack.threat.eps:
        return attack.scaled(1.0, 0.5)
    return None
