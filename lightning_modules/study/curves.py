"""Runs over their epochs, beside each other: tables, curves and Flow Views."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glassarmor.interpret.views.charts import Bars, Chart, Lines, Stored, Table
from glassarmor.interpret.views.page.page import stored_charts
from glassarmor.interpret.views.view import View
from glassarmor.lightning_modules.run.console import marked
from glassarmor.lightning_modules.study.records import best_row

CURVES = {  # key in metrics.csv → title, unit
    "val/robust_acc": ("Robust accuracy, held out", "%"),
    "val/clean_acc": ("Clean accuracy, held out", "%"),
    "pse/share_suppression": ("Regions dominated by suppression", "%"),
    "pse/share_promotion": ("Regions dominated by promotion", "%"),
    "pse/promotion": ("Promotion of the target, mean per image", "logits"),
    "pse/suppression": ("Suppression of the true class, mean per image", "logits"),
    "profiles/turned": ("Probe images that turn", "%"),
    "cam/similarity_true": ("Similarity of the true class's maps, clean and attacked", ""),
    "restoration/effect": ("Area under the restoration curve", ""),
}


@dataclass(frozen=True)
class Run:
    """What a run folder says."""

    name: str
    info: dict[str, Any]
    metrics: list[dict[str, float]]
    results: dict[str, Any]
    report: Path


def results_table(runs: list[Run]) -> Table:
    """A row a run and network, accuracies in percent; runs that have not finished say so."""
    attacks = list(dict.fromkeys(name for run in runs for row in _networks(run).values() for name in row))
    rows: list[tuple[str | float | int, ...]] = []
    for run in runs:
        for network, row in _networks(run).items():
            broken, guessing = (network in run.results.get(key, []) for key in ("not_finite", "guessing"))
            shares = (round(100 * row[a], 2) if a in row else float("nan") for a in attacks)
            rows.append((run.name, marked(network, not broken, guessing), *shares))
        if not _networks(run):
            rows.append((run.name, "not finished", *(float("nan") for _ in attacks)))
    return Table("Accuracy on the test set", ("run", "network", *(f"{a} (%)" for a in attacks)), rows, open=True)


def _networks(run: Run) -> dict[str, dict[str, float]]:
    return {name: row for name, row in run.results.items() if isinstance(row, dict)}


def best_epoch(run: Run) -> dict[str, float]:
    """The epoch that ``best.ckpt`` holds; empty where no epoch was the best."""
    return dict(best_row(run.metrics, run.report.parent))


def curves(runs: list[Run]) -> list[Lines]:
    """One chart a quantity that any run measured, one line a run, over epochs."""
    charts = []
    for key, (title, unit) in CURVES.items():
        if not any(key in row for run in runs for row in run.metrics):
            continue
        epochs = sorted({int(row["epoch"]) for run in runs for row in run.metrics})
        series = []
        for run in runs:
            known = {int(row["epoch"]): row.get(key, float("nan")) for row in run.metrics}
            series.append(tuple(known.get(epoch, float("nan")) for epoch in epochs))
        x = tuple(float(epoch) for epoch in epochs)
        charts.append(Lines(title, x, "epoch", tuple(run.name for run in runs), tuple(series), unit))
    return charts


def flows(runs: list[Run]) -> list[Chart]:
    """Activation Profiles of each run at its last epoch, from its dashboard, on one axis; none unless two share images.

    The epoch of best robust accuracy of an undefended run is often its first: a network that has learnt nothing.
    """
    found = [stored_charts(run.report, int(run.metrics[-1]["epoch"]), "profiles") for run in runs]
    kept: list[tuple[str, Stored, Stored]] = []  # run, its medians by layer, its Flow View
    for run, charts in zip(runs, found, strict=True):
        types = {chart.chart["type"]: chart for chart in charts}
        same = run.info.get("probe") == runs[0].info.get("probe")
        if same and {"lines", "profiles"} <= types.keys() and types["lines"].chart.get("spread"):  # older pages have none
            kept.append((run.name, types["lines"], types["profiles"]))
    if len(kept) < 2:
        return []
    names, medians, views = zip(*kept, strict=True)
    drawn: list[Chart] = [
        replace(view, chart={**view.chart, "title": name}) for name, view in zip(names, views, strict=True)
    ]
    first = medians[0].chart
    if any(other.chart["x_names"] != first["x_names"] for other in medians):
        return drawn
    attacked = Lines(
        "Attacked images on one axis, last epoch: 0 true class, 1 target; median and middle half",
        tuple(first["x"]),
        first["x_label"],
        tuple(names),
        tuple(tuple(other.chart["series"][1]) for other in medians),
        x_names=tuple(first["x_names"]),
        spread=tuple((tuple(other.chart["spread"][1][0]), tuple(other.chart["spread"][1][1])) for other in medians),
    )
    return [attacked, *drawn]


def compare(runs: list[Run]) -> View:
    """The comparison as one view of the page."""
    table = results_table(runs)
    best = [best_epoch(run) for run in runs]
    order = sorted(range(len(runs)), key=lambda i: -best[i].get("val/robust_acc", 0.0))
    top = [f"{runs[i].name} {100 * best[i].get('val/robust_acc', 0.0):.1f} %" for i in order]
    keys = [key for key in CURVES if any(key in row for row in best)]
    measured = Table(
        "What the dashboards measured at each run's best epoch",
        ("run", "epoch", *(CURVES[key][0] for key in keys)),
        [
            (run.name, int(row["epoch"]) if row else "none", *(round(row.get(key, float("nan")), 4) for key in keys))
            for run, row in zip(runs, best, strict=True)
        ],
        open=True,
    )
    bars = Bars(
        "Held-out robust accuracy, best epoch",
        tuple(run.name for run in runs),
        tuple(row.get("val/robust_acc", float("nan")) for row in best),
        "%",
        reference=tuple(row.get("val/clean_acc", float("nan")) for row in best),
        reference_label="clean",
    )
    charts: tuple[Chart, ...] = (table, bars, measured, *curves(runs), *flows(runs))
    return View(
        "comparison",
        "Runs compared",
        f"Held-out robust accuracy at the best epoch: {', '.join(top)}.",
        charts,
        how_to_read="One seed a run says little: repeat seeds before believing a difference of a few points. The test set "
        "selects nothing.",
    )
