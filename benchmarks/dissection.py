"""Dissection beside plain loops and beside a dense matrix product, with equal counts asserted.

    python benchmarks/dissection.py [--threads 1] [--images 2000] [--units 512] [--loop-units 16] [--rounds 3]

A layer of 512 units of 4×4 positions, as the last of a ResNet-18 at 32×32, on drawn scenes with 40 concepts.  Ours is the
whole of ``dissect``: forwards, thresholds, counts.  The others get activations and thresholds for nothing.  Loops are run
on some of the units and scaled up; their counts are compared there, those of the matrix product everywhere.  Then the cost
of one dissection of the default network, as a dashboard would ask for it.  One thread counts the process's own time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glassarmor.datamodules.concepts import ConceptSet, procedural_concepts
from glassarmor.interpret.concepts.dissection import Dissection, dissect
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN

CONCEPTS = 40


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Median of the rounds after a warm-up."""
    clock, times = time.process_time if torch.get_num_threads() == 1 else time.perf_counter, []
    for round_ in range(rounds + (rounds > 1)):
        start = clock()
        run()
        if round_ or rounds == 1:
            times.append(clock() - start)
    return median(times)


def case(images: int, units: int) -> tuple[nn.Module, ConceptSet, Tensor, np.ndarray]:
    """Net, concepts, activations (N, C, 4, 4), and masks (N, K, H, W) bool."""
    drawn = procedural_concepts(images)
    labels = drawn.labels.where(drawn.labels < CONCEPTS, -1)
    labels = labels[:, (labels >= 0).any(3).any(2).any(0)]
    data = replace(drawn, labels=labels, concepts=drawn.concepts[:CONCEPTS], categories=drawn.categories[:CONCEPTS])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, units, 9, stride=8, padding=4), nn.ReLU(), nn.Flatten()).eval()
    with torch.no_grad():
        acts = torch.cat([net[:2](x) for x, _ in data])
    masks = torch.stack([(labels == k).any(1) for k in range(CONCEPTS)], 1)
    return net, data, acts, masks.numpy()


def enlarged(act: Tensor) -> Tensor:
    return nn.functional.interpolate(act, (32, 32), mode="bilinear", align_corners=False)


def loop(acts: Tensor, masks: np.ndarray, thresholds: Tensor, units: int, skip: bool) -> tuple[np.ndarray, np.ndarray]:
    """Unit by unit, image by image, all concepts of an image in one NumPy expression.

    ``skip``: leave out images in which the unit stays below its threshold, as the published code does.  In float64: the
    threshold is one of the activations, and in fp32 its copies along the border round to just above it.
    """
    acts = acts.double()
    counts, areas = np.zeros((units, CONCEPTS), int), np.zeros(units, int)
    for k in range(units):
        threshold = float(thresholds[k])
        for i in range(len(acts)):
            if skip and float(acts[i, k].max()) <= threshold:
                continue
            mask = enlarged(acts[i, k][None, None])[0, 0].numpy() > threshold
            areas[k] += mask.sum()
            counts[k] += (masks[i] & mask).sum((1, 2))
    return counts, areas


@torch.no_grad()
def product(acts: Tensor, masks: np.ndarray, thresholds: Tensor, chunk: int = 10) -> tuple[Tensor, Tensor]:
    """(C, P) @ (P, K) over chunks of images; fp32 counts exactly below 2²⁴."""
    counts = torch.zeros(acts.shape[1], CONCEPTS, dtype=torch.int64)
    areas = torch.zeros(acts.shape[1], dtype=torch.int64)
    for start in range(0, len(acts), chunk):
        above = enlarged(acts[start : start + chunk] - thresholds.view(1, -1, 1, 1))
        fires = (above > 0).transpose(0, 1).flatten(1)
        holds = torch.from_numpy(masks[start : start + chunk]).transpose(0, 1).flatten(1)
        counts += (fires.float() @ holds.float().T).long()
        areas += fires.sum(1)
    return counts, areas


def compare(name: str, counts: Tensor, areas: Tensor, ours: Dissection) -> None:
    units = len(areas)
    same = torch.equal(counts, ours.intersection[:units]) and torch.equal(areas, ours.unit[:units])
    assert same, f"{name}: other counts, {(counts - ours.intersection[:units]).abs().max()} pixels at most"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--units", type=int, default=512)
    parser.add_argument("--loop-units", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    net, data, acts, masks = case(args.images, args.units)
    found = dissect(net, data, ["1"])["1"]
    ours = seconds(lambda: dissect(net, data, ["1"]), args.rounds)
    print(f"{args.units} units of 4x4, {args.images} images of 32x32, {CONCEPTS} concepts, {args.threads} thread(s)")
    print(f"  {'dissect, forwards and thresholds included':46}{ours:9.2f} s")
    scale = args.units / args.loop_units
    for name, skip in (("plain loop", False), ("loop that skips images below the threshold", True)):
        result: list[tuple[np.ndarray, np.ndarray]] = []
        taken = scale * seconds(
            lambda skip=skip, result=result: result.append(loop(acts, masks, found.thresholds, args.loop_units, skip)), 1
        )
        compare(name, *(torch.from_numpy(values) for values in result[0]), found)
        print(f"  {name:46}{taken:9.2f} s  {taken / ours:7.1f} x  ({args.loop_units} units scaled up, same counts)")
    dense: list[tuple[Tensor, Tensor]] = []
    taken = seconds(lambda: dense.append(product(acts, masks, found.thresholds)), 1)
    compare("matrix product", *dense[0], found)
    print(f"  {'matrix product, dense':46}{taken:9.2f} s  {taken / ours:7.1f} x  (all units, same counts)")

    small = SmallCNN(num_classes=10, in_channels=1, mean=[0.5], std=[0.5])
    for count in (200, 300, 500):
        concepts = procedural_concepts(count, 32, 1)
        taken = seconds(lambda concepts=concepts: dissect(small, concepts, small.feature_layers), args.rounds)
        made = seconds(lambda count=count: procedural_concepts(count, 32, 1), args.rounds)
        what = f"SmallCNN, 3 stages, {count} grey images"
        print(f"  {what:46}{taken:9.2f} s, {len(concepts.concepts)} concepts; {made:.2f} s once to draw them")


if __name__ == "__main__":
    main()
