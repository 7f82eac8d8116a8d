"""What training costs: seconds an epoch, and passes over the batch a step, kept in ``cost.json`` of the run folder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from glassarmor.interpret.storage import read_object, write_atomic
from glassarmor.lightning_modules.run.log import survive


class Cost(pl.Callback):
    """Measures training alone: neither validation nor dashboards.

    ``cost.json``: ``seconds`` and ``cpu_seconds`` (of this process, all threads) by epoch, ``passes`` over the batch in an
    epoch's first step, those of the attack included, and ``steps``, both of the last epoch.  A resumed run goes on with it.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "cost.json"
        self._samples = 0
        self._hook: Any = None
        self._passes = 0.0
        self._start = (0.0, 0.0)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._start = (time.perf_counter(), time.process_time())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._samples = 0
            self._hook = pl_module.net.register_forward_pre_hook(self._count)

    def _count(self, net: Any, images: Any) -> None:
        self._samples += len(images[0])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            self._passes = self._samples / len(batch[0])
        if trainer.is_last_batch and trainer.is_global_zero:
            self._write(trainer.current_epoch, batch_idx + 1)

    def _write(self, epoch: int, steps: int) -> None:
        wall, cpu = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        before = read_object(self.path) if self.path.is_file() else {}
        record = {
            name: [*before.get(name, [])[:epoch], round(value, 3)]
            for name, value in (("seconds", wall), ("cpu_seconds", cpu))
        }
        text = json.dumps({**record, "passes": self._passes, "steps": steps}) + "\n"
        survive("write cost.json", lambda: write_atomic(self.path, text))
