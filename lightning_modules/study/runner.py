"""Members of a study in processes of their own, resumably."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from glassarmor.defenses.evaluation.card import read_card as read_result_card
from glassarmor.interpret.storage import read_object, write_atomic
from glassarmor.lightning_modules.run.hardware import decisions
from glassarmor.lightning_modules.study.members import Member, as_override, portable_override
from glassarmor.lightning_modules.study.records import (
    ARCHIVE,
    RunRecord,
    read_archive,
    read_record,
    record_of,
    settled,
    write_record,
)
from glassarmor.lightning_modules.study.verdicts import SELECTED

TRIES = 2  # a member that fails by itself so often stays failed: the same config and seed fail alike


GRACE = 20.0  # seconds that members have to end after Ctrl-C


Program = Callable[[str], list[str]]  # "train" or "evaluate" → the words that start it
State = Literal["done", "failed", "resumable", "new"]


@dataclass(frozen=True)
class Place:
    """Where a member lives, and what judges it after its training."""

    folder: Path
    suites: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def record(self) -> dict[str, Any]:
        """``member.json``; an empty record for a member that was never started."""
        path = self.folder / "member.json"
        return read_object(path, "--study") if path.is_file() else {}

    def decided(self, member: Member) -> dict[str, object]:
        """What ``auto`` stands for in all members of this study."""
        return decisions(member.config, self.folder.parents[1])

    def write(self, **entries: Any) -> None:
        write_atomic(self.folder / "member.json", json.dumps({**self.record, **entries}, indent=1) + "\n")

    @property
    def trained(self) -> bool:
        """A run writes ``results.json`` last."""
        return (self.run / "results.json").is_file()

    def judged(self, suite: str) -> Path:
        """The result card of a suite, written last; asked otherwise, it is another."""
        asked = hashlib.sha256(repr(list(self.suites[suite])).encode()).hexdigest()[:6]
        return self.folder / "suites" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', suite)}_{asked}" / "card.json"

    @property
    def unjudged(self) -> list[str]:
        return [suite for suite in self.suites if not self.judged(suite).is_file()]

    @property
    def state(self) -> State:
        """Done when trained and judged by every suite; failed after ``TRIES`` failures of its own."""
        if self.trained and not self.unjudged:
            return "done"
        if self.record.get("failures", 0) >= TRIES:
            return "failed"
        return "resumable" if self.trained or (self.run / "checkpoints" / "last.ckpt").is_file() else "new"

    @property
    def failure(self) -> str:
        """Why it has not finished: the last telling line of its log."""
        log = self.folder / "log.txt"
        if self.state == "done" or not log.is_file():
            return "" if self.state == "done" else "not started"
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if re.search(r"\w*Error\b|^error:", line)]
        return (telling or lines or ["no output"])[-1][:300]

    @contextmanager
    def locked(self) -> Iterator[int | None]:
        """An open descriptor that keeps others away while it, or a copy that a child inherits, is open; None if one has it.

        So a member that outlived a killed runner is not started a second time.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield file.fileno()


def command(member: Member, place: Place, program: Program) -> list[str]:
    """What trains, or goes on training, a member, or judges it by the next suite.

    =========  ====================================  ===========================================  =========================
    state      what is in its folder                 command                                      after a failure
    =========  ====================================  ===========================================  =========================
    new        neither results nor ``last.ckpt``     ``train``, with the member's overrides       begins anew
    resumable  ``last.ckpt``                         ``train resume=``                            the run is deleted: *new*
    resumable  results, a suite without its card     ``evaluate`` by the first such suite         again by that suite
    failed     as above, after ``TRIES`` failures    none                                         –
    done       results, and the card of each suite   none                                         –
    =========  ====================================  ===========================================  =========================
    """
    if place.trained:
        suite = place.unjudged[0]
        folder = place.judged(suite).parent
        where = (f"checkpoint={place.run}", "trust=true", f"out={folder.parent}", f"name={folder.name}", "threads=1")
        return [*program("evaluate"), *where, *place.suites[suite]]
    if place.state == "resumable":
        return [*program("train"), f"resume={place.run}", "trust=true"]  # the study's own
    fixed = [f"{key}={as_override(value)}" for key, value in place.decided(member).items()]
    return [*program("train"), *member.overrides, *fixed, f"out={place.folder}", "name=run"]


def start(member: Member, place: Place, program: Program) -> subprocess.Popen[bytes] | None:
    """Start a member in a session of its own, so that Ctrl-C reaches the runner alone; None if it runs elsewhere already."""
    with place.locked() as lock:
        if lock is None:
            return None
        if place.state == "new" and place.run.exists():
            shutil.rmtree(place.run)  # killed before its first checkpoint: nothing to go on with
        place.write(
            hash=member.hash,
            method=member.method,
            setting=member.setting,
            seed=member.seed,
            overrides=list(member.overrides),
            starts=place.record.get("starts", 0) + 1,
        )
        line = command(member, place, program)
        with (place.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],
                start_new_session=True,
                env={"GOMP_SPINCOUNT": "3000", **os.environ, "OMP_NUM_THREADS": "1"},
            )
        place.write(pid=process.pid)
        return process


def finished(place: Place, code: int) -> bool:
    """Note how a member ended; whether it is done.  What a signal ended is no failure of its own."""
    done = place.state == "done"
    if not done and code > 0:
        place.write(failures=place.record.get("failures", 0) + 1)
        if place.state == "resumable" and not place.trained:  # its checkpoint may be broken: the second try starts anew
            shutil.rmtree(place.run)
    place.write(code=code)
    return done


def run_members(
    members: Sequence[Member],
    out: Path,
    program: Program,
    jobs: int,
    tell: Callable[[str], object] = print,
    poll: float = 0.5,
) -> int:
    """Train what is left, ``jobs`` at a time; what is done is skipped, what fails is noted and left for the next call.

    Returns:
        How many members ended.

    Raises:
        ValueError: a file in ``OUT/cards`` that is no card.
        KeyboardInterrupt: after the members that ran were ended; calling again goes on.
    """
    places = {member.name: place_of(member, out) for member in members}
    waiting = unfinished(members, out)
    skipped = len(members) - len(waiting)
    given_up = sum(places[m.name].state == "failed" for m in members)
    tell(f"{len(members)} members: {skipped - given_up} done, {given_up} failed {TRIES} times, {len(waiting)} to train")
    if given_up:
        tell("--again tries those that failed once more")
    running: list[tuple[Member, subprocess.Popen[bytes], float]] = []
    spent: dict[str, float] = {}  # seconds
    times: list[float] = []
    total = len(waiting)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                member = waiting.pop(0)
                place = places[member.name]
                begins = "judging " if place.trained else "resumed " if place.state == "resumable" else "started "
                process = start(member, places[member.name], program)
                if process is None:
                    tell(f"busy     {member.name}: another process trains it")
                    continue
                running.append((member, process, time.monotonic()))
                tell(f"{begins} {member.name}")
            for entry in [e for e in running if e[1].poll() is not None]:
                running.remove(entry)
                member, process, began = entry
                spent[member.name] = spent.get(member.name, 0.0) + time.monotonic() - began  # training and every suite
                place = places[member.name]
                done = finished(place, process.returncode)
                if (
                    not done
                    and process.returncode == 0
                    and place.trained
                    and process.args != command(member, place, program)
                ):
                    waiting.insert(0, member)  # what judges it comes next
                    continue
                _write(member, out)  # at once: what ended is kept, however this ends
                times.append(spent[member.name])
                still = len(waiting) + len(running)
                eta = still * sum(times) / len(times) / max(1, jobs)
                said = (
                    f"done     {member.name}"
                    if done
                    else f"FAILED   {member.name}: {place.failure} ({place.folder}/log.txt)"
                )
                tell(f"{said}  {times[-1]:.0f} s; {total - still} of {total}, about {math.ceil(eta / 60)} min left")
            if running:
                time.sleep(poll)
    except BaseException:
        _end([process for _, process, _ in running])
        raise
    return len(times)


def place_of(member: Member, out: Path) -> Place:
    return Place(out / "members" / member.name, member.suites)


def reset_failures(members: Sequence[Member], out: Path) -> None:
    """Let those that failed be tried again: it was the machine, or a path that no hash knows."""
    for member in members:
        if place_of(member, out).state == "failed":
            place_of(member, out).write(failures=0)


def unfinished(members: Sequence[Member], out: Path) -> list[Member]:
    """Those that are neither done, here or elsewhere, nor given up."""
    return [m for m in members if place_of(m, out).state in ("new", "resumable") and not _trained_elsewhere(m, out)]


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask every member to end, then make it; each is the leader of a group of its own."""
    for sign, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, sign)
        until = time.monotonic() + patience
        while time.monotonic() < until and any(process.poll() is None for process in processes):
            time.sleep(0.1)


def planned(member: Member) -> RunRecord:
    """The card of a member that has left nothing yet."""
    kept = {**settled(member.config), **_suites(member)}
    return RunRecord(
        member.name, member.method, member.setting, member.seed, member.hash, kept, {}, {}, {}, {}, {}, "not started"
    )


def _suites(member: Member) -> dict[str, Any]:
    """What judges it, as an entry of ``settled``."""
    return {"suites": {name: list(lines) for name, lines in member.suites.items()}} if member.suites else {}


def cards_of(members: Sequence[Member], out: Path) -> list[RunRecord]:
    """Cards of all members that were started, failures included, in ``OUT/cards``; others move to ``OUT/other_cards``."""
    cards = []
    for member in members:
        if carried := _trained_elsewhere(member, out):
            cards.append(carried)
        elif place_of(member, out).record:
            cards.append(_write(member, out))
    names = {member.name for member in members}
    for path in (out / "cards").glob("*.json"):
        if path.stem not in names:
            (out / "other_cards").mkdir(exist_ok=True)
            path.replace(out / "other_cards" / path.name)
    return cards


@lru_cache(maxsize=1)
def _archived(path: Path, _: int) -> dict[str, RunRecord]:
    """By name, as long as the file is the same."""
    return {record.name: record for record in read_archive(path)}


def _trained_elsewhere(member: Member, out: Path) -> RunRecord | None:
    """The card of a member that ended well, if it was brought here without its whole run.

    Raises:
        ValueError: a card that contradicts itself, or is that of another run.
    """
    if place_of(member, out).state == "done":
        return None
    path = out / "cards" / f"{member.name}.json"
    if path.is_file():
        card = read_record(path)
    elif (path := out / ARCHIVE).is_file():
        found = _archived(path, path.stat().st_mtime_ns).get(member.name)
        if found is None:
            return None
        card = found
    else:
        return None
    if (card.config, card.seed) != (member.hash, member.seed):
        raise ValueError(
            f"runs: {path} is the card of another run: expected config {member.hash} and seed {member.seed}, "
            f"found {card.config} and {card.seed}"
        )
    return None if card.failure or card.settled.get("suites", {}) != _suites(member).get("suites", {}) else card


def _write(member: Member, out: Path) -> RunRecord:
    card = _card(member, place_of(member, out))
    (out / "cards").mkdir(parents=True, exist_ok=True)
    write_record(card, out / "cards" / f"{member.name}.json")
    return card


def _card(member: Member, place: Place) -> RunRecord:
    if (place.run / "config.yaml").is_file() and (place.run / "run.json").is_file():
        card = record_of(place.run, member.method, member.setting, member.name, place.failure)
    else:
        card = planned(member)
        fixed = {key: value for key, value in place.decided(member).items() if key in card.settled}
        card = replace(card, settled={**card.settled, **fixed})
    about = {**card.about, "overrides": [o for o in member.overrides if portable_override(o)]}
    evaluations = dict(card.evaluations)
    for suite in [s for s in member.suites if SELECTED in evaluations and s not in place.unjudged]:
        row, result = evaluations[SELECTED], read_result_card(place.judged(suite))
        standing = np.array(result["examples"]["standing"], bool)
        evaluations[SELECTED] = replace(
            row, accuracy={**row.accuracy, suite: float(standing.mean())}, correct={**row.correct, suite: standing}
        )
        about.setdefault("verdicts", {})[suite] = result["sanity"]["verdict"]
    return replace(
        card,
        config=member.hash,
        settled={**card.settled, **_suites(member)},
        evaluations=evaluations,
        failure="" if place.state == "done" else place.failure,
        about=about,
    )
