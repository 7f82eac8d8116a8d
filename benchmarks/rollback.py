"""Does rolling back help?  Planted collapses, each trained with ``rollback`` and, from the same seed, with ``warn``.

    python benchmarks/rollback.py --data FOLDER_OF_NPZ --out FOLDER [--seeds 2 3 4 5 6]

The protocol. Two classes of CIFAR-10 (airplane, frog), batches of 64, 30 steps an epoch, 3 epochs, and the embedded
digits, 15 steps, 6 epochs; a small CNN of half the width, SGD with cosine, rate 0.1; a reading of 64 images every
``EVERY`` steps and every epoch, limits and measures by default. Planted: FGSM without noise at ε 48/255, and at an ε
that climbs to 64/255 over half the run, as in ``benchmarks/health.py``; FGSM-RS at ε 48/255; a learning rate of
``HOT`` on digits. Judged on ``JUDGED`` test images by the net after the last step, whatever is kept beside it: clean
accuracy, and under PGD-20 with steps of ε/8, which counts nothing for a net that guesses. Differences are paired by
seed, with a 95 % t interval; "below" is a mean that lies below 0 by more than half its interval. Seeds 0, 1 and 10
were looked at while the rules of a rollback were made, and plants chosen by whether ``warn`` collapses there; 2 to 6
were not.

One JSON a run goes to FOLDER, so that a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.health import Case, of_classes
from glassarmor.datamodules.arrays import Arrays
from glassarmor.datamodules.digits import Digits
from glassarmor.datamodules.images import ImageDataModule, Images
from glassarmor.defenses.attacks.pgd import FGSM, FGSMRS, PGD
from glassarmor.defenses.monitoring.alarms import KINDS, Limits, guesses
from glassarmor.defenses.monitoring.readings import guessing
from glassarmor.defenses.threat import Linf
from glassarmor.defenses.training.defense import Defense
from glassarmor.defenses.training.terms import AdversarialCE, Ramp
from glassarmor.interpret.modes import undisturbed
from glassarmor.interpret.statistics import paired
from glassarmor.interpret.storage import write_atomic
from glassarmor.lightning_modules.callbacks.checkpointing import Checkpoints
from glassarmor.lightning_modules.callbacks.health import Action, Health, watch
from glassarmor.lightning_modules.classifier import Diverged, RobustClassifier
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN
from glassarmor.lightning_modules.run.console import console
from glassarmor.lightning_modules.schedules import cosine

EVERY, JUDGED, HOT = 10, 300, 10.0
ACTIONS: tuple[Action, ...] = ("warn", "rollback")


@dataclasses.dataclass(frozen=True)
class Plant:
    """A case on some data; ``steps`` an epoch, of ``epochs``."""

    case: Case
    digits: bool = False
    rate: float = 0.1
    steps: int = 30
    epochs: int = 3


PLANTS = {
    "FGSM, ε 48/255": Plant(Case(FGSM, 48)),
    "FGSM, ε climbs to 64/255": Plant(Case(FGSM, 64, climbs=True)),
    "FGSM-RS, ε 48/255": Plant(Case(FGSMRS, 48)),
    f"digits: PGD-3, ε 0.06, learning rate {HOT:g}": Plant(
        Case(lambda threat: PGD(threat, 3), 15), digits=True, rate=HOT, steps=15, epochs=6
    ),
}


class TwoClasses(Arrays):
    """The images of two classes, as many as are asked for of the splits that are loaded."""

    def load(self) -> tuple[Images, Images, tuple[str, ...]]:
        train, test, _ = super().load()
        return (*(Images(*of_classes(part.images, part.labels)) for part in (train, test)), ("airplane", "frog"))


def data_of(plant: Plant, folder: Path, seed: int) -> ImageDataModule:
    options: dict[str, Any] = {"batch_size": 64, "seed": seed}
    if plant.digits:
        data: ImageDataModule = Digits(**options)
    else:
        data = TwoClasses(path=str(folder), train_limit=3000, test_limit=JUDGED, **options)
    data.setup()
    return data


def run(plant: Plant, folder: Path, seed: int, action: Action) -> dict[str, Any]:
    """Train once; what the last net reaches on the test images, and how often it was rolled back."""
    data, threat = data_of(plant, folder, seed), Linf(plant.case.eps / 255)
    pl.seed_everything(seed, verbose=False)
    net = SmallCNN(num_classes=data.num_classes, in_channels=data.image_shape[0], width=0.5, mean=data.mean, std=data.std)
    share = Ramp(0.0, 1.0, plant.epochs / 2) if plant.case.climbs else 1.0
    defense = Defense(plant.case.attack(threat), {"ce": AdversarialCE()}, eps_share=share)
    few = data.probe(2)
    defense.prepare(net, few.x, few.y)
    optimizer = functools.partial(torch.optim.SGD, lr=plant.rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    module = RobustClassifier(net, defense, PGD(threat, 5, seed=2), data.num_classes, optimizer, cosine, seed)
    monitor = watch(Health(threat, every_n_steps=EVERY, actions=dict.fromkeys(KINDS[:3], action)), module, data)
    with tempfile.TemporaryDirectory() as place:
        options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=plant.epochs, limit_train_batches=plant.steps, num_sanity_val_steps=0,
            limit_val_batches=0, callbacks=[*monitor, Checkpoints(Path(place))], default_root_dir=place, **options,
        )  # fmt: skip
        diverged = False
        try:
            trainer.fit(module, datamodule=data)
        except Diverged:
            diverged = True
    x, y = data.test.images[:JUDGED].float() / 255, data.test.labels[:JUDGED]
    attacked = PGD(threat, 20, seed=3)(net, x, y)
    with undisturbed(net), torch.no_grad():
        answers, robust = net(x).argmax(1), net(attacked).argmax(1)
    lost = diverged or guesses(guessing(answers, y, data.num_classes), Limits())
    right = {"clean": float((answers == y).float().mean()), "robust": float((robust == y).float().mean())}
    (health,) = monitor
    told = {
        "rollbacks": health.rollback.rollbacks,
        "measures": health.rollback.measures,
        "failed": health.rollback.failed,
        "stopped": health.stopped,
    }
    return {**right, "guesses": lost, **told, "stopped": health.stopped}


def table(known: Mapping[tuple[str, str, int], Mapping[str, Any]], seeds: Sequence[int]) -> list[str]:
    """The findings as lines of Markdown."""
    lines = [
        "| plant | clean, warn → rollback | PGD-20, warn → rollback | difference, 95 % interval | guess, of "
        f"{len(seeds)} | measures, by seed | below |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in PLANTS:
        rows = {action: [known[name, action, seed] for seed in seeds] for action in ACTIONS}
        clean, robust = ({a: [_worth(r, key) for r in rows[a]] for a in ACTIONS} for key in ("clean", "robust"))
        found = paired(robust["rollback"], robust["warn"])
        half = (found.high - found.low) / 2
        lost = " → ".join(str(sum(r["guesses"] for r in rows[a])) for a in ACTIONS)
        counts = ", ".join(str(r["rollbacks"]) for r in rows["rollback"])
        below = "no" if math.isnan(half) or found.mean >= -half else "YES"
        mean = {a: [100 * sum(v[a]) / len(seeds) for v in (clean, robust)] for a in ACTIONS}
        lines.append(
            f"| {name} | {mean['warn'][0]:.1f} → {mean['rollback'][0]:.1f} | {mean['warn'][1]:.1f} → "
            f"{mean['rollback'][1]:.1f} | {100 * found.mean:+.1f} ± {100 * half:.1f} | {lost} | {counts} | {below} |"
        )
    return lines


def _worth(row: Mapping[str, Any], key: str) -> float:
    return 0.0 if row["guesses"] and key == "robust" else float(row[key])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train*.npz and test.npz")
    parser.add_argument("--out", type=Path, required=True, help="where the runs' JSON files go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    console.file = sys.stderr
    asked.out.mkdir(parents=True, exist_ok=True)
    known = {}
    for number in asked.seeds:
        for index, (name, plant) in enumerate(PLANTS.items()):
            for action in ACTIONS:
                file = asked.out / f"plant{index}_{action}_s{number}.json"
                if not file.exists():
                    start = time.monotonic()
                    row = {"plant": name, **run(plant, asked.data, number, action)}
                    write_atomic(file, json.dumps(row))
                    print(
                        f"{name}, {action}, seed {number}: {time.monotonic() - start:.0f} s {row}",
                        file=sys.stderr,
                        flush=True,
                    )
                known[name, action, number] = json.loads(file.read_text())
    print("\n".join(table(known, asked.seeds)))
