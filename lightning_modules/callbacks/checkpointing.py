"""Checkpoints: the best epoch by held-out robust accuracy, and the last one, which a run resumes from."""

from __future__ import annotations

from pathlib import Path

from pytorch_lightning.callbacks import ModelCheckpoint


def checkpoints(folder: Path, monitor: str = "val/robust_acc") -> list[ModelCheckpoint]:
    """``best.ckpt`` and ``last.ckpt``, both written when an epoch is complete, validation included.

    Lightning writes to a temporary file first, so that an interruption leaves the checkpoint before.
    """
    best = ModelCheckpoint(
        dirpath=folder,
        filename="best",
        monitor=monitor,
        mode="max",
        save_top_k=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    last = ModelCheckpoint(
        dirpath=folder, filename="last", save_top_k=1, save_on_train_epoch_end=True, enable_version_counter=False
    )
    return [best, last]
