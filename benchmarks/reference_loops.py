"""Do our training methods train as plain loops written from the papers do?  One Markdown table on the embedded digits.

    python benchmarks/reference_loops.py --out FOLDER [--seeds 0 1 2] [--only TRADES]

Ours goes through the command line's config, RobustClassifier and Lightning; the loops are those of tests/reference/loops.py.
Both start from the same weights, see the same batches in the same order, draw the same random starts, and spend the same
forwards.  Accuracies are those on all held-out images (test and validation; nothing is selected), in %; "agree" is the share
of these images on which both nets are right or both wrong under attack.  One JSON a method and seed goes to FOLDER.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.reference.paired import BUDGET, METHODS, SIZES, trained


def table(found: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| method | clean, ours | clean, loop | PGD-20, ours | PGD-20, loop | agree |", "|---|---|---|---|---|---|"]
    for name, runs in found.items():
        cells = []
        for column in ("clean, ours", "clean, plain", "PGD-20, ours", "PGD-20, plain"):
            values = [run[column] for run in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        agree = f"{statistics.mean(run['agree'] for run in runs):.1f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {agree} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="methods whose name holds this text")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        for name in (name for name in METHODS if args.only in name):
            path = args.out / f"{re.sub('[^A-Za-z0-9]+', '-', name)}-s{seed}.json"
            if not path.exists():
                begin = time.perf_counter()
                points = trained(name, BUDGET.seeded(seed), SIZES).points()
                path.write_text(json.dumps(points))
                print(f"{name}, seed {seed}: {points}  ({time.perf_counter() - begin:.0f} s)", file=sys.stderr, flush=True)
            found.setdefault(name, []).append(json.loads(path.read_text()))
    print(table(found))


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    torch.set_num_threads(1)
    main()
