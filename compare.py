"""Set runs beside each other: one page with their results, their curves and what their dashboards measured.

python compare.py runs/A runs/B [--out comparisons/NAME]
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from interpret.views.page import ReportPage
from interpret.views.view import Bars, Chart, Lines, Table, View
from lightning_modules.console import clear_errors, console, show

SAME = ("data", "threat", "probe", "val_attack", "test_attacks")  # what must agree for numbers to compare
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
    config: DictConfig
    info: dict[str, Any]
    metrics: list[dict[str, float]]
    results: dict[str, Any]


def read_run(path: Path) -> Run:
    """A run folder.

    Raises:
        ValueError: no run folder, or one without a finished epoch.
    """
    if not (path / "config.yaml").is_file() or not (path / "metrics.csv").is_file():
        raise ValueError(f"runs: expected a run folder with config.yaml and metrics.csv, found none at {path}")
    config = OmegaConf.load(path / "config.yaml")
    assert isinstance(config, DictConfig)
    with (path / "metrics.csv").open(newline="", encoding="utf-8") as file:
        metrics = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    if not metrics:
        raise ValueError(f"runs: {path} holds no finished epoch")
    results = path / "results.json"
    return Run(
        path.name,
        config,
        json.loads((path / "run.json").read_text(encoding="utf-8")),
        metrics,
        json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {},
    )


def check_comparable(runs: list[Run]) -> None:
    """Raises ValueError unless data, threat, attacks and probe images agree; says what differs."""
    first = runs[0]
    for run in runs[1:]:
        for key in SAME:
            mine, theirs = (_without_seeds(OmegaConf.to_container(r.config.get(key))) for r in (first, run))
            if mine != theirs:
                raise ValueError(f"runs: {first.name} and {run.name} don't compare: {key} differs")


def _without_seeds(value: Any) -> Any:
    """Seeds may differ: runs that differ in nothing else are what means and deviations are made of."""
    if isinstance(value, dict):
        return {key: _without_seeds(inner) for key, inner in value.items() if key != "seed"}
    return value


def results_table(runs: list[Run]) -> Table:
    """A row a run and network, accuracies in percent; runs that have not finished say so."""
    attacks = list(dict.fromkeys(name for run in runs for row in _networks(run).values() for name in row))
    rows: list[tuple[str | float | int, ...]] = []
    for run in runs:
        for network, row in _networks(run).items():
            rows.append((run.name, network, *(round(100 * row[a], 2) if a in row else float("nan") for a in attacks)))
        if not _networks(run):
            rows.append((run.name, "not finished", *(float("nan") for _ in attacks)))
    return Table("Accuracy on the test set", ("run", "network", *(f"{a} (%)" for a in attacks)), rows, open=True)


def _networks(run: Run) -> dict[str, dict[str, float]]:
    return {name: row for name, row in run.results.items() if isinstance(row, dict)}


def best_epoch(run: Run) -> dict[str, float]:
    """The epoch with the highest held-out robust accuracy, the first of several."""
    return max(run.metrics, key=lambda row: row.get("val/robust_acc", float("-inf")))


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
            (run.name, int(row["epoch"]), *(round(row.get(key, float("nan")), 4) for key in keys))
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
    charts: tuple[Chart, ...] = (table, bars, measured, *curves(runs))
    return View(
        "comparison",
        "Runs compared",
        f"Held-out robust accuracy at the best epoch: {', '.join(top)}.",
        charts,
        how_to_read="One seed a run says little: repeat seeds before believing a difference of a few points. The test set "
        "selects nothing.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--debug", action="store_true", help="stack traces of errors")
    args = parser.parse_args()
    with clear_errors(args.debug):
        if len(args.runs) < 2:
            raise ValueError(f"runs: expected at least two run folders, found {len(args.runs)}")
        runs = [read_run(path) for path in args.runs]
        check_comparable(runs)
        out = args.out or Path("comparisons") / "_".join(run.name for run in runs)[:120]
        if (out / "index.html").exists():
            raise ValueError(f"--out: {out} holds a comparison already; choose another folder")
    view = compare(runs)
    meta = {run.name: f"{run.info['what']}, commit {run.info['commit']}" for run in runs}
    page = ReportPage(out, " / ".join(run.name for run in runs), meta, key_figures=(), overview=None)
    page.write_epoch(0, 0, {}, [view])
    page.finish()
    show(results_table(runs))
    console.print(f"page  {page.index}")


if __name__ == "__main__":
    main()
