"""A run that is asked to end: signals finish the step, save, and end it; exit code 75, after Ctrl-C 130."""

from __future__ import annotations

import shlex
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from glassarmor.interpret.storage import write_atomic
from glassarmor.lightning_modules.callbacks.checkpointing import Checkpoints
from glassarmor.lightning_modules.run.console import console
from glassarmor.lightning_modules.run.doors import spelled
from glassarmor.lightning_modules.run.processes import Poll, is_leader

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, worth starting again
STOPPED = "stopped"
INTERRUPTED = 130  # what a shell makes of a command that Ctrl-C ended
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Preempted(SystemExit):
    """The run was asked to end.  A SystemExit, so that a sweep ends with it.

    Of several processes the leader tells: what launched them would kill a leader that still writes, where another failed.
    """

    def __init__(self, code: int = EXIT_CODE) -> None:
        super().__init__(code if is_leader() else 0)


class Preemption(Checkpoint):
    """While a run trains, a signal waits for the end of the step; ``last.ckpt`` is written, then :class:`Preempted` raised.

    In validation it raises after the batch, with the step before the last one saved.  Wherever no step is under way it
    raises at once.  Of several processes it is enough that one is told: all end together, one step later.  Use it as a
    context around all of a run, and as a callback of the training.  A ``Checkpoint`` to Lightning, so that it comes after
    every callback whose state is to be saved.  A second Ctrl-C does not wait for the step.

    Lightning's own handlers are replaced: on SIGTERM it ends a run unsaved, with exit code 0, and of several processes
    one would talk to the others from inside the handler, in the middle of whatever they are at; its SLURM handler saves in
    the middle of a step and starts the same command again, which would be another run.

    Args:
        checkpoints: the run's; listed before this callback.
        folder: the run folder, named in the message.  A file ``stopped`` lies in it from when the run was ended so until
            it goes on: what launches several processes may tell another exit code than the leader's.
    """

    def __init__(self, checkpoints: Checkpoints, folder: Path) -> None:
        self.checkpoints, self.folder = checkpoints, folder
        self.received: signal.Signals | None = None
        self._training = False
        self._poll = Poll()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        (self.folder / STOPPED).unlink(missing_ok=True)
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        again = number == signal.SIGINT and self.received == signal.SIGINT
        self.received = signal.Signals(number)
        if again or not self._training:
            raise self._ended()

    def _ended(self) -> Preempted:
        self._training = False
        step = self.checkpoints.saved_step
        held = "no step was saved" if step is None else f"last.ckpt holds step {step}"
        name = "another process's signal" if self.received is None else self.received.name
        code = INTERRUPTED if self.received == signal.SIGINT else EXIT_CODE
        go_on = shlex.join([*spelled("train"), f"resume={self.folder}"])
        console.print(f"\n{name}: {held}; go on with  {go_on}  (exit code {code})")
        with suppress(OSError):  # a full disk must not keep it from ending
            write_atomic(self.folder / STOPPED, f"{name}: {held}\n")
        return Preempted(code)

    def _asked(self) -> bool:
        """On every process, if on one."""
        return self._poll.any(self.received is not None)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._training = True
        for number in SIGNALS:  # Lightning, which puts back ours in the end
            signal.signal(number, self._receive)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._training = False

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._training = False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.checkpoints.resumable and self._asked():
            if self.checkpoints.saved_step != trainer.global_step:
                self.checkpoints.save_last(trainer)
            raise self._ended()

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if self._asked():
            raise self._ended()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._asked():
            raise self._ended()


class Unkept(pl.Callback):
    """For a training beside the run's, of which no checkpoint is kept: a signal ends it, and the run, after its step."""

    def __init__(self, preemption: Preemption) -> None:
        self.preemption = preemption

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.preemption.on_train_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.preemption.on_validation_batch_end(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.preemption.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.preemption.on_exception(trainer, pl_module, exception)
