"""Cards as settings, settings as the verdicts and tables of an ablation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from glassarmor.interpret.statistics import Paired, bootstrap_interval, holm, hypervolume, mean_std, paired, robust_at
from glassarmor.lightning_modules.study.records import RunRecord

SELECTED: Final = "defended, best epoch"  # chosen on the validation split; the test set selects nothing


@dataclass(frozen=True)
class Setting:
    """A method at one point of its grid: its finished runs by seed, and how many failed."""

    method: str
    point: str
    runs: Mapping[int, RunRecord]
    failed: int

    @property
    def label(self) -> str:
        return f"{self.method} · {self.point}" if self.point else self.method

    def accuracy(self, attack: str, network: str = SELECTED) -> dict[int, float]:
        """By seed, in [0,1]; seeds whose run lacks it are left out."""
        rows = {seed: card.evaluations.get(network) for seed, card in self.runs.items()}
        return {seed: row.accuracy[attack] for seed, row in rows.items() if row is not None and attack in row.accuracy}

    def mean_point(self, attack: str, network: str = SELECTED) -> tuple[float, float]:
        """Mean clean and robust accuracy."""
        return tuple(mean_std(list(self.accuracy(a, network).values()))[0] for a in ("clean", attack))  # type: ignore[return-value]

    @property
    def held_out(self) -> float:
        """Mean held-out robust accuracy: what selects."""
        return mean_std([card.selected.get("val/robust_acc", math.nan) for card in self.runs.values()])[0]


def settings_of(cards: Sequence[RunRecord]) -> list[Setting]:
    """Cards that differ in nothing but the seed belong together; in the order given."""
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for card in cards:
        groups.setdefault((card.method, card.setting), []).append(card)
    return [
        Setting(
            *key,
            {c.seed: c for c in sorted(group, key=lambda c: c.seed) if not c.failure},
            sum(bool(c.failure) for c in group),
        )
        for key, group in groups.items()
    ]


def chosen(settings: Sequence[Setting]) -> Setting | None:
    """The setting with the highest held-out robust accuracy of those with the most finished seeds; None if none finished."""
    most = max((len(s.runs) for s in settings), default=0)
    finished = [s for s in settings if most and len(s.runs) == most]
    return max(finished, key=lambda s: (not math.isnan(s.held_out), s.held_out), default=None)


def by_method(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting.method, []).append(setting)
    return groups


def attacks_of(settings: Sequence[Setting], network: str = SELECTED) -> list[str]:
    """Attacks that every finished run knows, "clean" first, in the order of the evaluation."""
    rows = [card.evaluations[network].accuracy for s in settings for card in s.runs.values() if network in card.evaluations]
    return [name for name in (rows[0] if rows else ()) if all(name in row for row in rows)]


# ---- what an ablation says ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """A candidate's chosen setting against its base's chosen one, and against its base's front; accuracies in [0,1].

    ``bootstrap``: interval of the robust difference when images are drawn again, too; NaN without correctness.
    ``equal_clean``: robust accuracy above what the base's front has at the candidate's clean accuracy, by seed; None where
    no seed of the candidate lies within the base's reach.  ``p`` of :class:`Paired` are as found; ``holm`` and
    ``holm_equal_clean`` are corrected over the candidates.
    """

    setting: Setting
    base: Setting
    control: tuple[Setting, ...]  # all settings of the base
    clean: Paired
    robust: Paired
    bootstrap: tuple[float, float]
    equal_clean: Paired | None
    volume: Paired | None  # difference of the dominated area, clean × robust; None for single points
    holm: float
    holm_equal_clean: float
    dominated_by: str


def verdicts(
    settings: Sequence[Setting],
    baseline: str,
    attack: str,
    network: str = SELECTED,
    bases: Mapping[str, Sequence[str]] | None = None,
) -> list[Verdict]:
    """Every method but the baseline, judged against its base; the validation split has chosen each method's setting.

    Args:
        bases: method → the methods whose settings are its control; the baseline for all others, and where none of them has
            finished.

    Raises:
        ValueError: no such baseline, or one without a finished run.
    """
    methods = by_method(settings)
    if baseline not in methods:
        raise ValueError(f"baseline: expected one of {', '.join(methods)}; found {baseline!r}")
    plain = chosen(methods[baseline])
    if plain is None:
        raise ValueError(f"baseline: no run of {baseline!r} has finished")
    found = []
    for method, group in methods.items():
        best = chosen(group)
        if method == baseline or best is None:
            continue
        control = [setting for name in (bases or {}).get(method, (baseline,)) for setting in methods.get(name, [])]
        base = chosen(control)
        if base is None:
            control, base = methods[baseline], plain
        seeds = sorted(set(best.accuracy(attack, network)) & set(base.accuracy(attack, network)))
        if not seeds:
            continue
        clean, robust = (
            paired([best.accuracy(a, network)[s] for s in seeds], [base.accuracy(a, network)[s] for s in seeds])
            for a in ("clean", attack)
        )
        within = above_front(best, control, attack, network)
        found.append(
            Verdict(
                best,
                base,
                tuple(control),
                clean,
                robust,
                _bootstrap(best, base, seeds, attack, network),
                paired(within, [0.0] * len(within)) if within else None,
                _volume(group, control, seeds, attack, network),
                math.nan,
                math.nan,
                _dominating(best, settings, attack, network),
            )
        )
    plain_p = holm([v.robust.p for v in found])
    equal_p = holm([math.nan if v.equal_clean is None else v.equal_clean.p for v in found])
    return [replace(v, holm=p, holm_equal_clean=q) for v, p, q in zip(found, plain_p, equal_p, strict=True)]


def above_front(setting: Setting, base: Sequence[Setting], attack: str, network: str = SELECTED) -> list[float]:
    """By seed: robust accuracy above the front of ``base`` at the same seed and clean accuracy; seeds without both, and
    those cleaner than ``base`` ever was, are left out."""
    clean, robust = (setting.accuracy(a, network) for a in ("clean", attack))
    above = [
        robust[s] - robust_at(points, clean[s])
        for s in sorted(set(clean) & set(robust))
        if (points := _points(base, s, attack, network))
    ]
    return [value for value in above if not math.isnan(value)]


def _points(settings: Sequence[Setting], seed: int, attack: str, network: str) -> list[tuple[float, float]]:
    """(clean, robust) of one seed at every point of a method's grid."""
    rows = [(s.accuracy("clean", network), s.accuracy(attack, network)) for s in settings]
    return [(clean[seed], robust[seed]) for clean, robust in rows if seed in clean and seed in robust]


def _bootstrap(one: Setting, other: Setting, seeds: Sequence[int], attack: str, network: str) -> tuple[float, float]:
    rights = [[s.runs[seed].evaluations[network].correct.get(attack) for seed in seeds] for s in (one, other)]
    if any(r is None for row in rights for r in row):
        return math.nan, math.nan
    return bootstrap_interval(*rights)  # type: ignore[arg-type]


def _volume(
    group: Sequence[Setting], base: Sequence[Setting], seeds: Sequence[int], attack: str, network: str
) -> Paired | None:
    """Only fronts of as many points compare: more points dominate more, whatever they are."""
    if len(group) < 2 or len(group) != len(base):
        return None
    ours, theirs = ([hypervolume(_points(side, seed, attack, network)) for seed in seeds] for side in (group, base))
    return paired(ours, theirs)


def _dominating(setting: Setting, settings: Sequence[Setting], attack: str, network: str) -> str:
    """A setting whose mean is at least as good in both accuracies and better in one; "" where there is none."""
    clean, robust = setting.mean_point(attack, network)
    for other in settings:
        c, r = other.mean_point(attack, network)
        if c >= clean and r >= robust and (c, r) != (clean, robust):
            return other.label
    return ""
