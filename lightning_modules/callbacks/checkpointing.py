"""Checkpoints that survive a killed process, a full disk and a file that went bad: ``best``, ``last``, ``previous``.

Everything a step depends on is inside: weights and their average, running estimates, Free-AT's δ, optimiser and schedule,
sums of the epoch's metrics, the loader's position and generator states, all of which load with ``weights_only``.
"""

from __future__ import annotations

import io
import os
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn

from glassarmor.defenses.monitoring.readings import count_nonfinite
from glassarmor.defenses.options import require_whole
from glassarmor.interpret.storage import write_atomic
from glassarmor.lightning_modules.randomness import generator_states, set_generator_states
from glassarmor.lightning_modules.run.folder import load_checkpoint
from glassarmor.lightning_modules.run.processes import Poll, leave_sums_to_leader, summed, together
from glassarmor.lightning_modules.selection import OLD, Choice, Select

HEALTHY: Final = "healthy.ckpt"
COST = 0.01  # share of the training time that checkpoints inside an epoch may take


class DurableIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all; where the disk is full the run goes on, and is told once."""

    def __init__(self) -> None:
        self.failed = False  # the latest write
        self._told = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        buffer = io.BytesIO()  # in memory first: torch's writer does not survive a full disk
        torch.save(checkpoint, buffer)
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(Path(path), buffer.getbuffer())
            self.failed = False
        except OSError as error:
            self.failed = True
            if not self._told:
                warnings.warn(
                    f"could not write {path} ({error.strerror}); training goes on and tries again next time", stacklevel=2
                )
            self._told = True


def _finite(states: list[dict[str, Any]]) -> bool:
    """Are the network's weights and statistics?  Sums of the epoch's losses need not be."""
    held = [value for state in states for key, value in state.items() if not key.startswith("train_")]
    return all(bool(value.isfinite().all()) for value in held if isinstance(value, torch.Tensor))


def _choice(state: dict[str, Any]) -> Choice | None:
    """What a checkpoint says of the best epoch; one from before there was a choice knows its robust accuracy alone."""
    if "choice" in state:
        return None if state["choice"] is None else Choice(**state["choice"])
    score = state["best_score"]
    return None if score is None else Choice(-1, score, score, float("nan"), -1, score, 0, "robust", None)


def how_chosen(path: Path) -> str:
    """What chose the epoch of a ``best.ckpt``, for people.

    Raises:
        Exception: of any kind, for a file that can't be read.
    """
    state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    held = [value for name, value in state.get("callbacks", {}).items() if name.startswith(Checkpoints.__qualname__)]
    choice = _choice(held[0]) if held else None
    return "the epoch with the best held-out robust accuracy" if choice is None or choice.epoch < 0 else choice.text()


class Checkpoints(Checkpoint):
    """``last.ckpt`` every few steps and at the end of each epoch, the one before as ``previous.ckpt``, and ``best.ckpt``.

    A run resumes from ``last.ckpt`` exactly, also inside an epoch.  It is written at the end of an epoch, when validation
    and dashboards are done, one step before that end, so that a stop in validation costs a step, and every n steps.  With
    accumulated gradients, only where the optimiser has stepped.

    Args:
        folder: where the files go.
        every_n_steps: n; None: as often as it takes no more than ``COST`` of the time.
        select: which epoch ``best.ckpt`` holds; one whose weights or logits are not finite, or that guesses, is none.

    Raises:
        ValueError: ``every_n_steps`` is no whole number >= 1.
    """

    def __init__(self, folder: Path, every_n_steps: int | None = None, select: Select = OLD) -> None:
        require_whole("checkpoint_every", every_n_steps, 1, null=True)
        self.best, self.last, self.previous = (folder / f"{name}.ckpt" for name in ("best", "last", "previous"))
        self.healthy = folder / HEALTHY  # written by the health monitor
        self.every_n_steps, self.select = every_n_steps, select
        self.choice: Choice | None = None  # what best.ckpt holds
        self._validated = False  # in this epoch
        self.saved_step: int | None = None  # the optimiser step that last.ckpt holds
        self._files = DurableIO()
        self._generators: dict[str, Any] | None = None
        self.resumable = False  # the batch that just ended is a place to go on from
        self._whole = False  # last.ckpt is readable, so worth keeping as the one before
        self._stale = False  # a later one could not be written
        self._stepped = 0
        self._poll = Poll()
        self._saved_at, self._took = 0.0, 0.1  # seconds; a guess until the first one was written

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        trainer.strategy.checkpoint_io = self._files  # of every checkpoint of this trainer
        # The leader's, on every process.
        paths = self.best, self.last, self.previous, self.healthy
        self.best, self.last, self.previous, self.healthy = trainer.strategy.broadcast(paths)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._whole = Path(trainer.ckpt_path).resolve() == self.last.resolve()
        self.saved_step = checkpoint["global_step"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._stepped, self._saved_at = int(trainer.global_step), time.monotonic()
        if self._generators is not None:
            set_generator_states(self._generators)
            leave_sums_to_leader(pl_module)
            self._generators = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Not at the end of an epoch, where validation comes next, nor between steps of the optimiser.
        self.resumable = not trainer.is_last_batch and int(trainer.global_step) != self._stepped
        self._stepped = int(trainer.global_step)
        if self.resumable and self._due(trainer, batch_idx):
            self.save_last(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        # What is not finite answers one class for all, which may well be right more often than a net that is attacked.
        if self._validated and not count_nonfinite(pl_module.net)[0] and not pl_module.broken_logits.compute():
            before, held_out = self.choice, pl_module.held_out.compute()
            epoch, processes = int(trainer.current_epoch), int(trainer.world_size)
            self.choice = self.select.next(
                before, epoch, held_out, pl_module.num_classes, processes
            )  # belongs into the file
            if self.choice is not before and not self.written(trainer, self.best):
                self.choice = before  # a later epoch is compared with the file that is there
        self._validated = False
        self.save_last(trainer)

    @property
    def best_score(self) -> float | None:
        """Held-out robust accuracy of the best epoch, whatever chose it: what runs of a sweep have in common."""
        return None if self.choice is None else self.choice.robust

    def _due(self, trainer: Any, batch_idx: int) -> bool:
        if batch_idx + 2 == trainer.num_training_batches:
            return True
        if self.every_n_steps is not None:
            return int(trainer.global_step) % self.every_n_steps == 0
        due = time.monotonic() - self._saved_at > self._took / COST
        return self._poll.any(due and trainer.is_global_zero)

    def save_last(self, trainer: Any) -> None:
        """Write ``last.ckpt``; the one before becomes ``previous.ckpt``."""
        began = time.monotonic()
        fresh = self.last.with_name("next.ckpt")
        if self.written(trainer, fresh):
            if trainer.is_global_zero:
                if self._whole:
                    os.replace(self.last, self.previous)
                os.replace(fresh, self.last)
            self._whole, self._stale, self.saved_step = True, False, int(trainer.global_step)
        else:
            self._stale = True
        self._saved_at = time.monotonic()
        self._took = self._saved_at - began

    def written(self, trainer: Any, path: Path) -> bool:
        """Save a checkpoint; whether it is on the disk.  To be called on every process."""
        with summed(trainer.lightning_module):
            trainer.save_checkpoint(path)
        return bool(trainer.strategy.broadcast(not self._files.failed))

    def holding(self, step: int) -> str:
        """Which checkpoint there is to go on from, or to look into, in words: the newest that holds finite weights.

        Args:
            step: at which the run diverged; a checkpoint of an earlier one is preferred to one of the same.
        """
        found: list[tuple[int, Path]] = []
        written = [path for path in (self.last, self.previous, self.healthy, self.best) if path.is_file()]
        for path in written:
            with suppress(Exception):  # what can't be read is nothing to go on from
                held = load_checkpoint(path)
                if _finite([held["state_dict"], held.get("current_model_state", {})]):
                    found.append((int(held["global_step"]), path))
        if not found:
            return "no checkpoint holds finite weights" if written else "no checkpoint was written"
        at, path = max(found, key=lambda pair: (pair[0] < step, pair[0]))
        if at >= step:
            return f"no earlier step was saved; {path} holds step {at}, whose weights are finite"
        return f"{path} holds {f'an earlier step, {at}' if at else 'the start'}"

    @property
    def lost(self) -> dict[str, str]:
        """What could not be written, as :class:`.RunLog` has it."""
        return {f"write {self.last.name}": "the disk took no checkpoint"} if self._stale or not self._whole else {}

    def state_dict(self) -> dict[str, Any]:
        return {"choice": None if self.choice is None else self.choice.state(), "generators": generator_states()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.choice, self._generators = _choice(state_dict), state_dict["generators"]

    def final_states(self, module: nn.Module) -> dict[str, dict[str, Any]]:
        """Weights after training: "best epoch", left out if no disk took it, and "last epoch".

        From their files, the last one from memory where its file could not be written.
        """
        together()  # what the leader did last is on the disk
        kept = self._whole and not self._stale
        files = {"best epoch": self.best, **({"last epoch": self.last} if kept else {})}
        found = {
            name: torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
            for name, path in files.items()
            if path.is_file()
        }
        if not kept:
            found["last epoch"] = {key: value.clone() for key, value in module.state_dict().items()}
        return found
