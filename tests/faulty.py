"""Training runs in processes of their own, with faults planted in them; and what must be the same in two run folders."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import nn

from glassarmor.interpret import storage
from glassarmor.interpret.views.page import page
from glassarmor.lightning_modules import selection
from glassarmor.lightning_modules.classifier import RobustClassifier
from glassarmor.lightning_modules.commands import train
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


Plan = Mapping[tuple[str, int], Callable[[], object]]


def raise_signal(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


DIE = partial(raise_signal, signal.SIGKILL)


def carry_out(plan: Plan) -> None:
    """Do something when this process comes to a place for the n-th time: (place, n) → what.

    Places: "step" and "validation", within one; "write", half of a checkpoint is on disk (a place to die only); "rename",
    the checkpoint before was put aside and the new one is not yet in its place; "log", an epoch's metrics are written, its
    pictures and its checkpoint are not.
    """
    seen: Counter[str] = Counter()

    def come_to(place: str) -> None:
        seen[place] += 1
        plan.get((place, seen[place]), int)()

    def before(place: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            come_to(place)
            return original(*args, **kwargs)

        return call

    def written(number: int) -> None:
        if os.readlink(f"/proc/self/fd/{number}").endswith(".ckpt.part"):
            if ("write", seen["write"] + 1) in plan:
                os.ftruncate(number, os.fstat(number).st_size // 2)
            come_to("write")
        fsync(number)

    def renamed(source: Path, target: Path) -> None:
        if Path(target).name == "last.ckpt":
            come_to("rename")
        replace(source, target)

    fsync, replace = os.fsync, os.replace
    storage.os.fsync, storage.os.replace = written, renamed  # type: ignore[attr-defined]
    RobustClassifier.training_step = before("step", RobustClassifier.training_step)  # type: ignore[method-assign]
    RobustClassifier.validation_step = before("validation", RobustClassifier.validation_step)  # type: ignore[method-assign]
    page.ReportPage.write_epoch = before("log", page.ReportPage.write_epoch)  # type: ignore[method-assign]


def _speak_into(output: Path) -> None:
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _job(output: Path | None, arguments: tuple[str, ...], plan: Plan) -> None:
    if output is not None:
        _speak_into(output)
    for key in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DATA_DIR"):
        os.environ.pop(key, None)
    os.environ["NETRC"] = os.devnull
    torch.set_num_threads(1)
    carry_out(plan)
    sys.argv = ["train.py", *arguments]
    selection.knows_nothing = lambda *_: False  # a dozen steps teach next to nothing
    train.main()


def start(output: Path, *arguments: str, plan: Plan | None = None) -> BaseProcess:
    """``python train.py arguments`` in a process; what it says goes to the end of the file ``output``."""
    process = _processes.Process(target=_job, args=(output, arguments, plan or {}))
    process.start()
    return process


def run(output: Path, *arguments: str, plan: Plan | None = None) -> int:
    """The same, to its end: the exit code, or minus the signal that ended it."""
    process = start(output, *arguments, plan=plan)
    process.join(300)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"still running after five minutes: {output.read_text()}")
    return process.exitcode


def _member(rank: int, port: int, output: Path, call: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """One of two processes, told what torchrun tells them."""
    rank_zero_only.rank = rank  # read from the environment when Lightning was imported, in the server
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "TORCHELASTIC_RUN_ID": "test"}
    _speak_into(output)
    torch.set_num_threads(1)
    call(rank, *arguments)


def start_two(outputs: Path, call: Callable[..., object], *arguments: Any) -> list[BaseProcess]:
    """``call(rank, *arguments)`` in two processes that can find each other; each speaks into a file of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs.mkdir(exist_ok=True)
    both = [_processes.Process(target=_member, args=(rank, port, outputs / f"{rank}", call, arguments)) for rank in range(2)]
    for process in both:
        process.start()
    return both


def wait_for(both: list[BaseProcess], outputs: Path, seconds: float = 300) -> list[int | None]:
    """The exit codes, or minus the signals that ended them; fails where one hangs."""
    for process in both:
        process.join(seconds)
    codes = [process.exitcode for process in both]
    for process in both:
        process.kill()
    said = [(outputs / f"{rank}").read_text() for rank in range(2)]
    assert None not in codes, f"still running: {codes}, {said}"
    return codes


def train_here(rank: int, arguments: tuple[str, ...], plans: tuple[Plan, Plan]) -> None:
    """``python train.py arguments`` in this one of two processes."""
    _job(None, arguments, plans[rank])


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit: weights, averages, optimiser and schedule of the last epoch and of the best."""
    for name in ("last", "best"):
        states = [torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for run in (one, other)]
        assert states[0].keys() == states[1].keys()
        for key in states[0].keys() - {"loops", "callbacks"}:  # where what was tried but not completed is counted
            assert _bits(states[0][key]) == _bits(states[1][key]), (name, key)


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: also every metric of every epoch, every number of every picture, and the final table."""
    assert_same_weights(one, other)
    for name in ("metrics.csv", "results.json"):
        assert (one / name).read_text() == (other / name).read_text(), name
    pictures = [sorted((run / "report" / "data").glob("epoch_*.js")) for run in (one, other)]
    assert [path.name for path in pictures[0]] == [path.name for path in pictures[1]]
    for path, twin in zip(*pictures, strict=True):
        assert path.read_text() == twin.read_text(), path.name


def _bits(value: Any) -> Any:
    """Nested containers with tensors as bytes: NaN equals itself, 0 and −0 differ."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes())
    if isinstance(value, dict):
        return {key: _bits(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_bits(entry) for entry in value]
    return value
