"""A race between the methods of a study: few settings and seeds for all, more for those that did best, round by round.

Successive halving (Jamieson and Talwalkar 2016), with a score made for trade-offs: held-out accuracies alone say who goes
on, so the test set selects nothing here either.  Who is in which round follows from the cards: a race is resumed, and
carried to another machine, like any study.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any, Final

from glassarmor.interpret.statistics import front, robust_at
from glassarmor.interpret.views.charts import Table
from glassarmor.lightning_modules.study.members import Member
from glassarmor.lightning_modules.study.records import RunRecord
from glassarmor.lightning_modules.study.study import Study
from glassarmor.lightning_modules.study.verdicts import Setting, by_method, chosen, settings_of

SETTINGS: Final = ("middle", "all", "chosen")


@dataclass(frozen=True)
class Round:
    """What every candidate that is still in is trained with, and how many then go on.

    Args:
        seeds: the first so many of the study.
        settings: of each candidate's grid: its middle point, all, or the one with the best held-out robust accuracy so far.
            Bases of candidates are trained at all of theirs: they are the fronts to beat.
        keep: candidates that go on; None for the last round.
    """

    seeds: int
    settings: str = "all"
    keep: int | None = None


def rounds_of(study: Study) -> tuple[Round, ...]:
    """The rounds that a study asks for; empty for a study that is no race.

    Raises:
        ValueError: an entry that is unknown or wrong; names its key.
    """
    found = []
    for i, entry in enumerate(study.rounds):
        unknown = set(entry) - {field.name for field in fields(Round)} if isinstance(entry, Mapping) else {entry}
        if unknown or "seeds" not in entry:
            raise ValueError(f"study.rounds[{i}]: expected seeds, and perhaps settings and keep; found {entry!r}")
        one = Round(**entry)
        last = i == len(study.rounds) - 1
        if type(one.seeds) is not int or not 1 <= one.seeds <= len(study.seeds):
            raise ValueError(
                f"study.rounds[{i}].seeds: expected a whole number from 1 to {len(study.seeds)}, found {one.seeds!r}"
            )
        if one.settings not in SETTINGS or (i == 0 and one.settings == "chosen"):
            allowed = ", ".join(SETTINGS[: 2 if i == 0 else 3])
            raise ValueError(f"study.rounds[{i}].settings: expected one of {allowed}; found {one.settings!r}")
        if not (last and one.keep is None) and (type(one.keep) is not int or one.keep < 1):
            raise ValueError(f"study.rounds[{i}].keep: expected how many candidates go on, >= 1; found {one.keep!r}")
        found.append(one)
    return tuple(found)


@dataclass(frozen=True)
class Race:
    """How far a race is: the members of the rounds up to the first unfinished one, and each finished round's scores, best
    first, by candidate; NaN where no run of it finished."""

    members: list[Member]
    scores: list[dict[str, float]]


def race(study: Study, members: Sequence[Member], cards: Sequence[RunRecord], left: Collection[str]) -> Race:
    """Who runs now.

    Args:
        members: all of the study.
        cards: of those that were started.
        left: names of members that still have to be trained or judged.
    """
    bases = study.bases
    controls = {study.baseline, *(base for some in bases.values() for base in some)}
    known = {card.name: card for card in cards}
    alive = [name for name in study.methods if name not in controls]
    entered: dict[str, Member] = {}
    scores: list[dict[str, float]] = []
    for one in rounds_of(study):
        seeds = set(study.seeds[: one.seeds])
        held_against = {study.baseline, *(base for name in alive for base in bases[name])}
        runs = [m for m in members if m.seed in seeds and m.method in held_against]
        for name in alive:
            runs += _entered(name, one, [m for m in members if m.method == name and m.seed in seeds], known)
        entered |= {member.name: member for member in runs}
        if any(member.name in left for member in runs):
            break
        done = [known[member.name] for member in runs if member.name in known]
        found = {name: score(name, bases[name], done) for name in alive}
        ranked = sorted(alive, key=lambda name: (math.isnan(found[name]), -found[name]))  # equal ones keep their order
        scores.append({name: found[name] for name in ranked})
        alive = ranked[: one.keep]
    return Race(list(entered.values()), scores)


def _entered(name: str, one: Round, members: Sequence[Member], known: Mapping[str, RunRecord]) -> list[Member]:
    """A candidate's members in a round."""
    points = list(dict.fromkeys(member.setting for member in members))
    kept = points
    if one.settings == "middle":
        kept = points[len(points) // 2 :][:1]
    if one.settings == "chosen":
        best = chosen(settings_of([card for card in known.values() if card.method == name]))
        kept = [best.point] if best is not None else points
    return [member for member in members if member.setting in kept]


def score(method: str, bases: Sequence[str], cards: Sequence[RunRecord]) -> float:
    """Held-out robust accuracy of a method's chosen setting above its bases' front at the same clean accuracy, mean over
    seeds (ours); where it is cleaner than they ever were, above their cleanest point, which is less than it is
    worth.  NaN if no run of it, or of them at the same seed, finished.
    """
    methods = by_method(settings_of(cards))
    best = chosen(methods.get(method, []))
    if best is None:
        return math.nan
    control = [setting for base in bases for setting in methods.get(base, [])]
    gains = [_above(_held_out(card), control, seed) for seed, card in best.runs.items()]
    gains = [gain for gain in gains if not math.isnan(gain)]
    return fmean(gains) if gains else math.nan


def _above(point: tuple[float, float], base: Sequence[Setting], seed: int) -> float:
    theirs = [_held_out(setting.runs[seed]) for setting in base if seed in setting.runs]
    theirs = [p for p in theirs if not math.isnan(sum(p))]
    if not theirs or math.isnan(sum(point)):
        return math.nan
    cleanest = theirs[front(theirs)[-1]][0]
    return point[1] - robust_at(theirs, min(point[0], cleanest))


def _held_out(card: RunRecord) -> tuple[float, float]:
    """Clean and robust."""
    return tuple(card.selected.get(f"val/{kind}_acc", math.nan) for kind in ("clean", "robust"))  # type: ignore[return-value]


def race_table(found: Race, rounds: Sequence[Round]) -> Table:
    """A row a candidate, best first: its score in each round, in points, and where it ended."""
    order = [name for scores in reversed(found.scores) for name in scores]
    rows: list[tuple[Any, ...]] = []
    for name in dict.fromkeys(order):
        own = [scores.get(name) for scores in found.scores]
        last = max(i for i, value in enumerate(own) if value is not None)
        keep = rounds[last].keep
        went_on = keep is None or list(found.scores[last]).index(name) < keep
        ended = "finished" if last == len(rounds) - 1 else "goes on" if went_on else f"out after round {last + 1}"
        rows.append((name, *("–" if v is None else "failed" if math.isnan(v) else f"{100 * v:+.1f}" for v in own), ended))
    columns = ("candidate", *(f"round {i + 1}" for i in range(len(found.scores))), "")
    return Table("The race: held-out robust accuracy above the base's front at equal clean accuracy, points", columns, rows)
