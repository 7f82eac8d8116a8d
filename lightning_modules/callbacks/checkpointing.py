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

from defenses.health import count_nonfinite
from interpret.views.page import write_atomic
from lightning_modules.processes import Poll, leave_sums_to_leader, summed, together
from lightning_modules.randomness import generator_states, set_generator_states
from lightning_modules.run_folder import load_checkpoint

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


class Checkpoints(Checkpoint):
    """``last.ckpt`` every few steps and at the end of each epoch, the one before as ``previous.ckpt``, and ``best.ckpt``.

    A run resumes from ``last.ckpt`` exactly, also inside an epoch.  It is written at the end of an epoch, when validation
    and dashboards are done, one step before that end, so that a stop in validation costs a step, and every n steps.  With
    accumulated gradients, only where the optimiser has stepped.

    Args:
        folder: where the files go.
        every_n_steps: n; None: as often as it takes no more than ``COST`` of the time.
        monitor: the metric, higher is better, whose best epoch ``best.ckpt`` holds; weights or logits that are not
            finite are none.

    Raises:
        ValueError: ``every_n_steps`` is no whole number >= 1.
    """

    def __init__(self, folder: Path, every_n_steps: int | None = None, monitor: str = "val/robust_acc") -> None:
        if every_n_steps is not None and (not isinstance(every_n_steps, int) or every_n_steps < 1):
            raise ValueError(f"checkpoint_every: expected null or a whole number >= 1, found {every_n_steps!r}")
        self.best, self.last, self.previous = (folder / f"{name}.ckpt" for name in ("best", "last", "previous"))
        self.healthy = folder / HEALTHY  # written by the health monitor
        self.every_n_steps, self.monitor = every_n_steps, monitor
        self.best_score: float | None = None
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

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        score, before = trainer.callback_metrics.get(self.monitor), self.best_score
        # What is not finite answers one class for all, which may well be right more often than a net that is attacked.
        better = score is not None and (before is None or float(score) > before)
        if better and not count_nonfinite(pl_module.net)[0] and not pl_module.broken_logits.compute():
            assert score is not None
            self.best_score = float(score)  # belongs into the file
            if not self.written(trainer, self.best):
                self.best_score = before  # a later epoch is compared with the file that is there
        self.save_last(trainer)

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
        """What could not be written, as :class:`lightning_modules.logging.RunLog` has it."""
        return {f"write {self.last.name}": "the disk took no checkpoint"} if self._stale or not self._whole else {}

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "generators": generator_states()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score, self._generators = state_dict["best_score"], state_dict["generators"]

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
