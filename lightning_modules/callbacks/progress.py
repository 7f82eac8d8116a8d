"""The progress bar: one line an epoch, with the accuracies that matter."""

from __future__ import annotations

import sys
from typing import Any

from pytorch_lightning.callbacks import TQDMProgressBar

_SHOWN = {
    "train/clean_acc": "train_clean",
    "train/robust_acc": "train_robust",
    "val/clean_acc": "clean",
    "val/robust_acc": "robust",
}


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with accuracies in percent; the line of each epoch stays on the screen.

    Where the output is no terminal, it is drawn every 25 steps.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 25, leave=True)

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        shown: dict[str, int | str | float | dict[str, float]] = {}
        for key, name in _SHOWN.items():
            value = metrics.get(key)
            if isinstance(value, float):
                shown[name] = f"{100 * value:.1f}%"
        return shown
