"""Does a run notice that it goes wrong, and how early?  Planted collapses and honest runs on CIFAR-10 images.

    python benchmarks/health.py --data FOLDER_OF_NPZ --out FOLDER [--seeds 0 1 2 3] [--calibration 100 101]

Two classes of CIFAR-10 (airplane, frog), a small CNN, ``STEPS`` steps of 64 images, a reading every ``EVERY`` steps.
Planted: FGSM without noise at large ε.  Honest: PGD-AT and N-FGSM at 8/255, PGD-AT at 24/255.  The limits of the signals are
fixed on the honest runs of the calibration seeds alone: a quarter above the largest value met there.  The lead is counted
in steps against the accuracy alarm (gap or fall of 20 points); a gap with a limit that is fixed as the signals' is
stands beside them, for a tighter limit alone makes an alarm early.

One JSON a run goes to FOLDER, so that a stopped benchmark goes on where it was.

    python benchmarks/health.py --data FOLDER_OF_NPZ --write-two-classes DIR

leaves the images of these two classes in DIR, for ``python train.py data=arrays data.path=DIR``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glassarmor.datamodules.arrays import Arrays
from glassarmor.defenses.attacks.pgd import FGSM, NFGSM, PGD, Scalable
from glassarmor.defenses.monitoring.alarms import KINDS, Limits, judge
from glassarmor.defenses.monitoring.readings import Images, Reading, measure
from glassarmor.defenses.threat import Linf, Threat
from glassarmor.interpret.storage import write_atomic
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN

STEPS, CLIMB, EVERY, WARM_UP = 100, 50, 5, 10  # a net that has seen next to nothing is not judged
CLASSES = (0, 6)
HELD, LUCKY, GRACE = 64, 42, 50  # images read; right answers that 1 in 100 guessers reaches of two classes; steps
SIGNALS = ("gap", "misalignment", "kind_drift", "turning_drift")
SAFETY = 1.25


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to train: the attack of a ball, its ε in 255ths, and whether ε climbs from 0."""

    attack: Callable[[Threat], Scalable]
    eps: float
    climbs: bool = False

    def threat(self, step: int) -> Threat:
        return Linf(self.eps / 255 * (min(1.0, (step + 1) / CLIMB) if self.climbs else 1.0))


CASES = {
    "planted: FGSM, ε 48": Case(FGSM, 48),
    "planted: FGSM, ε climbs to 64": Case(FGSM, 64, climbs=True),
    "honest: PGD-3, ε 8": Case(lambda threat: PGD(threat, 3), 8),
    "honest: PGD-3, ε 24": Case(lambda threat: PGD(threat, 3), 24),
    "honest: N-FGSM, ε 8": Case(NFGSM, 8),
}


def write_two_classes(data: Path, out: Path) -> None:
    """``train.npz`` and ``test.npz`` with all images of ``CLASSES``."""
    train, test, names = Arrays(path=str(data)).load()
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("test", test)):
        x, y = of_classes(part.images, part.labels)
        pixels = x.permute(0, 2, 3, 1).contiguous().numpy()
        np.savez(out / f"{name}.npz", images=pixels, labels=y.numpy(), class_names=np.array([names[c] for c in CLASSES]))


def of_classes(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of ``CLASSES``, labelled 0, 1, …"""
    rows = torch.isin(labels, torch.tensor(CLASSES))
    number = torch.zeros(max(CLASSES) + 1, dtype=torch.long)
    number[list(CLASSES)] = torch.arange(len(CLASSES))
    return images[rows], number[labels[rows]]


def run(case: Case, data: Path, seed: int) -> list[dict[str, float]]:
    """Train once; the readings, each with its ``step``."""
    source = Arrays(path=str(data), train_limit=10_000, test_limit=100, augment=None, seed=seed)
    source.setup()
    x, y = of_classes(source.train.images, source.train.labels)
    held, held_y = of_classes(source.val.images, source.val.labels)
    torch.manual_seed(seed)
    net = SmallCNN(num_classes=len(CLASSES), in_channels=3, mean=source.mean, std=source.std)
    images = Images(held[:HELD].float() / 255, held_y[:HELD], (x[:128].float() / 255, y[:128]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    generator, found = torch.Generator().manual_seed(seed), []
    for step in range(STEPS):
        rows = torch.randint(len(x), (64,), generator=generator)
        batch, labels = x[rows].float() / 255, y[rows]
        attack = case.attack(case.threat(step))
        attack.reseed(step)
        net.train()
        loss = nn.functional.cross_entropy(net(attack(net, batch, labels)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % EVERY == 0 and step + 1 > WARM_UP:
            values = measure(net, images, case.threat(step), net.feature_layers, thorough=(step + 1) % (8 * EVERY) == 0)
            found.append({"step": step + 1, **values})
    return found


def readings(rows: Sequence[Mapping[str, float]]) -> list[Reading]:
    """Runs that were stored before ``guess`` was read get it from their accuracy: both classes are as frequent."""
    found = []
    for row in rows:
        values = {k: v for k, v in row.items() if k != "step"}
        if "clean" in values:
            values.setdefault("guess", LUCKY / max(round(HELD * values["clean"]), 1))
        found.append(Reading(0, int(row["step"]), values))
    return found


def first_alarm(history: Sequence[Reading], limits: Limits, kind: str) -> int | None:
    """Step of the first alarm of this kind."""
    hits = (r.step for i, r in enumerate(history) if judge(history[: i + 1], limits, (kind,), GRACE))
    return next(hits, None)


def only(name: str, limit: float) -> Limits:
    """Limits that judge one indicator alone."""
    off = {field.name: None for field in dataclasses.fields(Limits)}
    return Limits(**{**off, name: limit})


def kind_of(name: str) -> str:
    return {"gap": "catastrophic", "misalignment": "alignment"}.get(name, "drift")


def table(known: Mapping[tuple[str, int], list[Reading]], calibration: Sequence[int], seeds: Sequence[int]) -> list[str]:
    """The findings as lines of Markdown."""
    honest = [name for name in CASES if name.startswith("honest")]
    limits = {
        name: min(1.0, SAFETY * max(r.values[name] for c in honest for s in calibration for r in known[c, s]))
        for name in SIGNALS
    }
    lines = [f"limits fixed on seeds {list(calibration)}: " + ", ".join(f"{k} {v:.3f}" for k, v in limits.items()), ""]
    lines += [
        "| run | alarm | caught | step of the first alarm, by seed | lead over accuracy | median |",
        "|---|---|---|---|---|---|",
    ]
    judges = {"accuracy": (Limits(), "catastrophic")}
    judges |= {
        ("gap, limit fixed likewise" if name == "gap" else name): (only(name, limit), kind_of(name))
        for name, limit in limits.items()
    }
    for case in CASES:
        first = {name: [first_alarm(known[case, s], *how) for s in seeds] for name, how in judges.items()}
        for name, steps in first.items():
            pairs = zip(first["accuracy"], steps, strict=True)
            leads = [accuracy - own for accuracy, own in pairs if accuracy is not None and own is not None]
            at = ", ".join("–" if step is None else str(step) for step in steps)
            caught = sum(step is not None for step in steps)
            middle = f"{statistics.median(leads):+.0f}" if leads else "–"
            listed = ", ".join(f"{lead:+d}" for lead in leads) or "–"
            lines.append(f"| {case} | {name} | {caught}/{len(seeds)} | {at} | {listed} | {middle} |")
    lines += [
        "",
        "runs with an alarm by the default limits, and its first step by seed",
        "",
        "| run | kind | runs | steps |",
    ]
    lines += ["|---|---|---|---|"]
    for case in CASES:
        for kind in KINDS:
            steps = [first_alarm(known[case, s], Limits(), kind) for s in seeds]
            if any(step is not None for step in steps):
                at = ", ".join("–" if step is None else str(step) for step in steps)
                lines.append(f"| {case} | {kind} | {sum(step is not None for step in steps)}/{len(seeds)} | {at} |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train*.npz and test.npz")
    parser.add_argument("--out", type=Path, help="where the runs' JSON files go")
    parser.add_argument(
        "--write-two-classes", type=Path, metavar="DIR", help="write the images of the two classes, and no more"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--calibration", type=int, nargs="+", default=[100, 101])
    asked = parser.parse_args()
    if asked.write_two_classes is not None:
        write_two_classes(asked.data, asked.write_two_classes)
        parser.exit()
    if asked.out is None:
        parser.error("--out: expected a folder for the runs' JSON files")
    if set(asked.seeds) & set(asked.calibration):
        parser.error("--calibration: expected seeds that are not judged")
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    known = {}
    for number in (*asked.calibration, *asked.seeds):
        for index, (name, case) in enumerate(CASES.items()):
            file = asked.out / f"case{index}_s{number}.json"
            if not file.exists():
                start = time.monotonic()
                rows = run(case, asked.data, number)
                write_atomic(file, json.dumps({"case": name, "seed": number, "steps": STEPS, "readings": rows}))
                print(f"{name}, seed {number}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            stored = json.loads(file.read_text())
            if (stored["case"], stored["steps"]) != (name, STEPS):
                parser.error(f"--out: {file} holds another benchmark's run")
            known[name, number] = readings(stored["readings"])
    print("\n".join(table(known, asked.calibration, asked.seeds)))
