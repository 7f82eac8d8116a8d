"""Our attacks against those of the packages: same nets, same images, equal budget; robust accuracy, or length and accuracy.

    python benchmarks/attacks.py RUN [RUN ...] [--norm l2] [--images 100] [--seeds 3] [--steps 50] [--cw-images 20]

RUN is a run folder (its best checkpoint) or a checkpoint in one.  Each seed takes other images of the test split, the
classes in their shares, and other random starts.  PGD: 20 steps of 2.5 ε / 20 from one uniform start, on the cross-entropy.
APGD-CE and APGD-T: ``steps`` iterations, one start, 9 targets.  C&W (with --norm l2): 5 constants × ``steps``, searched by
Foolbox and us; torchattacks has no search, so that it is run with ``steps`` for each of 0.1, 1, 10, 100, 1000 and the
shortest success counts; on images that are classified rightly, a failure counts as infinitely far.

Robust accuracy: of all images of all seeds, and by seed.  "Same" is the share of images with the verdict of ours; "only
ours" and "only it" are the images that one of both fells.  Seconds are of the process, one thread, summed over the seeds.

Packages that are not importable are left out.  To have them: pip install --target DIR --no-deps torchattacks==3.5.1
foolbox==3.3.4 eagerpy typing-extensions requests urllib3 idna charset-normalizer certifi GitPython gitdb smmap scipy, then
PYTHONPATH=DIR.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glassarmor.defenses.attacks.apgd import APGD, APGDT
from glassarmor.defenses.attacks.minimum_norm import CarliniWagner
from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.evaluation.inputs import fooled
from glassarmor.defenses.evaluation.sampling import stratified_rows
from glassarmor.defenses.threat import L2, Linf, Threat, norms
from glassarmor.lightning_modules.commands.subject import located
from glassarmor.lightning_modules.networks.build import load_weights, make_network

Made = Callable[[Tensor, Tensor], Tensor]  # images, labels → adversarial images
CONSTANTS = (0.1, 1.0, 10.0, 100.0, 1000.0)  # as many as the others search


def bounded(net: nn.Module, threat: Threat, steps: int, seed: int) -> Iterator[tuple[str, str, Made]]:
    """Attack, implementer, call; ours first."""
    linf, size = isinstance(threat, Linf), 2.5 * threat.eps / 20
    name = threat.name
    yield "PGD-20", "ours", lambda x, y: PGD(threat, 20, seed=seed)(net, x, y)
    if present("torchattacks"):
        import torchattacks

        kind = torchattacks.PGD if linf else torchattacks.PGDL2
        yield "PGD-20", "torchattacks", lambda x, y: kind(net, eps=threat.eps, alpha=size, steps=20)(x, y)
    if present("foolbox"):
        import foolbox

        pgd = (foolbox.attacks.LinfPGD if linf else foolbox.attacks.L2PGD)(abs_stepsize=size, steps=20)
        model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        yield "PGD-20", "Foolbox", lambda x, y: pgd(model, x, y, epsilons=threat.eps)[1]
    yield "APGD-CE", "ours", lambda x, y: APGD(threat, steps, seed=seed)(net, x, y)
    if present("torchattacks"):
        apgd = torchattacks.APGD(net, norm=name, eps=threat.eps, steps=steps, seed=seed)
        yield "APGD-CE", "torchattacks", lambda x, y: apgd(x, y)
    from pyautoattack import AutoAttack

    package = AutoAttack(net, norm=name, eps=threat.eps, seed=seed)
    for attack in (package.apgd, package.apgd_targeted):
        attack.n_iter = attack.n_iter_orig = steps
        attack.n_iter_2, attack.n_iter_min = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1)
        attack.size_decr = max(int(0.03 * steps), 1)
    package.apgd.loss = "ce"
    yield "APGD-CE", "pyautoattack", lambda x, y: package.apgd.perturb(x, y)
    yield "APGD-T", "ours", lambda x, y: APGDT(threat, steps, seed=seed)(net, x, y)
    if present("torchattacks"):
        targeted = torchattacks.APGDT(net, norm=name, eps=threat.eps, steps=steps, seed=seed)
        yield "APGD-T", "torchattacks", lambda x, y: targeted(x, y)
    yield "APGD-T", "pyautoattack", lambda x, y: package.apgd_targeted.perturb(x, y)


def minimum(net: nn.Module, steps: int) -> Iterator[tuple[str, Made]]:
    yield "ours", lambda x, y: CarliniWagner(steps, len(CONSTANTS))(net, x, y)
    if present("torchattacks"):
        import torchattacks

        def shortest(x: Tensor, y: Tensor) -> Tensor:
            tried = torch.stack([torchattacks.CW(net, c=c, steps=steps)(x, y) for c in CONSTANTS])
            best = torch.stack([distances(net, x, x_adv, y) for x_adv in tried]).argmin(0)
            return tried[best, torch.arange(len(x))]

        yield "torchattacks", shortest
    if present("foolbox"):
        import foolbox

        model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        carlini_wagner = foolbox.attacks.L2CarliniWagnerAttack(len(CONSTANTS), steps)
        yield "Foolbox", lambda x, y: carlini_wagner(model, x, y, epsilons=None)[1]


def distances(net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    """L2 length of each change, (N,); ∞ where the answer is still right."""
    return torch.where(net(x_adv).argmax(1) != y, norms(x_adv - x, 2), torch.inf)


def present(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def timed(attack: Made, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    begin = time.process_time()
    return attack(x, y).detach(), time.process_time() - begin


@dataclass
class Found:
    """What one implementation of one attack did, over the seeds: who stands, how far away, in how many seconds."""

    standing: list[Tensor] = field(default_factory=list)  # a seed: (n,) bool
    lengths: list[Tensor] = field(default_factory=list)  # a seed: (n,), of minimum-norm attacks
    seconds: float = 0.0

    def row(self, ours: Found) -> str:
        mine, theirs = torch.cat(ours.standing), torch.cat(self.standing)
        by_seed = ", ".join(f"{100 * each.double().mean():.1f}" for each in self.standing)
        cells = [f"{100 * theirs.double().mean():.2f} %", by_seed, "", "", "", f"{self.seconds:.1f}"]
        if self is not ours:
            only = (f"{int((theirs & ~mine).sum())}", f"{int((mine & ~theirs).sum())}")
            cells[2:5] = [f"{100 * (mine == theirs).double().mean():.1f} %", *only]
        if self.lengths:
            a, b = torch.cat(ours.lengths), torch.cat(self.lengths)
            cells[0] += f", median L2 {b.median():.4f}"
            if self is not ours:
                cells[2] += f"; ours shorter on {100 * (a < b).double().mean():.0f} %"
        return " | ".join(cells)


def compare(run: str, args: argparse.Namespace) -> None:
    weights, config = located(run)
    if config is None:
        raise SystemExit(f"{run} lies in no run folder")
    cfg = OmegaConf.load(config)
    data = instantiate(cfg.data, _convert_="all")
    data.setup("fit")
    net = make_network(instantiate(cfg.network), data, False).eval()  # torchattacks' PGD in L2 wants contiguous gradients
    load_weights(net, weights)
    net.requires_grad_(False)  # for the packages that leave that to their callers
    threat: Threat = Linf(cfg.budget.linf) if args.norm == "linf" else L2(cfg.budget.l2)
    found: dict[tuple[str, str], Found] = {}
    clean = Found()
    for seed in range(args.seeds):
        rows = stratified_rows(data.test.labels, min(args.images, len(data.test)), seed)
        x, y = (data.test.images[rows].float() / 255).contiguous(), data.test.labels[rows]
        right = net(x).argmax(1) == y
        clean.standing.append(right)
        for attack, by, made in bounded(net, threat, args.steps, seed):
            torch.manual_seed(seed)  # torchattacks' and Foolbox's PGD draw from the global generator
            x_adv, seconds = timed(made, x, y)
            one = found.setdefault((attack, by), Found())
            one.standing.append(right & ~fooled(net, threat, x, x_adv, y))
            one.seconds += seconds
        x, y = x[right][: args.cw_images], y[right][: args.cw_images]
        for by, made in minimum(net, args.steps) if args.norm == "l2" and len(x) else ():
            x_adv, seconds = timed(made, x, y)
            one = found.setdefault(("C&W", by), Found())
            one.lengths.append(distances(net, x, x_adv, y))
            one.standing.append(one.lengths[-1] > threat.eps)
            one.seconds += seconds
    title = f"{config.parent.name}, {threat}"
    print(f"| {title} | clean | | {clean.row(clean)} |")
    for (attack, by), one in found.items():
        count = sum(len(each) for each in one.standing)
        print(f"| {title} | {attack}, {count} images | {by} | {one.row(found[attack, 'ours'])} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cw-images", type=int, default=20)
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)  # of the packages, about tensors they read as numbers
    columns = "net", "attack", "by", "robust accuracy", "by seed", "same", "only ours", "only it", "seconds"
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for run in args.runs:
        compare(run, args)


if __name__ == "__main__":
    main()
