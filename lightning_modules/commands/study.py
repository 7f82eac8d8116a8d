"""Set runs beside each other: tables with statistics over seeds, pictures, and one page with their curves.

python compare.py runs/A runs/B [--baseline METHOD] [--out comparisons/NAME]    run folders, cards, folders of cards
python compare.py --study configs/study/tiny.yaml --out DIR [--jobs 2] [data.path=…]    train what is left of a study first
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from glassarmor.defenses.evaluation.suite import SUITES
from glassarmor.interpret.storage import check_links, file_name, read_object
from glassarmor.interpret.views.charts import Lines, Table
from glassarmor.interpret.views.draw.figures import charts_figure, save
from glassarmor.interpret.views.page.page import ReportPage
from glassarmor.interpret.views.view import View
from glassarmor.lightning_modules.cards.compare import cards_tables, cards_view, is_result_card, read_result_cards
from glassarmor.lightning_modules.commands.errors import end_by_disk
from glassarmor.lightning_modules.run.console import clear_errors, console, show
from glassarmor.lightning_modules.run.doors import started
from glassarmor.lightning_modules.run.log import check_wandb_mode, log_tables
from glassarmor.lightning_modules.run.saved_config import CONFIGS
from glassarmor.lightning_modules.study.curves import Run, compare, results_table
from glassarmor.lightning_modules.study.members import Member, members_of
from glassarmor.lightning_modules.study.race import Race, race, race_table, rounds_of
from glassarmor.lightning_modules.study.records import RunRecord, check_comparable, read_metrics, read_records
from glassarmor.lightning_modules.study.report import ablation_view, attack_compared, write_ablation
from glassarmor.lightning_modules.study.runner import cards_of, planned, reset_failures, run_members, unfinished
from glassarmor.lightning_modules.study.study import Study, read_study
from glassarmor.lightning_modules.study.tables import accuracy_table, runs_table
from glassarmor.lightning_modules.study.verdicts import SELECTED, settings_of


def read_run(path: Path) -> Run:
    """A run folder.

    Raises:
        ValueError: no run folder, or one without a finished epoch.
    """
    if not (path / "config.yaml").is_file() or not (path / "metrics.csv").is_file():
        raise ValueError(f"runs: expected a run folder with config.yaml and metrics.csv, found none at {path}")
    metrics = read_metrics(path)
    if not metrics:
        raise ValueError(f"runs: {path} holds no finished epoch")
    results = path / "results.json"
    return Run(
        path.name,
        read_object(path / "run.json", "runs"),
        metrics,
        read_object(results, "runs") if results.is_file() else {},
        path / "report",
    )


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    """Unresolved; a study asks for each once a seed, and reading the YAML is what takes time."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(overrides))


def composed(overrides: tuple[str, ...], seed: int) -> dict[str, Any]:
    """The config that ``python train.py OVERRIDES seed=SEED`` would train."""
    unresolved = _composed(overrides).copy()
    unresolved.seed = seed
    config = OmegaConf.to_container(unresolved, resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def judges_of(study: Study, members: Sequence[Member]) -> dict[str, DictConfig]:
    """The configs of a study's suites; refused, before any training: one that does not compose, an attack that nothing runs.

    Raises:
        ValueError: names the key of the YAML.
    """
    found = {}
    for name, lines in study.suites.items():
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                found[name] = compose("evaluate", ["checkpoint=RUN", *lines])
        except HydraException as error:
            raise ValueError(f"study.suites.{name}: {' '.join(str(error).split())}") from error
        if found[name].suite not in SUITES:
            raise ValueError(f"study.suites.{name}: expected suite={', '.join(SUITES)}; found {found[name].suite!r}")
    known = {attack for member in members for attack in member.config["test_attacks"]} | set(study.suites)
    if study.attack is not None and study.attack not in known:
        raise ValueError(f"study.attack: expected one of {', '.join(sorted(known))}; found {study.attack!r}")
    return found


def check_images(judges: Mapping[str, DictConfig], members: Sequence[Member]) -> None:
    """Refuse suites that ask for more images than the members' data has; it is loaded, once however many share it.

    Raises:
        ValueError: names the key of the YAML.
    """
    for config in {json.dumps(m.config["data"] | {"seed": 0}, default=str): m.config["data"] for m in members}.values():
        data = instantiate(config, _convert_="all")
        data.setup("fit")
        for name, asked in judges.items():
            there = len(data.test if asked.split == "test" else data.val)
            if asked.images is not None and not 1 <= asked.images <= there:
                raise ValueError(f"study.suites.{name}: expected 1 to {there} images, as there are; found {asked.images}")


def train_study(args: argparse.Namespace) -> tuple[Study, list[RunRecord], list[Table]]:
    """Train what is left of a study; the cards of all its members, and how its race went if it is one."""
    with clear_errors(args.debug, "--debug"):
        study = read_study(args.study)
        if args.out is None:
            raise ValueError("--out: a study needs a folder of its own, which it goes on with when called again")
        if args.jobs < 1:
            raise ValueError(f"--jobs: expected a whole number >= 1, found {args.jobs}")
        rounds = rounds_of(study)
        members = members_of(study, composed, args.runs)
        judges = judges_of(study, members)
        check_comparable([planned(member) for member in members], args.any_effort)
        if not any(fnmatch(m.name, args.only) for m in members):
            raise ValueError(f"--only: {args.only!r} matches none of {len(members)} members, e.g. {members[0].name}")
        if args.again:
            reset_failures(members, args.out)
    tell: Callable[[str], object] = lambda line: console.print(line, highlight=False)  # noqa: E731
    ended: int | None = None
    try:
        while True:  # a race has rounds, and what was killed or failed once goes on or is tried again
            cards, waiting = cards_of(members, args.out), unfinished(members, args.out)
            now = race(study, members, cards, {m.name for m in waiting}) if rounds else Race(members, [])
            chosen = [m for m in now.members if fnmatch(m.name, args.only)]
            if ended == 0 or (ended and not any(m in waiting for m in chosen)):
                break
            if ended is None and judges:
                with clear_errors(args.debug, "--debug"):
                    check_images(judges, [m for m in chosen if m in waiting])
            ended = run_members(chosen, args.out, started, args.jobs, tell)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        sys.exit(130)
    return study, cards, [race_table(now, rounds)] if now.scores else []


def compare_result_cards(paths: list[Path], out: Path | None, debug: bool) -> None:
    """Cards of evaluate.py's suites on one page."""
    with clear_errors(debug, "--debug"):
        cards = read_result_cards(paths)
        out = out or Path("comparisons") / file_name("_".join(cards))
        if (out / "index.html").exists():
            raise ValueError(f"--out: {out} holds a comparison already; choose another folder")
        check_links(out, "--out")
    view = cards_view(cards)
    about = {
        name: f"weights {card['model']['weights']}, commit {card['commit']}; selection: {card['data']['selection']}"
        for name, card in cards.items()
    }
    page = ReportPage(out, " / ".join(cards), about, key_figures=(), overview=None)
    page.write_epoch(0, 0, {}, [view])
    page.finish()
    for table in cards_tables(cards):
        show(table)
    console.print(view.headline, style="bold")
    console.print(f"page  {page.index}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="run folders or cards; with --study, overrides of members")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--study", type=Path, default=None, help="a YAML, e.g. of configs/study")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="members trained at a time, a thread each")
    parser.add_argument("--only", default="*", help="pattern of member names to train now")
    parser.add_argument("--again", action="store_true", help="try members that failed, and were given up, once more")
    parser.add_argument("--baseline", default=None, help="method that the others are judged against; the first by default")
    parser.add_argument("--attack", default=None, help="whose accuracy is compared; the last of the table by default")
    parser.add_argument("--network", default=None, help=f"row of the results that is compared; {SELECTED!r} by default")
    parser.add_argument("--any-effort", action="store_true", help="compare runs of other epochs and steps, too")
    parser.add_argument("--wandb", default="disabled", help="log the tables: online, offline, auto")
    parser.add_argument("--debug", action="store_true", help="stack traces of errors")
    return parser.parse_args()


@dataclass(frozen=True)
class Ablation:
    """Methods set beside each other over seeds, as runs and cards tell them."""

    view: View
    tables: dict[str, Table]
    lines: list[str]
    brief: Table  # of accuracies, for the console
    about: tuple[str, str, str]  # baseline, attack, network

    @classmethod
    def of(cls, args: argparse.Namespace, study: Study | None, cards: Sequence[RunRecord]) -> Ablation | None:
        """None where no run has finished.

        Raises:
            ValueError: a baseline, an attack or a network that no run has.
        """
        known = [card for card in cards if card.evaluations]
        if not known:
            return None
        network = args.network or (study.network if study is not None else SELECTED)
        wanted = args.attack or (study.attack if study is not None else None)
        attack = attack_compared(settings_of(cards), wanted, network)
        baseline = args.baseline or (study.baseline if study is not None else known[0].method)
        caveat = "Runs of unequal training effort are compared." if args.any_effort else ""
        bases = study.bases if study is not None and baseline == study.baseline else {}  # --baseline is for all
        view, tables, lines = ablation_view(cards, baseline, attack, network, caveat, bases)
        brief = accuracy_table(settings_of(cards), network, baseline, attack, brief=True)
        return cls(view, tables, lines, brief, (baseline, attack, network))


def about_runs(cards: Sequence[RunRecord]) -> dict[str, str]:
    """What the page says of its runs: each by itself where they are few."""
    if len(cards) <= 12:
        return {card.name: f"{card.method} {card.setting}, commit {card.about.get('commit', 'unknown')}" for card in cards}
    commits = dict.fromkeys(str(card.about.get("commit", "unknown")) for card in cards)
    return {  # a line a run would push the finding off the page; the table of runs.csv has them all
        "runs": f"{len(cards)} of {len({card.method for card in cards})} methods",
        "seeds": ", ".join(map(str, sorted({card.seed for card in cards}))),
        "commits": ", ".join(commits),
    }


def compared_records(folders: Sequence[Path], any_effort: bool) -> list[RunRecord]:
    """The records of these folders.

    Raises:
        ValueError: fewer than two, or of unequal effort.
    """
    records = read_records(folders)
    if len(records) < 2:
        raise ValueError(f"runs: expected at least two run folders, found {len(records)}")
    check_comparable(records, any_effort)
    return records


def write_curves(out: Path, view: View) -> None:
    """The curves of several runs as pictures."""
    drawing = charts_figure([c for c in view.charts if isinstance(c, Lines)], view.headline, columns=2)
    for suffix in ("png", "svg"):
        save(drawing, out / f"comparison.{suffix}")


def run() -> None:
    """``python compare.py``, ``glassarmor compare``."""
    try:
        _run(arguments())
    except OSError as error:
        end_by_disk(error, "the same command, when there is room, writes all of it")


def _run(args: argparse.Namespace) -> None:
    study, folders = None, [Path(path) for path in args.runs if args.study is None]
    if folders and all(is_result_card(path) for path in folders):
        compare_result_cards(folders, args.out, args.debug)
        return
    with clear_errors(args.debug, "--debug"):
        check_wandb_mode(args.wandb)
    races: list[Table] = []
    if args.study is not None:
        study, cards, races = train_study(args)
    with clear_errors(args.debug, "--debug"):
        if study is None:
            cards = compared_records(folders, args.any_effort)
        runs = [read_run(path) for path in folders if (path / "config.yaml").is_file()]
        name = file_name("_".join((path.parent if path.name == "cards" else path).stem for path in folders))
        out = args.out / "comparison" if study is not None else args.out or Path("comparisons") / name
        if study is None and (out / "index.html").exists():
            raise ValueError(f"--out: {out} holds a comparison already; choose another folder")
        check_links(out, "--out")
        views = [compare(runs)] if len(runs) > 1 else []
        found = Ablation.of(args, study, cards)
        if found is not None:
            views.insert(0, replace(found.view, charts=(*found.view.charts, *races)))
        if not views:
            raise ValueError("runs: none has finished, and cards have no curves; nothing can be compared yet")
    page = ReportPage(out, study.name if study is not None else name, about_runs(cards), key_figures=(), overview=None)
    page.write_epoch(0, 0, {}, views)
    page.finish()
    if len(runs) > 1:
        write_curves(out, views[-1])
    show(found.brief if found is not None else results_table(runs))
    if found is not None:
        for line in found.lines:
            console.print(line, highlight=False)
        for path in write_ablation(out, cards, found.view, [*found.tables.values(), *races], *found.about):
            console.print(path)
        if args.wandb != "disabled":
            named = {**found.tables, **dict(zip(("race",), races, strict=False)), "runs": runs_table(cards)}
            log_tables(out, "glassarmor", args.wandb, named, page.one_epoch(0))
    console.print(f"page  {page.index}")
    if study is not None and (failed := [card for card in cards if card.failure]):
        console.print(f"{len(failed)} of {len(cards)} runs have not finished, e.g. {failed[0].name}: {failed[0].failure}")
        sys.exit(1)
