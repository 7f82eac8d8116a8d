"""Cards as settings, settings as the verdicts and tables of an ablation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from defenses.statistics import Paired, bootstrap_interval, front, holm, hypervolume, mean_std, paired, robust_at
from interpret.views.view import Table
from lightning_modules.cards import Evaluation, RunCard
from lightning_modules.console import marked

SELECTED: Final = "defended, best epoch"  # chosen on the validation split; the test set selects nothing


@dataclass(frozen=True)
class Setting:
    """A method at one point of its grid: its finished runs by seed, and how many failed."""

    method: str
    point: str
    runs: Mapping[int, RunCard]
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


def settings_of(cards: Sequence[RunCard]) -> list[Setting]:
    """Cards that differ in nothing but the seed belong together; in the order given."""
    groups: dict[tuple[str, str], list[RunCard]] = {}
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


def on_front(settings: Sequence[Setting], attack: str, network: str = SELECTED) -> list[Setting]:
    """Settings whose mean (clean, robust) no other dominates."""
    finished = [s for s in settings if s.accuracy(attack, network)]
    return [finished[i] for i in front([s.mean_point(attack, network) for s in finished])]


# ---- tables ---------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], factor: float = 1.0, digits: int = 1, sign: str = "") -> str:
    """ "mean ± standard deviation" over seeds; the mean alone for one seed, a dash for none."""
    known = [value for value in values if not math.isnan(value)]
    mean, std = mean_std([factor * value for value in known])
    if not known:
        return "–"
    text = f"{mean:{sign}.{digits}f}"
    return text if math.isnan(std) else f"{text} ± {std:.{digits}f}"


def in_points(found: Paired | None, digits: int = 1) -> str:
    """ "+0.1 [-1.3, +1.5]": a mean difference with its interval, in percentage points."""
    if found is None:
        return "–"
    if math.isnan(found.low):
        return f"{100 * found.mean:+.{digits}f}"
    return f"{100 * found.mean:+.{digits}f} [{100 * found.low:+.{digits}f}, {100 * found.high:+.{digits}f}]"


def _fewer(found: Paired | None, seeds: int) -> str:
    return f" of {found.seeds}" if found is not None and found.seeds < seeds else ""


def _p(value: float) -> str:
    return "–" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def accuracy_table(
    settings: Sequence[Setting], network: str = SELECTED, baseline: str = "", attack: str = "", brief: bool = False
) -> Table:
    """A row a setting: accuracies in percent, mean ± std over its seeds, and what its training cost.

    Args:
        baseline: with it, and the ``attack`` that is compared, every setting of another method is also held against the
            baseline's front.
        brief: the columns that a terminal has room for.
    """
    attacks = ["clean", attack] if brief and attack else attacks_of(settings, network)
    methods = by_method(settings)
    kept = {id(best) for group in methods.values() if (best := chosen(group)) is not None}
    control = methods.get(baseline, [])
    rows: list[tuple[str | float | int, ...]] = []
    for s in settings:
        above = above_front(s, control, attack, network) if control and s.method != baseline else []
        level = spread(above, 100, sign="+") + (f" of {len(above)}" if 0 < len(above) < len(s.runs) else "")
        costs = (
            spread([card.selected.get("val/robust_acc", math.nan) for card in s.runs.values()], 100),
            spread([card.cost.get("cpu_seconds", math.nan) for card in s.runs.values()], 1, 0),
            spread([card.cost.get("passes", math.nan) for card in s.runs.values()][:1], 1, 1),
        )
        mark = " (chosen)" if id(s) in kept and len(methods[s.method]) > 1 else ""
        rows.append(
            (
                *((s.label + mark,) if brief else (s.method, s.point + mark)),
                f"{len(s.runs)}" + (f", {s.failed} failed" if s.failed else "") + _not_finite(s, network) + _doubted(s),
                *(spread(list(s.accuracy(a, network).values()), 100) for a in attacks),
                *([level] if control else []),
                *(() if brief else costs),
            )
        )
    level_name = [f"{attack} above {baseline} at equal clean"] if control else []
    cost_names = () if brief else ("held out (%)", "CPU s", "passes a step")
    names = ("setting",) if brief else ("method", "setting")
    columns = (*names, "seeds", *(f"{a} (%)" for a in attacks), *level_name, *cost_names)
    return Table(f"Accuracy on the test set, {network}, mean ± standard deviation over seeds", columns, rows, open=True)


def _not_finite(setting: Setting, network: str) -> str:
    """Seeds whose network has weights or logits that are not finite, or guesses: their accuracies mean nothing."""
    found = {s: c.evaluations[network] for s, c in setting.runs.items() if network in c.evaluations}
    broken = {"not finite": [s for s in found if not found[s].finite], "guesses": [s for s in found if found[s].guesses]}
    return "".join(f", {what} in seed {', '.join(map(str, seeds))}" for what, seeds in broken.items() if seeds)


def _doubted(setting: Setting) -> str:
    """Seeds whose suites found signs that gradients are masked, and those that were changed while they were trained."""
    words = {
        f"{verdict} under {suite} in seed {seed}": None
        for seed, card in setting.runs.items()
        for suite, verdict in card.about.get("verdicts", {}).items()
        if verdict != "trusted"
    }
    for seed, card in setting.runs.items():
        words |= {f"seed {seed} changed {change}": None for change in card.about.get("changed", ())}
    return "".join(f", {text}" for text in words)


def in_a_line(verdict: Verdict, attack: str) -> str:
    """A verdict for the terminal."""
    level = "" if verdict.equal_clean is None else f"; at equal clean accuracy {in_points(verdict.equal_clean)}"
    return (
        f"{verdict.setting.label} − {verdict.base.method}: clean {in_points(verdict.clean)}, {attack} "
        f"{in_points(verdict.robust)} points, p {_p(verdict.robust.p)}, after Holm {_p(verdict.holm)}{level}"
    )


def verdict_table(found: Sequence[Verdict], attack: str) -> Table:
    """A row a candidate: differences in points with 95 % intervals, p as found and after Holm."""
    rows: list[tuple[str | float | int, ...]] = [
        (
            v.setting.label,
            v.base.label,
            v.robust.seeds,
            in_points(v.clean),
            in_points(v.robust),
            "–" if math.isnan(v.bootstrap[0]) else f"[{100 * v.bootstrap[0]:+.1f}, {100 * v.bootstrap[1]:+.1f}]",
            _p(v.robust.p),
            _p(v.robust.p_flip),
            _p(v.holm),
            in_points(v.equal_clean) + _fewer(v.equal_clean, v.robust.seeds),
            "–" if v.equal_clean is None else _p(v.equal_clean.p),
            _p(v.holm_equal_clean),
            "–" if v.volume is None else f"{1e4 * v.volume.mean:+.0f} ({_p(v.volume.p)})",
            v.dominated_by or "on the front",
        )
        for v in found
    ]
    columns = (
        "candidate",
        "against",
        "seeds",
        "Δ clean",
        f"Δ {attack}",
        "Δ, images drawn too",
        "p",
        "p, flips",
        "p, Holm",
        f"Δ {attack} at equal clean",
        "p there",
        "p there, Holm",
        "Δ area, %² (p)",
        "dominated by",
    )
    return Table("Against the base: paired differences over seeds, in points, with 95 % intervals", columns, rows, open=True)


MEASURED: Final = "What the dashboards measured on the probe in the first epoch drawn from the best on, chosen settings"
BESIDE: Final = "; in brackets the base's at the same clean accuracy, by a line through its means"
COLUMNS: Final = 12  # a panel that measured more is a table for each of its measures by layer


def measured_tables(settings: Sequence[Setting], found: Sequence[Verdict] = ()) -> list[Table]:
    """A table a panel: a row a method's chosen setting, a column a measure, mean ± std over seeds.

    Args:
        found: beside the measures of these stand those of their bases, where they lie within the base's clean accuracies.
    """
    best = [one for group in by_method(settings).values() if (one := chosen(group)) is not None]
    controls = {verdict.setting.label: verdict.control for verdict in found}
    keys = list(dict.fromkeys(key for s in best for card in s.runs.values() for key in card.measured))
    panels = [key.partition("/")[0] for key in keys]
    groups: dict[str, list[str]] = {}
    for key, panel in zip(keys, panels, strict=True):
        groups.setdefault(key.rpartition("/")[0] if panels.count(panel) > COLUMNS else panel, []).append(key)
    tables: list[Table] = []
    for group, measures in groups.items():
        rows: list[tuple[str | float | int, ...]] = []
        for one in best:
            control = controls.get(one.label, ())
            cells = (spread(_measured(one, key), 1, 3) + _at_equal_clean(one, control, key) for key in measures)
            rows.append((one.label, *cells))
        columns = ("chosen setting", *(key.removeprefix(f"{group}/") for key in measures))
        tables.append(Table(f"{MEASURED}{BESIDE * bool(found)}: {group}", columns, rows, open=not tables))
    return tables


def _measured(setting: Setting, key: str) -> list[float]:
    return [card.measured.get(key, math.nan) for card in setting.runs.values()]


def _at_equal_clean(setting: Setting, control: Sequence[Setting], key: str) -> str:
    """ " (0.100)": what the control measures at the setting's clean accuracy; "" where it has no two settings around it."""
    points = sorted((_clean(s), mean_std(_measured(s, key))[0]) for s in control)
    clean, values = ([point[i] for point in points] for i in (0, 1))
    own = _clean(setting)
    if len(points) < 2 or math.isnan(sum(values)) or not clean[0] <= own <= clean[-1]:
        return ""
    return f" ({np.interp(own, clean, values):.3f})"


def _clean(setting: Setting) -> float:
    return mean_std(list(setting.accuracy("clean").values()))[0]


def runs_table(cards: Sequence[RunCard]) -> Table:
    """A row a run and network, plain numbers: for spreadsheets and for W&B."""
    attacks = list(dict.fromkeys(a for card in cards for row in card.evaluations.values() for a in row.accuracy))
    costs = ("seconds", "cpu_seconds", "passes", "steps")
    keys = list(dict.fromkeys(key for card in cards for key in card.measured))
    rows: list[tuple[str | float | int, ...]] = []
    for card in cards:
        for network, row in (card.evaluations or {"": Evaluation({})}).items():
            rows.append(
                (
                    *(card.method, card.setting, card.seed, marked(network, row.finite, row.guesses), card.failure),
                    *(row.accuracy.get(a, math.nan) for a in attacks),
                    card.selected.get("val/robust_acc", math.nan),
                    *(float(card.cost.get(c, math.nan)) for c in costs),
                    *(card.measured.get(key, math.nan) for key in keys),
                    *(card.config, card.name),
                )
            )
    columns = ("method", "setting", "seed", "network", "failure", *attacks, "val/robust_acc", *costs, *keys, "config", "run")
    return Table("Every run", columns, rows)
