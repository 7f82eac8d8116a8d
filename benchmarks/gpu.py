"""Everything that a GPU has to show, in one command: right against the CPU, then fast, small, and robust.

    python benchmarks/gpu.py --data DIR              # .npz shards of CIFAR-10, as data=arrays data.path=DIR reads them
    python benchmarks/gpu.py                         # random images; without the time to a robust accuracy
    python benchmarks/gpu.py --device cpu --small    # the same code on a few images, to see that it runs

Writes a table as each part ends, and all of it as JSON.  Precision and layout are what ``auto`` chooses for the device.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.throughput import Unfolded, passes
from benchmarks.timing import machine, matmul_rate, paired, ratio, seconds, whole
from datamodules.arrays import Arrays
from datamodules.augment import Augment
from datamodules.loader import TensorLoader
from defenses.attacks import NFGSM, PGD
from defenses.defense import Defense
from defenses.evaluation import accuracy_under
from defenses.objectives import KLToClean
from defenses.regularizers import PSE, UnitSensitivity
from defenses.terms import AdversarialCE, CleanCE, Term, TradesKL
from defenses.threat import Linf
from interpret.views.page import ReportPage, write_atomic
from lightning_modules.callbacks.dashboard import Dashboard
from lightning_modules.hardware import Settings, suited
from lightning_modules.logging import RunLog
from lightning_modules.networks.resnet import ResNet, resnet18
from lightning_modules.networks.wide_resnet import wide_resnet
from lightning_modules.schedules import cosine

ROOT = Path(__file__).resolve().parents[1]
DATA: dict[str, Any] = {
    "num_classes": 10,
    "in_channels": 3,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.247, 0.2435, 0.2616),
}
BALL = Linf("8/255")
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

    def __init__(self, net: nn.Module, defense: Defense, device: torch.device, settings: Settings, total: int = 0) -> None:
        self.device, self.settings = device, settings
        self.net = net.to(device).train()
        if settings.channels_last:
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.defense = defense.to(device)
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True
        )
        self.schedule = cosine(self.optimizer, total) if total else None
        self.steps = 0

    def epoch(self, loader: TensorLoader, epoch: int = 0) -> None:
        for index, (x, y) in enumerate(loader):
            self.defense.at(epoch + index / len(loader), self.steps)
            with autocast(self.device, self.settings):
                loss = self.defense(self.net, x, y).loss
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()
            self.steps += 1
        self.defense.end_epoch()


def autocast(device: torch.device, settings: Settings) -> Any:
    return (
        torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if "bf16" in settings.precision else nullcontext()
    )


def correctness(
    make: Callable[[], nn.Module], x: Tensor, y: Tensor, device: torch.device, settings: Settings
) -> dict[str, Any]:
    """The same net on the CPU in fp32 and on the device: its logits, and how strong the attack is there."""
    torch.manual_seed(0)
    cpu, other = make().eval(), make().eval().to(device)
    other.load_state_dict(cpu.state_dict())
    attack = PGD(BALL, 5, "2/255", start="none")
    here, there = attack(cpu, x, y), attack(other, x.to(device), y.to(device)).cpu()
    plain = Unfolded(BALL, 5, "2/255", start="none")(other, x.to(device), y.to(device)).cpu()
    with autocast(device, settings):
        low = attack(other, x.to(device), y.to(device)).cpu()
    with torch.no_grad():
        logits, on_device = cpu(x), other(x.to(device)).cpu()
        gained = {
            name: float(nn.functional.cross_entropy(cpu(images), y) - nn.functional.cross_entropy(logits, y))
            for name, images in {"cpu": here, "device": there, "device unfolded": plain, "device, auto": low}.items()
        }
    worst = float((logits - on_device).abs().max() / logits.abs().max())
    outside = max(float((images - x).abs().max()) - BALL.eps for images in (there, low))
    right = worst < 1e-2 and outside < 1e-6 and min(gained.values()) > 0.9 * gained["cpu"] > 0
    return {"logits, largest relative difference": worst, "loss gained by the attack": gained, "right": right}


def loader_of(images: Tensor, labels: Tensor, batch: int) -> TensorLoader:
    return TensorLoader(images, labels, batch, shuffle=True, drop_last=True, augment=Augment(pad=4, flip=True))


def epochs(
    name: str, make: Callable[[], nn.Module], images: Tensor, labels: Tensor, batch: int, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """Seconds of an epoch with data and augmentation on the device, memory, and the share of a bf16 product's speed."""
    settings, found = suited("cpu" if device.type == "cpu" else "auto"), []
    loader = loader_of(images, labels, batch)
    few = loader_of(images[: 2 * batch], labels[: 2 * batch], batch)
    peak = matmul_rate(device, torch.bfloat16)
    forward, inputs, weights = passes(make(), torch.rand(2, *images.shape[1:]))
    for defense, parts in DEFENSES.items():
        trainers, memory = {}, {}
        for extra, regularizers in EXTRAS.items():
            attack, loss = parts()
            trainers[extra] = Trainer(make(), Defense(attack, loss, regularizers()), device, settings)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            trainers[extra].epoch(few)  # warms up
            memory[extra] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
        times = paired({extra: (lambda t=t: t.epoch(loader)) for extra, t in trainers.items()}, rounds)
        k = 1 if defense == "N-FGSM" else 10
        both = defense == "TRADES"
        work = k * (forward + inputs) + both * forward + (1 + both) * (forward + inputs + weights)
        reached = work / 2 * len(loader) * batch / min(times["bare"])
        for extra in EXTRAS:
            row = {
                "network": name,
                "defense": defense,
                "extras": extra,
                "epoch_s": sorted(times[extra])[rounds // 2],
                "÷ bare": ratio(times, extra, "bare"),
                "memory_GB": memory[extra],
                "of a bf16 product": reached / peak if extra == "bare" else None,
            }
            found.append(row)
            print(" | ".join(str(round(v, 3) if isinstance(v, float) else v) for v in row.values()), flush=True)
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


def time_to(target: float, data: Arrays, make: Callable[[], nn.Module], device: torch.device, most: int) -> dict[str, Any]:
    """TRADES for ``most`` epochs of one cosine: seconds of training until PGD-20 on held-out images reaches ``target``."""
    batch = 128
    loader = loader_of(data.train.images.to(device), data.train.labels.to(device), batch)
    held = [(x.to(device), y.to(device)) for x, y in data.val_dataloader()]
    attack, loss = DEFENSES["TRADES"]()
    settings = suited("cpu" if device.type == "cpu" else "auto")
    trainer = Trainer(make(), Defense(attack, loss), device, settings, total=most * len(loader))
    spent, history = 0.0, []
    for epoch in range(most):
        start = time.perf_counter()
        trainer.epoch(loader, epoch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent += time.perf_counter() - start
        found = accuracy_under(trainer.net, held, {"PGD-20": PGD(BALL, 20)}, device)
        history.append({"epoch": epoch, "seconds": spent, **found})
        print(f"epoch {epoch}: {spent:.0f} s, clean {found['clean']:.3f}, PGD-20 {found['PGD-20']:.3f}", flush=True)
        if found["PGD-20"] >= target:
            return {"target": target, "seconds": spent, "history": history}
    return {"target": target, "seconds": None, "history": history}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data", help="folder of train*.npz and test.npz")
    parser.add_argument("--small", action="store_true", help="a small net and a few images")
    parser.add_argument("--batch", type=whole, default=128)
    parser.add_argument("--rounds", type=whole, default=3)
    parser.add_argument("--target", type=float, default=0.5, help="robust accuracy to reach")
    parser.add_argument("--epochs", type=whole, default=30, help="at most, to reach it")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; --device cpu --small shows that the script runs")
    data = None
    if args.data:
        data = Arrays(path=args.data, train_limit=400 if args.small else None, batch_size=args.batch)
        data.setup("fit")
        images, labels = data.train.images, data.train.labels
    else:
        count = 256 if args.small else 50_000
        images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(count) % 10
    batch = min(args.batch, 64) if args.small else args.batch
    settings = suited("cpu" if device.type == "cpu" else "auto")
    print(f"{machine()}; {settings}, batch {batch}, {len(images)} images, {args.rounds} rounds")
    record: dict[str, Any] = {"machine": machine(), "settings": str(settings), "batch": batch, "images": len(images)}
    nets = networks(args.small)
    first = next(iter(nets.values()))
    x, y = images[:32].float() / 255, labels[:32]
    record["correctness"] = correctness(first, x, y, device, settings)
    print(record["correctness"])
    on_device = images.to(device), labels.to(device)
    print("\nnetwork | defense | extras | seconds an epoch | ÷ bare | GB | share of a bf16 product")
    record["epochs"] = []
    for name, make in nets.items():
        record["epochs"] += epochs(name, make, *on_device, batch, device, args.rounds)
        write_atomic(args.out, json.dumps(record, indent=1) + "\n")  # a net that does not fit loses nothing before it
    record["dashboards_s"] = dashboards(first, images, labels, device)
    bare = next(row["epoch_s"] for row in record["epochs"] if row["extras"] == "bare")
    record["dashboards_share"] = record["dashboards_s"] / bare
    print(f"\ndashboards: {record['dashboards_s']:.2f} s, {100 * record['dashboards_share']:.1f} % of the first row's epoch")
    write_atomic(args.out, json.dumps(record, indent=1) + "\n")
    if data is not None:
        record["time_to"] = time_to(args.target, data, first, device, 2 if args.small else args.epochs)
        write_atomic(args.out, json.dumps(record, indent=1) + "\n")
    if not record["correctness"]["right"]:
        sys.exit("the device does not agree with the CPU")


if __name__ == "__main__":
    main()
