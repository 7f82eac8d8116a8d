"""Which of several processes speaks: one leader makes the run folder, draws, logs and judges."""

from __future__ import annotations

import os
from typing import Any

from pytorch_lightning.utilities.rank_zero import rank_zero_only


def is_leader() -> bool:
    """Whether this is the process of global rank 0, known before a Trainer exists.

    Lightning's own launcher, torchrun and SLURM tell a process its rank through the environment; where Lightning launches
    on several nodes, the first process of a further node knows only its ``NODE_RANK``.
    """
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    return rank == 0 and ("RANK" in os.environ or int(os.environ.get("NODE_RANK", "0")) == 0)


def launches(trainer: Any) -> bool:
    """Whether this trainer will start further processes, by running the command again."""
    environment = trainer._accelerator_connector.cluster_environment
    return trainer.world_size > 1 and not environment.creates_processes_externally
