"""Settings and verdicts as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from glassarmor.interpret.statistics import Paired, mean_std
from glassarmor.interpret.views.charts import Table
from glassarmor.lightning_modules.run.console import marked
from glassarmor.lightning_modules.study.records import Accuracies, RunRecord
from glassarmor.lightning_modules.study.verdicts import (
    SELECTED,
    Setting,
    Verdict,
    above_front,
    attacks_of,
    by_method,
    chosen,
)


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


def runs_table(cards: Sequence[RunRecord]) -> Table:
    """A row a run and network, plain numbers: for spreadsheets and for W&B."""
    attacks = list(dict.fromkeys(a for card in cards for row in card.evaluations.values() for a in row.accuracy))
    costs = ("seconds", "cpu_seconds", "passes", "steps")
    keys = list(dict.fromkeys(key for card in cards for key in card.measured))
    rows: list[tuple[str | float | int, ...]] = []
    for card in cards:
        for network, row in (card.evaluations or {"": Accuracies({})}).items():
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
