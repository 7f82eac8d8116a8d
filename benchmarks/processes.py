"""What two processes cost beside one: the same training at the same global batch, each a command of its own.

    python benchmarks/processes.py [OVERRIDE …] [--what cost messages] [--batch 64] [--epochs 3] [--network small_cnn]
        [--limit 2000] [--data digits] [--path DIR]

cost: of the leader, its processor time an epoch of training (the first epoch left out), that for a step, and the peak of its
resident memory.  Two processes of half the batch do half the passes each, so half the time is the best there is.

messages: what the leader hands to gloo, call by call, as torch's profiler saw it in a short run of two processes (two epochs
of four steps with one attack step; neither the batch nor the attack changes what is sent).  Overrides are train.py's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import machine, positive

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"float": 4, "double": 8, "long int": 8, "int": 4, "unsigned char": 1, "bool": 1, "c10::BFloat16": 2}
Message = tuple[str, str, int]  # what was called, the type and number of elements


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


def messages(events: list[dict[str, Any]]) -> list[Counter[Message]]:
    """How often the leader sent what: in a step, for a checkpoint, and in the whole run beside its steps.

    A step: from one backward to the next.  Before the last backward of an epoch a checkpoint is written.  The run counts
    from the second backward, for in the first step DDP still puts all gradients into one bucket and agrees on others.
    """
    sent = [(event["ts"], _message(event)) for event in events if event.get("name", "").startswith("gloo:")]
    starts = sorted(event["ts"] for event in events if event.get("name", "").endswith("Strategy.backward"))
    spans = itertools.pairwise(starts[-3:])
    step, with_checkpoint = (Counter(message for at, message in sent if a <= at < b) for a, b in spans)
    later = Counter(message for at, message in sent if at >= starts[1])
    steps = Counter({message: times * (len(starts) - 1) for message, times in step.items()})
    return [step, with_checkpoint - step, later - steps]


def _message(event: dict[str, Any]) -> Message:
    kinds, shapes = (event["args"].get(key, []) for key in ("Input type", "Input Dims"))
    return event["name"].removeprefix("gloo:"), kinds[0] if kinds else "", math.prod(shapes[0]) if shapes else 0


def volume(found: Counter[Message]) -> int:
    """Bytes."""
    return sum(times * count * SIZES.get(kind, 0) for (_, kind, count), times in found.items())


def counted(folder: Path, arguments: list[str]) -> None:
    profiler = [
        "_target_:pytorch_lightning.profilers.PyTorchProfiler",
        f"dirpath:{folder}",
        "filename:trace",
        "record_shapes:true",
        "record_module_names:false",
        "schedule:{_target_:torch.profiler.schedule,wait:0,warmup:0,active:1000000}",
    ]
    short = ["trainer.max_epochs=2", "trainer.limit_train_batches=4", "data.test_limit=16", "probe.size=2"]
    short += [f"{attack}.steps=1" for attack in ("defense.attack", "val_attack", "probe.attack")]
    trained(folder, "messages", [*arguments, *short, f"+trainer.profiler={{{','.join(profiler)}}}"])
    trace = next(folder.glob("fit-trace-0-*.json"))
    found = messages(json.loads(trace.read_text())["traceEvents"])
    print("\n| call | elements | bytes | a step | a checkpoint | two epochs beside their steps |\n|---|---|---|---|---|---|")
    for message in sorted(found[0] | found[2], key=lambda m: (-found[0][m], m)):
        call, kind, count = message
        times = " | ".join(str(part[message]) for part in found)
        print(f"| {call} | {count:,} {kind} | {volume(Counter([message])):,} | {times} |")
    print(f"| all | | | {' | '.join(f'{part.total()}: {volume(part):,} bytes' for part in found)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="e.g. awp.gamma=0.005")
    parser.add_argument("--what", nargs="+", choices=["cost", "messages"], default=["cost"])
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--epochs", type=positive, default=3)
    parser.add_argument("--network", default="small_cnn")
    parser.add_argument("--limit", type=positive, default=2000)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--path", help="folder of --data arrays")
    args = parser.parse_args()
    if args.batch % 2:
        parser.error(f"argument --batch: expected an even number, for two processes, found {args.batch}")
    if args.data == "arrays" and not args.path:
        parser.error("argument --path: expected a folder for --data arrays, found none")
    common = [f"data={args.data}", f"network={args.network}", f"data.train_limit={args.limit}", "data.test_limit=100"]
    common += [f"data.path={args.path}"] if args.path else []
    common += [
        f"trainer.max_epochs={args.epochs}",
        "trainer.accelerator=cpu",
        "threads=1",
        "wandb.mode=disabled",
        "panels=[]",
    ]
    common += ["health=off", "compare_undefended=false", *args.overrides]
    rows = {"one process": [f"data.batch_size={args.batch}"]}
    rows["two processes"] = [f"data.batch_size={args.batch // 2}", "trainer=ddp", "trainer.devices=2"]
    print(f"{machine()}; {args.network} on {args.data}, global batch {args.batch}")
    with tempfile.TemporaryDirectory() as folder:
        if "cost" in args.what:
            print(f"{args.epochs} epochs\n")
            print("| leader | CPU seconds an epoch | ms a step | wall seconds an epoch | peak memory, MB |")
            print("|---|---|---|---|---|")
            for name, own in rows.items():
                cost, memory = trained(Path(folder), name.replace(" ", "-"), [*common, *own])
                cpu, wall = (median(cost[key][1:] or cost[key]) for key in ("cpu_seconds", "seconds"))
                steps = float(str(cost["steps"]))
                print(f"| {name} | {cpu:.2f} | {1000 * cpu / steps:.1f} | {wall:.2f} | {memory:.0f} |")
        if "messages" in args.what:
            counted(Path(folder), [*common, *rows["two processes"]])


if __name__ == "__main__":
    main()
