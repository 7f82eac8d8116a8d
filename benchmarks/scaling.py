"""How a training step's cost grows: with attack steps, batch, width, image size, observed layers and classes.

    python benchmarks/scaling.py [--rounds 5] [--threads 1] [--figure benchmarks/scaling.svg]

Each axis is varied alone, its values in turn within every round.  A straight line is fitted against what the cost should be
proportional to: the square of the width, the number of pixels, else the number itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure

from benchmarks.timing import line, machine, paired, positive
from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.threat import Linf
from glassarmor.defenses.training.defense import Defense
from glassarmor.defenses.training.regularizers import UnitSensitivity
from glassarmor.defenses.training.terms import AdversarialCE
from glassarmor.interpret.views.draw.figures import save
from glassarmor.lightning_modules.networks.resnet import ResNet
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN

DATA: dict[str, Any] = {"in_channels": 3, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


@dataclass(frozen=True)
class Axis:
    """Values of one quantity, what the cost should be proportional to, and a step at a value."""

    name: str
    values: Sequence[int]
    proportional: Callable[[int], float]
    step: Callable[[int], Callable[[], object]]


def step(
    net: nn.Module, *, batch: int = 64, size: int = 32, classes: int = 10, steps: int = 5, layers: Sequence[str] = ()
) -> Callable[[], object]:
    """One PGD-AT step, with unit sensitivity at ``layers`` if there are any; run once before."""
    x, y = torch.rand(batch, 3, size, size), torch.arange(batch) % classes
    terms = {"sensitivity": UnitSensitivity(layers=layers)} if layers else {}
    defense = Defense(PGD(Linf("8/255"), steps), {"ce": AdversarialCE()}, terms)
    optimizer = torch.optim.SGD(net.train().parameters(), lr=0.01, momentum=0.9, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        defense(net, x, y).loss.backward()
        optimizer.step()

    run()  # of the whole batch: folding compares logits when it first sees one so large
    return run


def small(width: float = 1.0, classes: int = 10) -> nn.Module:
    return SmallCNN(**DATA, width=width, num_classes=classes)


def observed(count: int) -> Callable[[], object]:
    """A net of eight equal blocks, of which so many are observed beside the last."""
    net = ResNet((8,), (16,), **DATA, num_classes=10)
    return step(net, steps=1, size=16, layers=[f"layer1.{i}" for i in range(7, 7 - count, -1)])


AXES = (
    Axis("attack steps", (1, 4, 7, 10, 20), float, lambda k: step(small(), steps=k)),
    Axis("batch", (32, 64, 128, 192, 256), float, lambda n: step(small(), batch=n)),
    Axis("width, squared", (2, 4, 6, 8), lambda w: float(w * w), lambda w: step(small(w), batch=32, steps=2)),
    Axis("pixels", (16, 32, 48, 64, 96), lambda s: float(s * s), lambda s: step(small(), size=s)),
    Axis("observed layers", (1, 2, 4, 6, 8), float, observed),
    Axis("classes", (10, 1000, 2000, 4000, 8000), float, lambda c: step(small(classes=c), classes=c)),
)


def draw(found: dict[str, tuple[list[float], list[float], tuple[float, float, float]]], path: Path) -> None:
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    for axes, (name, (x, y, (slope, intercept, r2))) in zip(figure.subplots(2, 3).flat, found.items(), strict=True):
        axes.plot(x, y, "o", color="#1f5fbf")
        axes.plot([0, max(x)], [intercept, intercept + slope * max(x)], color="#5a6472", linewidth=1)
        axes.set(xlabel=name, ylabel="seconds a step", ylim=(0, None), title=f"R² = {r2:.4f}")
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_name("scaling.svg"))
    args = parser.parse_args()
    if not args.figure.parent.is_dir():
        parser.error(f"argument --figure: expected a file in a folder that is there, found {args.figure}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{machine()}; fp32, median of {args.rounds} rounds\n")
    print("| cost against | values | seconds a step | at 0 | R² |\n|---|---|---|---|---|")
    found = {}
    for axis in AXES:
        runs = {str(value): partial(axis.step(value)) for value in axis.values}
        times = paired(runs, args.rounds)
        x, y = [axis.proportional(v) for v in axis.values], [median(times[str(v)]) for v in axis.values]
        fit = line(x, y)
        found[axis.name] = (x, y, fit)
        values, seconds = ", ".join(map(str, axis.values)), ", ".join(f"{t:.3f}" for t in y)
        print(f"| {axis.name} | {values} | {seconds} | {fit[1]:.3f} | {fit[2]:.4f} |", flush=True)
    draw(found, args.figure)


if __name__ == "__main__":
    main()
