"""The run folder: what was run, with which versions, and where its files are."""

from __future__ import annotations

import atexit
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from glassarmor.interpret.storage import (
    check_links,
    check_name,
    file_name,
    read_lines,
    read_numbers,
    read_object,
    write_atomic,
)
from glassarmor.interpret.views.page.page import read_manifest

_PACKAGES = (
    *("torch", "torchvision", "pytorch-lightning", "torchmetrics", "captum", "wandb", "hydra-core", "numpy"),
    "pyautoattack",
)


@dataclass(frozen=True)
class ResumePoint:
    """Where a resumed run goes on: ``path`` None is the beginning."""

    path: Path | None
    epoch: int  # the first that is trained, or trained further
    step: int  # optimiser steps done
    unreadable: tuple[str, ...]  # newer checkpoints, and why they can't be used

    def __str__(self) -> str:
        here = "no checkpoint yet" if self.path is None else self.path.name
        return "; ".join([*self.unreadable, f"goes on from {here}, epoch {self.epoch}, step {self.step}"])


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run.

    ``config.yaml``, ``run.json`` (versions, commit, W&B id), ``metrics.csv``, ``results.json``, ``checkpoints/``,
    ``report/``, ``wandb/``.
    """

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        return self.checkpoints / "best.ckpt"

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.ckpt"

    @property
    def previous(self) -> Path:
        return self.checkpoints / "previous.ckpt"

    @property
    def judged(self) -> Path:
        """What stands for the run where no checkpoint is named: the best epoch, or the last where none was better than
        guessing.
        """
        return self.last if self.last.is_file() and not self.best.is_file() else self.best

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def info(self) -> dict[str, Any]:
        """What ``run.json`` says."""
        return read_object(self.path / "run.json", "resume")

    def files(self) -> dict[str, Path]:
        """Where its results are, of those that are there."""
        named = {
            "dashboard": self.report / "index.html",
            "metrics": self.path / "metrics.csv",
            "best epoch": self.best,
            "last epoch": self.last,
        }
        return {what: path for what, path in named.items() if path.is_file()}

    def note(self, **info: Any) -> None:
        """Write these entries of ``run.json`` anew, e.g. where a resumed run has another number of processes."""
        if (record := self.info) != record | info:
            write_atomic(self.path / "run.json", json.dumps(record | info, indent=2) + "\n")

    def hold(self) -> TextIO:
        """Keeps other processes from training in this folder until what is returned is closed, or this process ends.

        Raises:
            ValueError: another process does.
        """
        file = (self.path / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: a forked loader does not inherit it
        except OSError:
            with file:
                file.seek(0)
                owner = file.read(20).strip() or "unknown"
            raise ValueError(
                f"resume: another process (number {owner}) trains in {self.path}; expected a run that has ended"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        return file

    def check(self) -> None:
        """Whether everything that a resumed run reads of it can be read, before anything is trained.

        Raises:
            ValueError: names the file.
        """
        check_links(self.path, "resume")
        _require_texts(self.path / "run.json", self.info, ("what", "wandb_id", "commit", "started"))
        for name, read in (("cost.json", read_object), ("health.jsonl", read_lines), ("metrics.csv", read_numbers)):
            if (self.path / name).exists():
                read(self.path / name, "resume")
        if (manifest := self.report / "data" / "manifest.js").exists():
            read_manifest(manifest)

    def resume_point(self, module: nn.Module) -> ResumePoint:
        """The newest checkpoint that can be read: the last one, else the one before, else the best epoch's.

        Args:
            module: what is trained; a checkpoint of another network is none to go on from.

        Raises:
            ValueError: there are checkpoints, and none of them can be read.
        """
        unreadable: list[str] = []
        for path in (self.last, self.previous, self.best):
            if not path.is_file():
                continue
            try:
                state = load_checkpoint(path)
                _require_state(state, module)
                progress = state["loops"]["fit_loop"]["epoch_progress"]["current"]
                epoch, step = int(progress["processed"]), int(state["global_step"])
                self._require_place(epoch, step)
                return ResumePoint(path, epoch, step, tuple(unreadable))
            except Exception as error:
                unreadable.append(unreadable_because(path, error))
        if unreadable:
            raise ValueError(f"resume: {'; '.join(unreadable)}; nothing to go on from, start anew")
        return ResumePoint(None, 0, 0, ())

    def _require_place(self, epoch: int, step: int) -> None:
        """Raises ValueError where ``metrics.csv`` ended epochs at steps that a checkpoint at this place contradicts."""
        path = self.path / "metrics.csv"
        for row in read_numbers(path) if path.is_file() else []:
            if (row["epoch"] < epoch) != (row["step"] <= step) and row["step"] != step:
                raise ValueError(
                    f"it says step {step} in epoch {epoch}, but epoch {row['epoch']:.0f} ended at step {row['step']:.0f}"
                )

    @classmethod
    def create(cls, out: str | Path, name: str | None, what: str, config: str, **info: Any) -> RunFolder:
        """Make a new folder and write what is known at the start.

        Args:
            out: where run folders go.
            name: of the folder; by default date, time and ``what``.
            config: the composed configuration as YAML.
            info: further entries of ``run.json``.

        Raises:
            ValueError: a folder of this name exists (nothing is ever overwritten), or the name is a path.
        """
        if name is not None:
            check_name(name, out)
        stem = name or f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{file_name(what)}"
        path = Path(out) / stem
        for i in range(2, 1000):
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                if name is not None:
                    raise ValueError(
                        f"name: the run folder {path} exists; choose another name, or go on with it: resume={path}"
                    ) from None
                path = Path(out) / f"{stem}-{i}"
        folder = cls(path)
        write_atomic(folder.config, config)
        record = {
            "what": what,
            "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "wandb_id": _given_id() or hashlib.sha256(f"{path.resolve()}{os.urandom(8).hex()}".encode()).hexdigest()[:10],
            "commit": commit(),
            "versions": versions(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
            **info,
        }
        write_atomic(path / "run.json", json.dumps(record, indent=2) + "\n")
        return folder

    @classmethod
    def scratch(cls, what: str) -> RunFolder:
        """A folder for a process that is not the leader; it is gone when the process ends."""
        path = tempfile.mkdtemp(prefix="glassarmor-")
        atexit.register(shutil.rmtree, path, ignore_errors=True)
        return cls.create(path, None, what, "")

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """A folder to go on with.

        Raises:
            ValueError: no run folder.
        """
        folder = cls(Path(path))
        if not folder.config.is_file() or not (folder.path / "run.json").is_file():
            raise ValueError(f"resume: expected a run folder with config.yaml and run.json, found none at {path}")
        folder.check()
        return folder


def _require_texts(path: Path, record: Mapping[str, Any], names: Sequence[str]) -> None:
    missing = [name for name in names if not isinstance(record.get(name), str)]
    if missing:
        raise ValueError(f"resume: {path} holds no {' and no '.join(missing)}; it may be damaged")


def _require_state(state: Mapping[str, Any], module: nn.Module) -> None:
    """Raises ValueError for a checkpoint without optimiser, or of another network."""
    missing = [key for key in ("state_dict", "optimizer_states", "loops") if not state.get(key)]
    if missing:
        raise ValueError(f"it holds no {' and no '.join(missing)}")
    held, own = state["state_dict"], module.state_dict()
    for name in (name for name in {**own, **held} if name.startswith("net.")):
        shapes = [tuple(each[name].shape) if name in each else "none" for each in (held, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"it is of another network: {name} {shapes[0]} where this one has {shapes[1]}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """All of a checkpoint, on the CPU.

    Raises:
        Exception: of any kind, for a file that is missing, cut short or damaged.
    """
    with zipfile.ZipFile(path) as parts:
        if (bad := parts.testzip()) is not None:  # torch compares no checksums when it loads
            raise ValueError(f"wrong checksum of {bad}")
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return state


def unreadable_because(path: Path, error: Exception) -> str:
    """What is wrong with a checkpoint that :func:`load_checkpoint` refused."""
    return f"{path} is no readable checkpoint ({' '.join(str(error).split()) or type(error).__name__})"


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run computes."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def commit() -> str:
    """Commit of the source tree, marked when files other than documents differ; "unknown" outside a repository."""
    root = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/", ":!/docs")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _given_id() -> str | None:
    """The W&B id that a sweep's agent gave this run; W&B takes no other there."""
    return os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
