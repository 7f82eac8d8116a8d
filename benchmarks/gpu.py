"""Everything that a GPU has to show: right against the CPU, then fast, small, and robust.

    python benchmarks/gpu.py --data DIR              # .npz shards of CIFAR-10, as data=arrays data.path=DIR reads them
    python benchmarks/gpu.py --data DIR --only correctness compile
    python benchmarks/gpu.py                         # random images; without the time to a robust accuracy
    python benchmarks/gpu.py --device cpu --small    # the same code on a few images, to see that it runs

In short calls: what a call has measured is in ``--out``, the same command again goes on with what is left, and says so.
Nothing begins after ``--minutes``; the training of time_to is then stopped, and resumed by the next call.  What failed is
recorded and not tried again without ``--again``.  Exit code 0: all is measured; 75: something is left, call again; 1:
something failed, or the device is wrong; 2: bad arguments.

correctness  each net against the CPU: logits, what each attack gains, losses and gradients of each defense with its extras
compile      a PGD-10 step with the attack's net as it is, compiled, and in CUDA graphs: +defense.compile_attack
epochs       seconds of an epoch of all 50,000 images, memory, share of the speed of a bf16 product; with and without extras
dashboards   one epoch's look with all panels of a default run, and its share of an epoch
time_to      train.py itself, TRADES: seconds of training, on the 45,000 images it does not hold out, to a robust accuracy

Precision and layout are what ``auto`` chooses for the device.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compiling import AS_IT_IS, compare, ways
from benchmarks.extras import Given
from benchmarks.throughput import Unfolded, passes
from benchmarks.timing import machine, matmul_rate, paired, positive, ratio, seconds
from glassarmor.datamodules.arrays import Arrays
from glassarmor.datamodules.augment import Augment
from glassarmor.datamodules.loader import TensorLoader
from glassarmor.defenses.attacks.objectives import KLToClean, Objective
from glassarmor.defenses.attacks.pgd import NFGSM, PGD
from glassarmor.defenses.evaluation.inputs import full_precision
from glassarmor.defenses.threat import Linf
from glassarmor.defenses.training.compiling import ways as allowed_ways
from glassarmor.defenses.training.defense import Defense
from glassarmor.defenses.training.regularizers import PSE, UnitSensitivity
from glassarmor.defenses.training.terms import AdversarialCE, CleanCE, Term, TradesKL
from glassarmor.interpret.modes import buffers_kept
from glassarmor.interpret.storage import write_atomic
from glassarmor.interpret.views.page.page import ReportPage
from glassarmor.lightning_modules.callbacks.dashboard import Dashboard
from glassarmor.lightning_modules.callbacks.preemption import EXIT_CODE
from glassarmor.lightning_modules.networks.resnet import ResNet, resnet18
from glassarmor.lightning_modules.networks.wide_resnet import wide_resnet
from glassarmor.lightning_modules.run.hardware import Settings, suited
from glassarmor.lightning_modules.run.log import RunLog

ROOT = Path(__file__).resolve().parents[1]
DATA: dict[str, Any] = {
    "num_classes": 10,
    "in_channels": 3,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.247, 0.2435, 0.2616),
}
BALL = Linf("8/255")
PARTS = ("correctness", "compile", "epochs", "dashboards", "time_to")
DEFENSES: dict[str, Callable[[], tuple[Any, dict[str, Term]]]] = {
    "PGD-10": lambda: (PGD(BALL, 10, "2/255"), {"ce": AdversarialCE()}),
    "TRADES": lambda: (
        PGD(BALL, 10, "2/255", start="gaussian", objective=KLToClean()),
        {"clean_ce": CleanCE(), "kl": TradesKL()},
    ),
    "N-FGSM": lambda: (NFGSM(BALL), {"ce": AdversarialCE()}),
}
EXTRAS: dict[str, Callable[[], dict[str, Term]]] = {
    "bare": dict,
    "PSE, sensitivity": lambda: {"pse": PSE(), "sensitivity": UnitSensitivity()},
}


def networks(small: bool) -> dict[str, Callable[[], nn.Module]]:
    if small:
        return {"small ResNet": lambda: ResNet((1, 1), (8, 16), **DATA)}
    return {"ResNet-18": lambda: resnet18(**DATA), "WRN-28-10": lambda: wide_resnet(**DATA)}


class Trainer:
    """A net, its defense and optimiser on a device; ``auto`` says in which precision and layout."""

    def __init__(self, net: nn.Module, defense: Defense, device: torch.device, settings: Settings) -> None:
        self.device, self.settings = device, settings
        self.net = net.to(device).train()
        if settings.channels_last:
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.defense = defense.to(device)
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True
        )
        self.steps = 0

    def step(self, x: Tensor, y: Tensor) -> None:
        with autocast(self.device, self.settings):
            loss = self.defense(self.net, x, y).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1

    def epoch(self, loader: TensorLoader) -> None:
        for index, (x, y) in enumerate(loader):
            self.defense.at(index / len(loader), self.steps)
            self.step(x, y)
        self.defense.end_epoch()


def autocast(device: torch.device, settings: Settings) -> Any:
    return (
        torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if "bf16" in settings.precision else nullcontext()
    )


def settings_of(device: torch.device) -> Settings:
    return suited("cpu" if device.type == "cpu" else "auto")


def correctness(make: Callable[[], nn.Module], x: Tensor, y: Tensor, device: torch.device) -> dict[str, Any]:
    """The same net on the CPU in fp32, and on the device in fp32 and in ``auto``: everything that is timed later.

    By defense, what its attack gains of what it maximises, judged on the CPU; by defense and extras, the relative error of
    the loss at the CPU's x', and the cosine between its gradients of all weights and the CPU's.
    """
    settings = settings_of(device)
    torch.manual_seed(0)
    cpu, other = make(), make().to(device)
    other.load_state_dict(cpu.state_dict())
    precisions = {"fp32": lambda: full_precision(device), "auto": lambda: autocast(device, settings)}
    away = x.to(device), y.to(device)
    cpu.eval(), other.eval()
    attack = PGD(BALL, 5, "2/255", start="none")
    with full_precision(device):
        plain = Unfolded(BALL, 5, "2/255", start="none")(other, *away)
        elsewhere = float(((attack(other, *away) - plain).abs() > 1e-5).float().mean())
        with torch.no_grad():
            logits = cpu(x)
            worst = float((logits - other(away[0]).cpu()).abs().max() / logits.abs().max())

    def gained(objective: Objective, images: Tensor) -> float:
        with torch.no_grad():
            return float((objective(cpu(images), y, logits) - objective(logits, y, logits)).mean())

    rows, right = {}, worst < 1e-2 and elsewhere < 0.05
    for name, parts in DEFENSES.items():
        attack, _ = parts()
        x_adv = attack(cpu, x, y)
        gain = {"cpu": gained(attack.objective, x_adv)}
        for way, precision in precisions.items():
            attack.reseed(0)
            with precision():
                images = attack(other, *away).cpu()
            gain[way] = gained(attack.objective, images)
            right &= float((images - x).abs().max()) < attack.threat.eps + 1e-6 and gain[way] > 0.8 * gain["cpu"] > 0
        rows[name] = {"gained": gain}
        for extra, regularizers in EXTRAS.items():
            here = gradients(cpu, Defense(Given(x_adv), parts()[1], regularizers()), x, y)
            for way, precision in precisions.items():
                defense = Defense(Given(x_adv.to(device)), parts()[1], regularizers()).to(device)
                with precision():
                    there = gradients(other, defense, *away)
                found = {
                    "loss": float((there[0] - here[0]).abs() / here[0].abs()),
                    "cosine": float(nn.functional.cosine_similarity(there[1], here[1], dim=0)),
                }
                rows[name][f"{extra}, {way}"] = found
                loose = way == "auto" and "bf16" in settings.precision
                right &= found["loss"] < (0.05 if loose else 0.01) and found["cosine"] > (0.8 if loose else 0.99)
    unfolded = {"pixels elsewhere, folded or not": elsewhere}
    return {"logits, largest relative difference": worst, **unfolded, **rows, "right": bool(right)}


def gradients(net: nn.Module, defense: Defense, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a defense in train mode, and the gradients of all weights in one row; on the CPU, in float64."""
    defense.prepare(net, x[:2], y[:2])
    net.zero_grad()
    with buffers_kept(net):
        net.train()
        loss = defense(net, x, y).loss
        loss.backward()
        net.eval()
    found = [p.grad.flatten().double().cpu() for p in net.parameters() if p.grad is not None]
    return loss.detach().double().cpu(), torch.cat(found)


def loader_of(images: Tensor, labels: Tensor, batch: int) -> TensorLoader:
    return TensorLoader(images, labels, batch, shuffle=True, drop_last=True, augment=Augment(pad=4, flip=True))


def compiling(
    make: Callable[[], nn.Module], x: Tensor, y: Tensor, device: torch.device, rounds: int, small: bool
) -> dict[str, Any]:
    """A PGD-10 step with the attack's net as it is, and compiled in all ways that this device has."""
    attack, loss = DEFENSES["PGD-10"]()

    def step(way: str | None) -> Callable[[], object]:
        torch.manual_seed(0)
        trainer = Trainer(make(), Defense(attack, loss, compile_attack=way), device, settings_of(device))
        return lambda: trainer.step(x, y)

    found = compare(step, ("aot_eager",) if small and device.type == "cpu" else ways(device), 3 * rounds)
    print(f"{found}\n{found.advice()}")
    ratios = {way: ratio(found.times, way, AS_IT_IS) for way in found.times}
    return {"step_s": found.times, "ratio": ratios, "first_s": found.first, "failed": found.failed, "best": found.best}


def epochs(
    make: Callable[[], nn.Module],
    defense: str,
    images: Tensor,
    labels: Tensor,
    batch: int,
    device: torch.device,
    rounds: int,
    peak: float,
    way: str | None,
) -> list[dict[str, Any]]:
    """Seconds of an epoch with data and augmentation on the device, memory, and the share of a bf16 product's speed."""
    settings, parts = settings_of(device), DEFENSES[defense]
    loader, few = loader_of(images, labels, batch), loader_of(images[: 2 * batch], labels[: 2 * batch], batch)
    forward, inputs, weights = passes(make(), torch.rand(2, *images.shape[1:]))
    trainers, memory = {}, {}
    for extra, regularizers in EXTRAS.items():
        attack, loss = parts()
        trainers[extra] = Trainer(make(), Defense(attack, loss, regularizers(), compile_attack=way), device, settings)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainers[extra].epoch(few)  # warms up
        memory[extra] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    times = paired({extra: (lambda t=t: t.epoch(loader)) for extra, t in trainers.items()}, rounds, limit=120)
    k = 1 if defense == "N-FGSM" else 10
    both = defense == "TRADES"
    work = k * (forward + inputs) + both * forward + (1 + both) * (forward + inputs + weights)
    reached = work / 2 * len(loader) * batch / min(times["bare"])
    found = [
        {
            "extras": extra,
            "epoch_s": median(times[extra]),
            "rounds": len(times[extra]),
            "÷ bare": ratio(times, extra, "bare"),
            "memory_GB": memory[extra],
            "of a bf16 product": reached / peak if extra == "bare" else None,
        }
        for extra in EXTRAS
    ]
    for row in found:
        print(" | ".join(str(round(v, 3) if isinstance(v, float) else v) for v in row.values()))
    return found


def dashboards(make: Callable[[], nn.Module], images: Tensor, labels: Tensor, device: torch.device) -> float:
    """Seconds of one epoch's look with all panels of a default run; the first, which makes what lasts, is not counted."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", ["threat.eps=8/255"])
    n, more = cfg.probe.size, cfg.probe.training
    x, y = images[: n + more].float().cpu() / 255, labels[: n + more].cpu()
    names = [str(i) for i in range(10)]
    with tempfile.TemporaryDirectory() as folder:
        log = RunLog(Path(folder), ReportPage(Path(folder) / "report", "gpu"))
        panels = instantiate(cfg.panels, _convert_="all")
        ids = [str(i) for i in range(n)]
        dashboard = Dashboard(panels, x[:n], y[:n], ids, PGD(BALL, 20), names, training=(x[n:], y[n:]), log=log)
        net = make().to(device).eval()
        dashboard.look(net, device, {})
        return seconds(lambda: dashboard.look(net, device, {}))


def random_shards(folder: Path) -> str:
    """A folder of random images, in place of a data set."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for name, count in (("train", 400), ("test", 100)):
        images = random.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=np.arange(count) % 10)
    return str(folder)


def time_to(
    target: float,
    run: Path,
    path: str,
    device: torch.device,
    batch: int,
    most: int,
    small: bool,
    way: str | None,
    left: float,
) -> dict[str, Any] | None:
    """``train.py`` on TRADES, one cosine of ``most`` epochs: seconds of its training until PGD-20 on held-out images.

    Args:
        run: its run folder; where there is one already, it is resumed.
        left: seconds after which it is told to stop, to be resumed later; the answer is then None.
    """
    words = [f"resume={run}"]
    if not (run / "run.json").is_file():
        words = [
            *(f"out={run.parent}", f"name={run.name}", "data=arrays", f"data.path={path}", "defense=trades"),
            *("defense.attack.step_size=2/255", "regularizers=[]", "panels=[]", "health=off", "compare_undefended=false"),
            *("wandb.mode=disabled", f"data.batch_size={batch}", "data.on_device=true", f"trainer.max_epochs={most}"),
            *(
                "trainer.precision=auto",
                "channels_last=auto",
                f"trainer.accelerator={'cpu' if device.type == 'cpu' else 'gpu'}",
            ),
            *([f"+defense.compile_attack={way}"] if way else []),
            *(("network=small_cnn", "network.width=0.25", "data.train_limit=400", "data.test_limit=100") if small else ()),
            *(() if small else ("network=resnet18",)),
        ]
    cuts = json.loads((run / "cuts.json").read_text()) if (run / "cuts.json").is_file() else []
    if (run / "run.json").is_file():
        done = len(json.loads((run / "cost.json").read_text())["seconds"]) if (run / "cost.json").is_file() else 0
        cuts = sorted({*cuts, done} - {most})
        write_atomic(run / "cuts.json", json.dumps(cuts))
    begun = time.perf_counter()
    training = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT)
    try:
        status = training.wait(max(left, 1.0))
    except subprocess.TimeoutExpired:
        training.terminate()  # it finishes its step, and writes a checkpoint
        status = training.wait()
    if status in (EXIT_CODE, -signal.SIGTERM):  # the latter: before it listened
        return None
    if status != 0:
        raise RuntimeError(f"train.py ended with exit code {status}; its words are above")
    cost = json.loads((run / "cost.json").read_text())["seconds"]
    with (run / "metrics.csv").open() as file:
        judged = {int(row["epoch"]): row for row in csv.DictReader(file) if row.get("val/robust_acc")}
    history = [
        {"epoch": epoch, "seconds": spent} | {name: float(judged[epoch][f"val/{name}_acc"]) for name in ("clean", "robust")}
        for epoch, spent in enumerate(itertools.accumulate(cost))
    ]
    reached = next((row["seconds"] for row in history if row["robust"] >= target), None)
    wall = time.perf_counter() - begun
    print(f"{target:.0%} PGD-20: {reached or 'not reached in'} {'' if reached else history[-1]['seconds']} s of training")
    cut = f"resumed in epochs {cuts}: what was trained of these before is not counted" if cuts else "whole"
    return {"target": target, "seconds": reached, "epoch_s": median(cost), "wall_s": wall, "run": cut, "history": history}


def measure(
    items: Mapping[str, Callable[[], Any]], record: dict[str, Any], out: Path, until: float, again: bool = False
) -> list[str]:
    """Run the items that are not in the record yet, and write it after each; the names of those that are left.

    One that fails, say for lack of memory, is recorded under ``failed`` with the reason, keeps no other from running, and
    is tried once more only where ``again`` asks for that.
    """
    left = []
    failed = record.setdefault("failed", {})
    for name, item in items.items():
        if name in record["found"] or (name in failed and not again):
            continue
        if time.perf_counter() >= until:
            left.append(name)
            continue
        print(f"\n{name}", flush=True)
        failed.pop(name, None)
        try:
            found = item()
        except (RuntimeError, ValueError, OSError) as error:
            print(f"{name} failed: {error}", flush=True)
            failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        else:
            if found is None:
                left.append(name)
            else:
                record["found"][name] = found
        write_atomic(out, json.dumps(record, indent=1) + "\n")
    return left


def device_named(name: str) -> torch.device:
    """Raises argparse.ArgumentTypeError for another device than the CPU or a GPU that is here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cuda, cuda:N or cpu, found {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"torch finds {torch.cuda.device_count()} GPUs here, found {name}; --device cpu --small shows that the code runs"
        )
    return device


def between(low: float, high: float) -> Callable[[str], float]:
    """An argument that is a number above ``low`` and below ``high``."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low < value < high:
            raise argparse.ArgumentTypeError(f"expected a number above {low:g} and below {high:g}, found {text!r}")
        return value

    return number


def recorded(out: Path, of: dict[str, Any]) -> dict[str, Any]:
    """What earlier calls left in ``out``, or an empty record.

    Raises:
        ValueError: a place where no file can be, a file that is no record, or one of something else.
    """
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise ValueError(f"expected a file in a folder that is there, found {out}")
    if not out.is_file():
        return {"of": of, "found": {}, "failed": {}}
    try:
        record = json.loads(out.read_text())
    except ValueError as error:
        raise ValueError(f"{out} is no JSON ({error}); delete it or name another file") from error
    if not isinstance(record, dict) or not isinstance(record.get("found"), dict):
        raise ValueError(f"{out} is no record of this command; delete it or name another file")
    if record.get("of") != of:
        raise ValueError(f"{out} was measured with {record.get('of')}, now {of}; delete it or name another file")
    return record


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_named, default="cuda")
    parser.add_argument("--data", help="folder of train*.npz and test.npz")
    parser.add_argument("--small", action="store_true", help="a small net and a few images")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--batch", type=positive, default=128)
    parser.add_argument("--rounds", type=positive, default=3, help="at most; fewer where they take over two minutes")
    parser.add_argument("--compile", help="compile_attack in epochs and time_to, e.g. what compile found to pay")
    parser.add_argument("--target", type=between(0, 1), default=0.5, help="robust accuracy to reach")
    parser.add_argument("--epochs", type=positive, default=30, help="of the training that is to reach it")
    parser.add_argument(
        "--minutes", type=between(0, math.inf), default=6, help="after which nothing begins, so that a call stays below ten"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--again", action="store_true", help="try what failed once more")
    return parser


def main(argv: Iterable[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(None if argv is None else list(argv))
    until = time.perf_counter() + 60 * args.minutes
    device = args.device
    if args.compile is not None and args.compile not in allowed_ways():
        parser.error(f"--compile: expected one of {', '.join(allowed_ways())}; found {args.compile!r}")
    if args.data:
        try:
            everything, _, _ = Arrays(path=args.data).load()
        except (ValueError, OSError) as error:
            parser.error(f"argument --data: {error}")
        images, labels = everything.images, everything.labels
    else:
        count = 256 if args.small else 50_000
        images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(count) % 10
    images, labels = (images[:256], labels[:256]) if args.small else (images, labels)
    batch = min(args.batch, 64) if args.small else args.batch
    of = {
        "machine": machine(),
        "settings": str(settings_of(device)),
        "batch": batch,
        "images": len(images),
        "data": args.data,
        "small": args.small,
        "compile_attack": args.compile,
    }
    try:
        record = recorded(args.out, of)
    except (ValueError, OSError) as error:
        parser.error(f"argument --out: {error}")
    print(of)
    nets, on_device = networks(args.small), (images.to(device), labels.to(device))
    first = next(iter(nets))
    x, y = images[:32].float() / 255, labels[:32]
    step = on_device[0][:batch].float() / 255, on_device[1][:batch]
    peak = cache(lambda: matmul_rate(device, torch.bfloat16, 1 if args.small else 7))
    items: dict[str, Callable[[], Any]] = {}
    rounds = f"{args.rounds} rounds"
    for name, make in nets.items():
        items[f"correctness, {name}"] = lambda make=make: correctness(make, x, y, device)
        items[f"compile, {name}, {rounds}"] = lambda make=make: compiling(make, *step, device, args.rounds, args.small)
        for kind in DEFENSES:
            items[f"epochs, {name}, {kind}, {rounds}"] = lambda make=make, kind=kind: epochs(
                make, kind, *on_device, batch, device, args.rounds, peak(), args.compile
            )
    items["dashboards"] = lambda: dashboards(nets[first], images, labels, device)
    most = 2 if args.small else args.epochs
    run = args.out.resolve().with_suffix(f".{most}-epochs.run")
    path = args.data or (random_shards(args.out.resolve().with_suffix(".data")) if args.small else None)
    if path:
        items[f"time_to, {args.target:g} in {most} epochs"] = lambda: time_to(
            args.target, run, path, device, batch, most, args.small, args.compile, until - time.perf_counter()
        )
    order = sorted(items, key=lambda name: PARTS.index(name.split(",")[0]))
    order = [name for name in order if name.split(",")[0] in args.only]
    left = measure({name: items[name] for name in order}, record, args.out, until, args.again)
    found = record["found"]
    if "dashboards" in found and (rows := found.get(f"epochs, {first}, PGD-10, {rounds}")):
        print(f"\ndashboards: {100 * found['dashboards'] / rows[0]['epoch_s']:.1f} % of an epoch of {first}, PGD-10")
    if left:
        print(f"\nleft: {'; '.join(left)}.  The same command again goes on.")
    if failed := [name for name in order if name in record["failed"]]:
        print(f"\nfailed: {'; '.join(failed)}; see {args.out}.  --again tries them once more.")
    if wrong := [name for name in found if name.startswith("correctness") and not found[name]["right"]]:
        sys.exit(f"the device does not agree with the CPU: {'; '.join(wrong)}; see {args.out}")
    if left:
        sys.exit(EXIT_CODE)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
