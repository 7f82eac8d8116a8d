"""What a comparison leaves: a view for the page, tables as text, pictures for papers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from glassarmor.interpret.statistics import Paired, front, mean_std
from glassarmor.interpret.storage import write_atomic
from glassarmor.interpret.views.charts import Intervals, Scatter, Table
from glassarmor.interpret.views.draw.ablation import Front, fronts_figure, intervals_figure, parallel_figure
from glassarmor.interpret.views.draw.figures import save
from glassarmor.interpret.views.draw.text import comma_separated, latex, markdown
from glassarmor.interpret.views.view import View
from glassarmor.lightning_modules.study.records import RunRecord
from glassarmor.lightning_modules.study.tables import (
    accuracy_table,
    in_a_line,
    in_points,
    measured_tables,
    runs_table,
    verdict_table,
)
from glassarmor.lightning_modules.study.verdicts import (
    Setting,
    Verdict,
    attacks_of,
    by_method,
    chosen,
    settings_of,
    verdicts,
)

HOW = (
    "The seed is the unit: ± is the standard deviation over seeds, intervals and p are Student's on paired differences, "
    "'flips' the exact sign-flip permutation (never below 2^(1 − seeds)), Holm corrects over the candidates. "
    "Each method's setting was chosen by held-out robust accuracy alone; the test set was opened once, for these numbers, "
    "and selects nothing. 'At equal clean': against the base's own front, seed by seed, at the candidate's clean "
    "accuracy; seeds whose clean accuracy the base never reached are left out ('of' says how many remain)."
)


def attack_compared(settings: Sequence[Setting], asked: str | None, network: str) -> str:
    """The attack whose accuracy is compared: the one asked for, else the last that every run knows.

    Raises:
        ValueError: another than these, or no common attack.
    """
    known = attacks_of(settings, network)[1:]
    if not known:
        raise ValueError(f"network: no attack was run on {network!r} in every run; nothing can be compared yet")
    if asked is not None and asked not in known:
        raise ValueError(f"attack: expected one of {', '.join(known)}; found {asked!r}")
    return asked or known[-1]


def ablation_view(
    cards: Sequence[RunRecord],
    baseline: str,
    attack: str,
    network: str,
    caveat: str = "",
    bases: Mapping[str, Sequence[str]] | None = None,
) -> tuple[View, dict[str, Table], list[str]]:
    """The comparison as one view, its tables (accuracies, verdicts, what the dashboards measured) and a line a verdict."""
    settings = settings_of(cards)
    found = verdicts(settings, baseline, attack, network, bases)
    accuracy, judged = accuracy_table(settings, network, baseline, attack), verdict_table(found, attack)
    measured = {table.title.rpartition(": ")[2]: table for table in measured_tables(settings, found)}
    view = View(
        "ablation",
        f"Methods against {baseline}",
        " ".join(filter(None, (headline(found, baseline, attack), caveat))),
        (
            *([] if (forest := differences(found, baseline, attack)) is None else [forest]),
            _scatter(settings, baseline, attack, network),
            accuracy,
            *([judged] if found else []),
            *measured.values(),
        ),
        how_to_read=HOW,
    )
    return view, {"accuracy": accuracy, "verdicts": judged, **measured}, [in_a_line(verdict, attack) for verdict in found]


def headline(found: Sequence[Verdict], baseline: str, attack: str) -> str:
    """What a reader should conclude, from the numbers alone."""
    if not found:
        return f"Nothing stands beside {baseline} yet."
    control = baseline if {v.base.method for v in found} == {baseline} else "their bases"
    tested = [v for v in found if not math.isnan(v.robust.p)]  # one seed is no test
    best = max(tested or found, key=lambda v: v.robust.mean)
    sure = [v for v in found if v.holm < 0.05]
    better = [v for v in sure if v.robust.mean > 0]
    if not tested:
        return (
            f"One seed a method is no test. The largest difference to {control} under {attack} is "
            f"{100 * best.robust.mean:+.1f} points ({best.setting.label})."
        )
    text = (
        f"Against {control}, accuracy under {attack} is higher for {len(better)} of {len(tested)} candidates and lower for "
        f"{len(sure) - len(better)} (p < 0.05 after Holm); the largest difference is {100 * best.robust.mean:+.1f} points "
        f"({best.setting.label}, {best.robust.seeds} seeds)"
    )
    level = [v for v in tested if v.equal_clean is not None]
    if not level:
        return text + "."
    top = max(level, key=lambda v: v.equal_clean.mean if v.equal_clean else -math.inf)
    assert top.equal_clean is not None
    name = f"{top.setting.label}, {_seeds(top.equal_clean)}"
    return f"{text}; at equal clean accuracy {100 * top.equal_clean.mean:+.1f} points ({name})."


def _seeds(gain: Paired) -> str:
    return f"{gain.seeds} seed{'s' * (gain.seeds > 1)}"


def differences(found: Sequence[Verdict], baseline: str, attack: str) -> Intervals | None:
    """Every candidate above its base's front at the same clean accuracy, the best first; None where none can be said.

    The axis ends at twice the largest difference: an interval of two seeds would leave nothing else to see.
    """
    known = [v for v in found if v.equal_clean is not None]
    known.sort(key=lambda v: -v.equal_clean.mean if v.equal_clean else 0.0)
    if not known:
        return None
    gains = [v.equal_clean for v in known if v.equal_clean is not None]
    own = {v.base.method for v in known} == {baseline}
    return Intervals(
        f"Accuracy under {attack} above {baseline if own else 'the base'} at the same clean accuracy, 95 % intervals",
        "points; filled: the interval is without 0, not corrected for the number of candidates",
        tuple(v.setting.label + (f", against {v.base.method}" if v.base.method != baseline else "") for v in known),
        tuple(100 * gain.mean for gain in gains),
        tuple(100 * gain.low for gain in gains),
        tuple(100 * gain.high for gain in gains),
        tuple(f"{in_points(gain)}, {_seeds(gain)}" for gain in gains),
        max(2.0, 2 * max(abs(100 * gain.mean) for gain in gains)),
    )


def _fronts(settings: Sequence[Setting], attack: str, network: str) -> list[Front]:
    fronts = []
    for method, group in by_method(settings).items():
        known = [s for s in group if s.accuracy(attack, network)]
        if not known:
            continue
        numbers = [[mean_std(list(s.accuracy(a, network).values())) for a in ("clean", attack)] for s in known]
        values, best = np.array(numbers), chosen(group)
        place = known.index(best) if best in known else -1
        fronts.append(Front(method, values[..., 0], values[..., 1], tuple(s.point for s in known), place))
    return fronts


def _scatter(settings: Sequence[Setting], baseline: str, attack: str, network: str) -> Scatter:
    """All settings, or each method's chosen one; the page shows one group at a time, and the baseline's front in both."""
    known = [s for s in settings if s.accuracy(attack, network)]
    best = [one for group in by_method(known).values() if (one := chosen(group)) is not None]
    shown = [*known, *best]
    points = [s.mean_point(attack, network) for s in shown]
    own = [i for i, s in enumerate(known) if s.method == baseline]
    return Scatter(
        "Clean against robust accuracy, mean over seeds",
        "clean accuracy (%)",
        f"{attack} (%)",
        tuple(s.label for s in shown),
        tuple(100 * clean for clean, _ in points),
        tuple(100 * robust for _, robust in points),
        (1.0,) * len(shown),
        "",
        tuple([0] * len(known) + [1] * len(best)),
        ("all settings", "each method's chosen setting"),
        named=True,
        line=tuple(own[i] for i in front([points[i] for i in own])),
        line_label=f"front of {baseline}",
    )


def _sweep(settings: Sequence[Setting], attack: str, network: str) -> tuple[list[str], np.ndarray, list[str]]:
    """Axes, a row a setting, and methods: numeric keys of the grids, then accuracies, cost, what dashboards measured."""
    known = [s for s in settings if s.accuracy(attack, network)]

    def mean(setting: Setting, values: str, key: str) -> float:
        return mean_std([getattr(card, values).get(key, math.nan) for card in setting.runs.values()])[0]

    grids = [_numbers(s.point) for s in known]
    keys = dict.fromkeys(key for grid in grids for key in grid)
    columns: dict[str, list[float]] = {key: [grid.get(key, math.nan) for grid in grids] for key in keys}
    for name in ("clean", attack):
        columns[name] = [mean_std(list(s.accuracy(name, network).values()))[0] for s in known]
    columns["CPU seconds"] = [mean(s, "cost", "cpu_seconds") for s in known]
    measured = dict.fromkeys(key for s in known for card in s.runs.values() for key in card.measured)
    whole = [key for key in measured if key.count("/") == 1]  # by layer they would be dozens of axes
    panels = dict.fromkeys(key.split("/")[0] for key in whole)
    for key in [key for panel in panels for key in [k for k in whole if k.startswith(f"{panel}/")][:2]]:
        columns[key] = [mean(s, "measured", key) for s in known]
    kept = {key: values for key, values in columns.items() if not all(map(math.isnan, values))}
    return list(kept), np.array(list(kept.values())).T, [s.method for s in known]


def _numbers(point: str) -> dict[str, float]:
    """ "weight=0.5, over=units" → {"weight": 0.5}: the parts of a grid's point that are numbers."""
    found = {}
    for part in filter(None, point.split(", ")):
        key, _, value = part.partition("=")
        try:
            found[key] = float(value)
        except ValueError:
            continue
    return found


def write_ablation(
    out: Path, cards: Sequence[RunRecord], view: View, tables: Sequence[Table], baseline: str, attack: str, network: str
) -> list[Path]:
    """``tables.md``, ``tables.tex``, ``runs.csv``, and ``differences``, ``fronts`` and ``sweep`` as svg and png in ``out``.

    ``view`` is that of :func:`ablation_view`.  Returns the paths.
    """
    settings = settings_of(cards)
    figures = {"fronts": fronts_figure(_fronts(settings, attack, network), attack, baseline)}
    if (forest := next((chart for chart in view.charts if isinstance(chart, Intervals)), None)) is not None:
        figures = {"differences": intervals_figure(forest), **figures}
    names, rows, methods = _sweep(settings, attack, network)
    if len(rows) > 1:
        figures["sweep"] = parallel_figure(names, rows, methods, attack)
    pictures = "\n".join(f"![{name}]({name}.svg)\n" for name in figures)
    texts = {
        "tables.md": "\n".join(markdown(table) for table in tables) + f"\n{HOW}\n\n{pictures}",
        "tables.tex": "\n".join(latex(table) for table in tables),
        "runs.csv": comma_separated(runs_table(cards)),
    }
    for name, text in texts.items():
        write_atomic(out / name, text)
    written = [out / name for name in texts]
    for name, figure in figures.items():
        for suffix in ("svg", "png"):
            save(figure, out / f"{name}.{suffix}")
            written.append(out / f"{name}.{suffix}")
    return written
