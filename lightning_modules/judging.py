"""Robust accuracy from the command line: a suite with a bar of what still stands, a table, and ``suite.json``."""

from __future__ import annotations

import datetime
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from torch import Tensor, nn

from defenses.robustness import Evaluation, Progress, evaluate_robustness
from defenses.terms import Term
from defenses.threat import Threat
from interpret.views.encode import plain
from interpret.views.page import write_atomic
from interpret.views.view import Table
from lightning_modules.console import console, show


@contextmanager
def suite_bar() -> Iterator[Callable[[Progress], None]]:
    """A bar over the batches of the attack in progress, with the accuracy so far and the time left."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn()
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1, told="")

        def told(now: Progress) -> None:
            left = "" if now.left is None else f", at most {datetime.timedelta(seconds=round(now.left))} left"
            bar.update(
                task,
                description=f"{now.place + 1}/{now.attacks} {now.attack}",
                total=now.batches,
                completed=now.batch,
                told=f"robust {100 * now.accuracy:.1f} %{left}",
            )

        yield told


def attack_table(found: Evaluation) -> Table:
    """What stood after each attack, in percent, and what it cost."""
    title = f"{found.suite}, {found.threat}, {found.n} images"
    columns = ("", "accuracy so far (%)", "attacked", "felled", "forwards", "backwards", "seconds")
    rows: list[tuple[str | float, ...]] = [("clean", round(100 * found.clean_accuracy, 2), found.n, "", "", "", "")]
    for a in found.attacks:
        share = round(100 * a.accuracy, 2)
        rows.append((a.name, share, a.attacked, a.felled, a.forwards, a.backwards, round(a.seconds, 1)))
    return Table(title, columns, rows)


def judge(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    suite: str,
    folder: Path,
    about: Mapping[str, Any],
    *,
    subset: int | None = None,
    batch_size: int = 250,
    seed: int = 0,
    terms: Mapping[str, Term] | None = None,
    twin: nn.Module | None = None,
    corruptions: bool = False,
) -> Evaluation:
    """Run a suite, show it, and write ``suite.json``: numbers, per-example arrays, and ``about``.

    The work done so far is kept in ``suite_state.json`` beside it, so that the same command goes on where it was stopped.
    Arguments as in :func:`defenses.robustness.evaluate_robustness`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "suite_state.json"
    with warnings.catch_warnings(record=True) as told, suite_bar() as bar:
        found = evaluate_robustness(
            net,
            images,
            labels,
            threat,
            suite,
            subset=subset,
            batch_size=batch_size,
            seed=seed,
            terms=terms,
            twin=twin,
            state=state,
            progress=bar,
            corruptions=corruptions,
        )
    for words in dict.fromkeys([*(str(each.message) for each in told), *found.notes]):
        console.print(f"[yellow]note[/yellow]  {words}")
    show(attack_table(found))
    low, high = found.interval
    console.print(
        f"[bold]robust accuracy {100 * found.accuracy:.2f} %[/bold]  "
        f"95 % interval {100 * low:.2f}..{100 * high:.2f} %, n = {found.n}, worst case of {len(found.attacks)} attacks"
    )
    if found.corruptions:
        rows: list[tuple[str | float, ...]] = [
            (name, round(100 * sum(by) / len(by), 2), *(round(100 * value, 2) for value in by))
            for name, by in found.corruptions.items()
        ]
        columns = ("corruption", "mean (%)", *(f"severity {severity}" for severity in range(1, 6)))
        show(Table("Accuracy under common corruptions", columns, rows))
    text = json.dumps(plain({**about, **found.record()}), indent=1, allow_nan=False)
    write_atomic(folder / "suite.json", text + "\n")  # last: its presence says that the evaluation is whole
    state.unlink()
    console.print(f"numbers   {folder / 'suite.json'}")
    return found
