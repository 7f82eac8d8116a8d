"""What interpretation costs: the regularisers beside a bare step, in time and memory, and the dashboards beside an epoch.

    python benchmarks/extras.py [--what step memory epoch profile] [--network resnet18]
        [--batch 64] [--steps 10] [--rounds 5]

The attack of a step is the same with and without regularisers, so it is timed once, and the rest of the step in pairs.
Random images and weights: the cost does not depend on them.  Precision and layout are what ``auto`` chooses here.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import machine, operators, paired, positive, ratio, rows, seconds, traced
from glassarmor.defenses.attacks.objectives import KLToClean
from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.monitoring.readings import Images, measure
from glassarmor.defenses.threat import Linf
from glassarmor.defenses.training.defense import Defense
from glassarmor.defenses.training.regularizers import PSE, CAMDiscrepancy, UnitSensitivity
from glassarmor.defenses.training.terms import AdversarialCE, CleanCE, MartBCE, MartKL, Term, TradesKL
from glassarmor.interpret.observation import feature_layers
from glassarmor.interpret.views.draw.figures import to_array, write_png
from glassarmor.interpret.views.page.page import ReportPage
from glassarmor.lightning_modules.callbacks.dashboard import Dashboard
from glassarmor.lightning_modules.networks.resnet import resnet18
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN
from glassarmor.lightning_modules.run.hardware import suited
from glassarmor.lightning_modules.run.log import RunLog

WHAT = ["step", "memory", "epoch", "profile"]
ROOT = Path(__file__).resolve().parents[1]
DATA: dict[str, Any] = {"num_classes": 10, "in_channels": 3, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
NETS: dict[str, Callable[[], nn.Module]] = {"resnet18": lambda: resnet18(**DATA), "small_cnn": lambda: SmallCNN(**DATA)}
BALL = Linf("8/255")
BASES: dict[str, Callable[[], dict[str, Term]]] = {
    "TRADES": lambda: {"clean_ce": CleanCE(), "kl": TradesKL()},
    "MART": lambda: {"bce": MartBCE(), "kl": MartKL()},
    "PGD-AT": lambda: {"ce": AdversarialCE()},
}
EXTRAS: dict[str, Callable[[], dict[str, Term]]] = {
    "bare": dict,
    "+ PSE, sensitivity": lambda: {"pse": PSE(), "sensitivity": UnitSensitivity()},
    "+ PSE alone": lambda: {"pse": PSE()},
    "+ sensitivity alone": lambda: {"sensitivity": UnitSensitivity()},
    "+ CAM discrepancy": lambda: {"cam": CAMDiscrepancy()},
    "+ PSE at layer2": lambda: {"pse": PSE(layers=["layer2"])},  # needs gradients inside the net
}


class Given:
    """In place of an attack: images that are there already."""

    threat = BALL

    def __init__(self, x_adv: Tensor) -> None:
        self.x_adv = x_adv

    def reseed(self, call: int) -> None:
        pass

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.x_adv[: len(x)]


class Peak(TorchDispatchMode):
    """Bytes of all tensors that are alive at the same time, at most; those of ``kept`` count from the beginning."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()
        for tensor in kept:
            self._count(tensor)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result


class Bench:
    """A network as ``auto`` would train it, and its batch."""

    def __init__(self, network: str, batch: int) -> None:
        torch.manual_seed(0)
        self.settings = suited("cpu")
        self.net = NETS[network]()
        if self.settings.channels_last:
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.x, self.y = torch.rand(batch, 3, 32, 32), torch.arange(batch) % 10
        self.x_adv = (self.x + 0.03 * torch.randn_like(self.x).sign()).clamp(0, 1)

    def autocast(self) -> torch.autocast:
        low = self.settings.precision != "32-true"
        return torch.autocast("cpu", torch.bfloat16, enabled=low, cache_enabled=False)

    def attack(self, steps: int, base: str) -> PGD:
        return PGD(BALL, steps, **({"start": "gaussian", "objective": KLToClean()} if base == "TRADES" else {}))

    def step(self, attack: Any, base: str, extra: str) -> tuple[Callable[[], None], list[Tensor]]:
        """One step, run once before, and the tensors that outlive it."""
        net = copy.deepcopy(self.net).train()
        defense = Defense(attack, BASES[base](), EXTRAS[extra]())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)

        def run() -> None:
            with self.autocast():
                loss = defense(net, self.x, self.y).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        run()  # of the whole batch: folding compares logits when it first sees one so large
        momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        return run, [*net.parameters(), *net.buffers(), *momenta, *grads, self.x, self.y]


def steps(bench: Bench, network: str, attack_steps: int, rounds: int) -> None:
    for base in BASES:
        extras = [name for name in EXTRAS if "layer" not in name or network == "resnet18"]
        runs = {name: bench.step(Given(bench.x_adv), base, name)[0] for name in extras}
        attack, net = bench.attack(attack_steps, base), copy.deepcopy(bench.net).train()

        def attacked(attack: PGD = attack, net: nn.Module = net) -> None:
            with bench.autocast():
                attack(net, bench.x, bench.y)

        attacked()  # warms up
        times = paired({"attack": attacked, **runs}, rounds)
        whole = {name: [a + b for a, b in zip(times["attack"], times[name], strict=True)] for name in extras}
        print(f"\n{base}, whole step\n\n{rows(whole, 'bare', len(bench.x))}\n")
        print(f"{base}, without its attack\n\n{rows({name: times[name] for name in ('attack', *extras)}, 'bare')}\n")
        added = 100 * (ratio(whole, "+ PSE, sensitivity", "bare") - 1)
        print(f"{base}: PSE and sensitivity add {added:.1f} % to the step", end="")
        if base == "PGD-AT":
            share = ratio(times, "+ PSE, sensitivity", "bare") - 1
            print(f", {share:.2f} times the bare step's own forward and backward", end="")
        print()


def profiled(bench: Bench) -> None:
    """Where the time of a step goes, its attack left out, bare and with PSE and sensitivity."""
    for base in BASES:
        runs = {name: bench.step(Given(bench.x_adv), base, name)[0] for name in ("bare", "+ PSE, sensitivity")}
        print(f"\n{base}, a step without its attack\n\n{operators(traced(runs))}")


def memory(bench: Bench, network: str) -> None:
    print("\n| | peak of tensors, MB | ÷ bare |\n|---|---|---|")
    for base in BASES:
        bare = 0
        for name in EXTRAS:
            if "layer" in name and network != "resnet18":
                continue
            run, kept = bench.step(bench.attack(2, base), base, name)
            with Peak(kept) as peak:
                run()
            bare = bare or peak.most
            print(f"| {base} {name} | {peak.most / 1e6:.0f} | {peak.most / bare:.2f} |")


def epoch(bench: Bench, attack_steps: int, rounds: int, images: int = 50_000) -> None:
    """Seconds of each panel, as in training (probe of 32 images, PGD-20), and of the health, beside those of an epoch."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", ["threat.eps=8/255"])
    panels = instantiate(cfg.panels, _convert_="all")
    n = cfg.probe.size
    x, y = torch.rand(n, 3, 32, 32), torch.arange(n) % 10
    training = torch.rand(cfg.probe.training, 3, 32, 32), torch.arange(cfg.probe.training) % 10
    ids, names = [f"image-{i}" for i in range(n)], [str(i) for i in range(10)]
    net = copy.deepcopy(bench.net).eval()
    attack = PGD(BALL, 20)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        log = RunLog(Path(folder), ReportPage(Path(folder) / "report", "extras"))
        dashboard = Dashboard(panels, x, y, ids, attack, names, training=training, log=log)
        device = torch.device("cpu")
        dashboard.look(net, device, {})  # what is made once a run is made now
        views = []

        def draw() -> None:
            views.extend(dashboard.look(net, device, {}))

        def write() -> None:
            log.epoch(0, 0, {}, views)
            for view in views:
                if view.drawing is not None:
                    write_png(to_array(view.drawing), Path(folder) / f"{view.name}.png")

        shown = dashboard.shown.prepared(net)
        for name, panel in shown.panels.items():
            alone = replace(shown, panels={name: panel})
            found[name] = seconds(partial(alone.views, net, device, {}))
        none = replace(shown, panels={})
        found["attack and observation"] = seconds(lambda: none.views(net, device, {}))
        for name in shown.panels:
            found[name] -= found["attack and observation"]
        everything = seconds(draw)
        found["page and pictures"] = seconds(write)
        everything += found["page and pictures"]
    # Thorough every tenth time: nine of ten readings are the short ones.
    held_out = Images(x.repeat(2, 1, 1, 1), y.repeat(2), (training[0][:128], training[1][:128]))
    layers = feature_layers(net, x)
    measure(net, held_out, BALL, layers, thorough=True)  # warms up
    short, long = (
        seconds(lambda thorough=thorough: measure(net, held_out, BALL, layers, thorough=thorough))
        for thorough in (False, True)
    )
    found["health, a reading of 64 images"] = 0.9 * short + 0.1 * long
    everything += found["health, a reading of 64 images"]
    run, _ = bench.step(bench.attack(attack_steps, "PGD-AT"), "PGD-AT", "bare")
    step = sorted(seconds(run) for _ in range(rounds))[rounds // 2]
    whole = step * images / len(bench.x)
    print("\n| of an epoch's dashboards and health | seconds |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.2f} |")
    print(f"| all | {everything:.2f} |\n")
    print(
        f"An epoch of {images} images, PGD-{attack_steps} in steps of {len(bench.x)}: {step:.2f} s a step, {whole:.0f} s; "
        f"dashboards and health add {100 * everything / whole:.1f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT[:3])
    parser.add_argument("--network", choices=list(NETS), default="resnet18")
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--steps", type=positive, default=10)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.network, args.batch)
    print(f"{machine()}; {args.network}, batch {args.batch}, PGD-{args.steps}, {args.rounds} rounds, {bench.settings}")
    if "step" in args.what:
        steps(bench, args.network, args.steps, args.rounds)
    if "memory" in args.what:
        memory(bench, args.network)
    if "epoch" in args.what:
        epoch(bench, args.steps, args.rounds)
    if "profile" in args.what:
        profiled(bench)


if __name__ == "__main__":
    main()
