"""Robust accuracy from the command line: a suite with a bar of what still stands, sanity checks, and the result card."""

from __future__ import annotations

import datetime
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from torch import Tensor, nn

from glassarmor.defenses.evaluation.examples import FelledExamples
from glassarmor.defenses.evaluation.robustness import Evaluation, Progress, run_suite
from glassarmor.defenses.evaluation.sanity import Check, SanityReport, finite_check, sanity_checks
from glassarmor.defenses.evaluation.suite import SuiteSettings
from glassarmor.defenses.threat import Linf, Threat
from glassarmor.interpret.storage import write_atomic
from glassarmor.interpret.views.charts import Bars, Chart, Lines, Table
from glassarmor.interpret.views.draw.figures import charts_figure
from glassarmor.interpret.views.view import Answer, View
from glassarmor.lightning_modules.cards.markdown import markdown
from glassarmor.lightning_modules.run.console import console, note, now_and_then, show

STATE: Final = "suite_state.json"


@contextmanager
def suite_bar() -> Iterator[Callable[[Progress], None]]:
    """A bar over the batches of the attack in progress, with the accuracy so far and the time left.

    Without a terminal, a line of the same now and then.
    """
    if not console.is_terminal:
        tell = now_and_then()
        yield lambda now: tell(f"{now.title}, {now.batch} of {now.batches}: {so_far(now)}")
        return
    said = partial(TextColumn, markup=False)
    columns = said("{task.description}"), BarColumn(), said("{task.fields[told]}"), TimeElapsedColumn()
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1, told="")

        def told(now: Progress) -> None:
            bar.update(
                task,
                description=now.title,
                total=now.batches,
                completed=now.batch,
                told=so_far(now),
            )

        yield told


def so_far(now: Progress) -> str:
    """What stands, and the time left of the attacks."""
    left = "" if not now.left else f", at most {datetime.timedelta(seconds=round(now.left))} left"
    return f"robust {100 * now.accuracy:.1f} %{left}"


def attack_table(found: Evaluation) -> Table:
    """What stood after each attack, in percent, and what it cost."""
    title = f"{found.suite}, {found.threat}, {found.n} images"
    columns = ("", "accuracy so far (%)", "attacked", "felled", "forwards", "backwards", "seconds")
    rows: list[tuple[str | float, ...]] = [
        ("clean", round(100 * found.clean_accuracy, 2), found.n, found.felled_by.count("clean"), found.n, 0, 0.0)
    ]
    for a in found.attacks:
        share = round(100 * a.accuracy, 2)
        rows.append((a.name, share, a.attacked, a.felled, a.forwards, a.backwards, round(a.seconds, 1)))
    return Table(title, columns, rows)


def judge(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    settings: SuiteSettings,
    folder: Path,
    felled: FelledExamples | None = None,
) -> Evaluation:
    """Run a suite and show what it found.

    The work done so far is kept in ``folder/suite_state.json``, so that the same command goes on where it was stopped; the
    caller removes it when all is written.  Arguments as in :func:`.evaluate_robustness`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(record=True) as told, suite_bar() as bar:
        found = run_suite(net, images, labels, threat, settings, state=folder / STATE, progress=bar, fallen=felled)
    for words in dict.fromkeys([*(str(each.message) for each in told), *found.notes]):
        note(words)
    show(attack_table(found))
    return found


def run_sanity(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    held: Tensor,
    threat: Threat,
    twin: nn.Module | None,
    seed: int,
    found: Evaluation,
    tell: Callable[[str], None],
) -> SanityReport:
    """The sanity checks of the number that a suite ``found``; ``held`` (N,) bool of these images withstand it.

    That all logits are finite is asked of all judged images.  Where there is too little to check, a report that says so.
    """
    finite = finite_check(len(found.unanswered), found.n)
    try:
        report = sanity_checks(net, x, y, threat, transfer_from=twin, held=held, seed=seed, tell=tell)
    except ValueError as error:
        too_few = Check("enough to check", False, float(len(x)), "16 images", str(error))
        none = Check("gradients are not zero", False, 1.0, "some", "no gradient reaches the images", grave=True)
        return SanityReport((finite, too_few) if found.gradient else (finite, none, too_few), {}, len(x))
    return replace(report, checks=(finite, *(check for check in report.checks if check.name != finite.name)))


def in_words(threat: Mapping[str, Any]) -> str:
    """A card's threat with its radius, as a fraction of 255 where it is one: "Linf ε = 8/255"."""
    levels = 255 * threat["eps"]
    whole = threat["norm"] == "Linf" and abs(levels - round(levels)) < 1e-6
    return f"{threat['norm']} ε = {f'{round(levels)}/255' if whole else format(threat['eps'], '.4g')}"


def unset_radius(threat: Threat, channels: int, data: str) -> str:
    """What to say of a radius that is only the default of a group of data whose images can be anything."""
    radius = in_words({"norm": threat.name, "eps": threat.eps})
    strokes = channels == 1 and isinstance(threat, Linf) and threat.eps < 0.1
    usual = "; images of strokes, such as MNIST's, are usually judged at Linf ε = 0.3" if strokes else ""
    return f"{radius} is the default of data={data}, meant for small colour photographs{usual}; threat.eps=... chooses it"


def card_view(card: Mapping[str, Any], sanity: SanityReport, found: Evaluation, unset: Sequence[str] = ()) -> View:
    """The result card as the first panel of the page; ``unset``: what the verdict has to say besides."""
    accuracy, by_class = card["accuracy"], card["accuracy"]["by_class"]
    low, high = accuracy["interval95"]
    why = "".join(f"; {words}" for words in (*sanity.reasons[:2], *unset))
    charts: list[Chart] = [
        Lines(
            "Accuracy against ε",
            tuple(point["eps"] for point in accuracy["by_eps"]),
            "ε",
            ("stands",),
            (tuple(point["robust"] for point in accuracy["by_eps"]),),
            "%",
            limits=(0, 1),
        ),
        Bars(
            "Robust accuracy by class",
            tuple(row["class"] for row in by_class),
            tuple(row["robust"] for row in by_class),
            "%",
            reference=tuple(row["clean"] for row in by_class),
            reference_label="clean",
        ),
        replace(attack_table(found), open=True),
        sanity_table(sanity),
    ]
    attacks = "1 attack" if len(found.attacks) == 1 else f"{len(found.attacks)} attacks"
    title = (
        f"Robust accuracy {100 * found.accuracy:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f} %), "
        f"{100 * found.clean_accuracy:.1f} % clean, against {in_words(card['threat'])} by the {found.suite} suite: "
        f"worst case of {attacks} on {found.n} images. Verdict: {sanity.verdict}{why}."
    )
    if found.corruptions:
        charts.append(corruption_table(found))
    drawn = [chart for chart in charts if isinstance(chart, Lines | Bars)]
    return View(
        "card",
        "Result card",
        title,
        tuple(charts),
        drawing=charts_figure(drawn, title, columns=2),
        answers=(Answer("trust", f"{sanity.verdict.capitalize()}. {title}"),),
        how_to_read="An image counts as robust only if it withstands every attack of the suite. Trusted: every sanity check "
        "passed; suspicious: one failed; invalid: one failed by so much that the number cannot be used.",
    )


def sanity_table(report: SanityReport) -> Table:
    """The checks and their outcomes, for the page and the console."""
    rows = [
        (check.name, "passed" if check.passed else "failed", check.figure, check.expected, check.sentence)
        for check in report.checks
    ]
    return Table(f"Sanity checks: {report.verdict}", ("check", "outcome", "figure", "expected", "found"), rows, open=True)


def corruption_table(found: Evaluation) -> Table:
    """Accuracy in percent by corruption and severity."""
    rows: list[tuple[str | float, ...]] = [
        (name, round(100 * sum(by) / len(by), 2), *(round(100 * value, 2) for value in by))
        for name, by in found.corruptions.items()
    ]
    columns = ("corruption", "mean (%)", *(f"severity {severity}" for severity in range(1, 6)))
    return Table("Accuracy under common corruptions", columns, rows, open=True)


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """``card.md`` and ``card.json``; the latter last: its presence says that the evaluation is whole."""
    text = json.dumps(card, indent=1, allow_nan=False) + "\n"  # first: what it refuses leaves no half of a card
    write_atomic(folder / "card.md", markdown(card))
    write_atomic(folder / "card.json", text)
    (folder / STATE).unlink(missing_ok=True)
