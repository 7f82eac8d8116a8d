"""What two processes cost beside one: the same training at the same global batch, each a command of its own.

    python benchmarks/processes.py [--batch 64] [--epochs 3] [--network small_cnn] [--limit 2000]
        [--data digits] [--path DIR]

Prints, of the leader, its processor time an epoch of training (the first epoch left out), that for a step, and the peak of
its resident memory.  Two processes of half the batch do half the passes each, so half the time is the best there is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import machine, whole

ROOT = Path(__file__).resolve().parents[1]


def trained(out: Path, name: str, arguments: list[str]) -> tuple[dict[str, list[float]], float]:
    """``cost.json`` of a run, and the peak of its leader's resident memory in MB."""
    log = out / f"{name}.log"
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), f"out={out}", f"name={name}", *arguments],
            stdout=said,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={"GOMP_SPINCOUNT": "3000", **os.environ, "OMP_NUM_THREADS": "1"},
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"the run {name} failed:\n{log.read_text()[-2000:]}")
    cost: dict[str, list[float]] = json.loads((out / name / "cost.json").read_text())
    return cost, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=whole, default=64)
    parser.add_argument("--epochs", type=whole, default=3)
    parser.add_argument("--network", default="small_cnn")
    parser.add_argument("--limit", type=whole, default=2000)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--path", help="folder of --data arrays")
    args = parser.parse_args()
    common = [f"data={args.data}", f"network={args.network}", f"data.train_limit={args.limit}", "data.test_limit=100"]
    common += [f"data.path={args.path}"] if args.path else []
    common += [
        f"trainer.max_epochs={args.epochs}",
        "trainer.accelerator=cpu",
        "threads=1",
        "wandb.mode=disabled",
        "panels=[]",
    ]
    common += ["health=off", "compare_undefended=false"]
    rows = {"one process": [f"data.batch_size={args.batch}"]}
    rows["two processes"] = [f"data.batch_size={args.batch // 2}", "trainer=ddp", "trainer.devices=2"]
    print(f"{machine()}; {args.network} on {args.data}, global batch {args.batch}, {args.epochs} epochs\n")
    print("| leader | CPU seconds an epoch | ms a step | wall seconds an epoch | peak memory, MB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, own in rows.items():
            cost, memory = trained(Path(folder), name.replace(" ", "-"), [*common, *own])
            cpu, wall = (median(cost[key][1:] or cost[key]) for key in ("cpu_seconds", "seconds"))
            steps = float(str(cost["steps"]))
            print(f"| {name} | {cpu:.2f} | {1000 * cpu / steps:.1f} | {wall:.2f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
