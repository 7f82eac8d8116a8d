"""Where does an undefended net fall?  PGD-20 accuracy on the validation split over ε, for choosing a dataset's budget.

    python benchmarks/choose_eps.py data=digits
    python benchmarks/choose_eps.py data=arrays data.path=PATH network=resnet18 trainer.max_epochs=10

Prints the curve of three seeds and the smallest ε of the grid whose mean accuracy is below 10 %.  The test split is
never read.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.evaluation.accuracy import accuracy_under
from glassarmor.defenses.threat import Linf
from glassarmor.lightning_modules.commands.train import CONFIGS, build, undefended

GRID = [0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1]


def curve(overrides: list[str]) -> list[float]:
    """Validation accuracy at each ε of ``GRID`` after ordinary training."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides)
    parts = build(undefended(cfg))
    instantiate(cfg.trainer, logger=False, enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0).fit(
        parts.module, datamodule=parts.data
    )
    attacks = {f"{eps}": PGD(Linf(eps), steps=20) for eps in GRID[1:]}
    result = accuracy_under(parts.module.net, parts.data.val_dataloader(), attacks, torch.device("cpu"))
    return list(result.values())


if __name__ == "__main__":
    curves = torch.tensor([curve([*sys.argv[1:], f"seed={seed}"]) for seed in range(3)])
    print("epsilon   " + "  ".join(f"{eps:6.3f}" for eps in GRID))
    for seed, row in enumerate(curves):
        print(f"seed {seed}    " + "  ".join(f"{100 * v:5.1f}%" for v in row.tolist()))
    mean = curves.mean(0)
    print("mean      " + "  ".join(f"{100 * v:5.1f}%" for v in mean.tolist()))
    below = [eps for eps, v in zip(GRID, mean.tolist(), strict=True) if v < 0.1]
    print(f"smallest epsilon below 10 %: {below[0] if below else 'none on this grid'}")
