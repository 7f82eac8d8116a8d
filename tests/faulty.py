"""Training runs in processes of their own, with faults planted in them; and what must be the same in two run folders."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import train
from interpret.views import page
from lightning_modules.classifier import RobustClassifier
from lightning_modules.logging import RunLog
from tests.composing import SMALL

# A server that has imported everything once, and from which each run is forked: a process of its own in 20 ms.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.faulty"])

QUICK = (
    *SMALL,
    "defense=pgd_at",
    "defense.attack.steps=1",
    "val_attack.steps=2",
    "probe.attack.steps=2",
    "probe.size=4",
    "test_attacks.PGD-20.steps=2",
    "trainer.max_epochs=3",  # of 4 steps
    "threads=1",
    "regularizers=[]",
    "panels=[]",
    "wandb.mode=disabled",
    "compare_undefended=false",
    "checkpoint_every=1",
)


class Restless(nn.Module):
    """Draws from Python's, numpy's and torch's generators while it trains; dropout besides."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * 8 * 8, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.body(x)
        if self.training:
            features = features * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand())) + 0.1 * torch.rand(1)  # noqa: NPY002
        return self.head(features)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill(where: str, count: int) -> None:
    """Plant a ``kill -9`` of this very process: the ``count``-th time it comes to ``where``."""
    left = count

    def counted(original: Callable[..., Any], when: Callable[..., bool], act: Callable[..., None]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if when(*args):
                left -= 1
                if left == 0:
                    act(*args)
                    die()
            return original(*args, **kwargs)

        return call

    def always(*_: Any) -> bool:
        return True

    def nothing(*_: Any) -> None:
        pass

    def named(name: str) -> Callable[..., bool]:
        return lambda *paths: Path(paths[-1]).name == name

    def is_checkpoint(number: int) -> bool:
        return os.readlink(f"/proc/self/fd/{number}").endswith(".ckpt.part")

    def halve(number: int) -> None:
        os.ftruncate(number, os.fstat(number).st_size // 2)

    if where == "step":  # in the middle of a step, after its forward passes
        RobustClassifier.training_step = counted(RobustClassifier.training_step, always, nothing)
    elif where == "validation":
        RobustClassifier.validation_step = counted(RobustClassifier.validation_step, always, nothing)
    elif where == "write":  # half of a checkpoint is on disk
        page.os.fsync = counted(os.fsync, is_checkpoint, halve)
    elif where == "rename":  # the checkpoint before has been put aside, the new one not yet in its place
        page.os.replace = counted(os.replace, named("last.ckpt"), nothing)
    elif where == "log":  # the epoch's metrics are written, its checkpoint is not
        RunLog._log_to_wandb = RunLog._log_to_wandb
        page.ReportPage.write_epoch = counted(page.ReportPage.write_epoch, always, nothing)
    else:
        raise ValueError(where)


def _job(output: Path, arguments: tuple[str, ...], plant: Callable[..., None] | None, details: tuple[Any, ...]) -> None:
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for key in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DATA_DIR"):
        os.environ.pop(key, None)
    os.environ["NETRC"] = os.devnull
    torch.set_num_threads(1)
    if plant is not None:
        plant(*details)
    sys.argv = ["train.py", *arguments]
    train.main()


def start(
    output: Path, *arguments: str, plant: Callable[..., None] | None = None, details: tuple[Any, ...] = ()
) -> BaseProcess:
    """``python train.py arguments`` in a process; what it says goes to the end of the file ``output``."""
    process = _processes.Process(target=_job, args=(output, arguments, plant, details))
    process.start()
    return process


def run(output: Path, *arguments: str, plant: Callable[..., None] | None = None, details: tuple[Any, ...] = ()) -> int:
    """The same, to its end: the exit code, or minus the signal that ended it."""
    process = start(output, *arguments, plant=plant, details=details)
    process.join(300)
    assert process.exitcode is not None, "still running after five minutes"
    return process.exitcode


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: weights, averages, optimiser, schedule; every metric of every epoch; every number of every picture."""
    for name in ("last", "best"):
        states = [torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for run in (one, other)]
        for key in states[0].keys() & {"state_dict", "current_model_state", "averaging_state", "optimizer_states", "epoch"}:
            assert _bits(states[0][key]) == _bits(states[1][key]), (name, key)
        schedules = [{k: v for k, v in state["lr_schedulers"][0].items()} for state in states]
        assert schedules[0] == schedules[1], name
    assert (one / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
    assert json.loads((one / "results.json").read_text()) == json.loads((other / "results.json").read_text())
    epochs = sorted(path.name for path in (one / "report" / "data").glob("epoch_*.js"))
    assert epochs == sorted(path.name for path in (other / "report" / "data").glob("epoch_*.js"))
    for name in epochs:
        assert (one / "report" / "data" / name).read_text() == (other / "report" / "data" / name).read_text(), name


def _bits(value: Any) -> Any:
    """Nested containers with tensors as bytes: NaN equals itself, 0 and −0 differ."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes())
    if isinstance(value, dict):
        return {key: _bits(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_bits(entry) for entry in value]
    return value
