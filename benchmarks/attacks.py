"""Our attacks against those of the packages: same nets, same images, equal budget; robust accuracy or median L2.

    python benchmarks/attacks.py RUN [RUN ...] [--images 100] [--steps 50] [--cw-images 20] [--norm linf]

RUN is a run folder (its best checkpoint) or a checkpoint in one; images: the test split, the classes in their shares.
PGD: 20 steps of 2.5 ε / 20 from one uniform start, on the cross-entropy.  APGD-CE and APGD-T: ``steps`` iterations, one
start, 9 targets.  C&W: 5 constants × ``steps`` for Foolbox and us, as many steps with its one constant for torchattacks; on
the images that are classified rightly; a failure counts as infinite.  "Same" is the share of images with the verdict of
ours; seconds are of the process, one thread.

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
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defenses.apgd import APGD, APGDT
from defenses.attacks import PGD
from defenses.minimum_norm import CarliniWagner
from defenses.robustness import fooled
from defenses.sampling import stratified_rows
from defenses.threat import L2, Linf, Threat, norms
from evaluate import located
from lightning_modules.networks.build import load_weights, make_network

Made = Callable[[Tensor, Tensor], Tensor]  # images, labels → adversarial images
SEARCH = 5


def bounded(net: nn.Module, threat: Threat, steps: int) -> Iterator[tuple[str, str, Made]]:
    """Attack, implementer, call; ours first."""
    linf, size = isinstance(threat, Linf), 2.5 * threat.eps / 20
    name = threat.name
    yield "PGD-20", "ours", lambda x, y: PGD(threat, 20)(net, x, y)
    if present("torchattacks"):
        import torchattacks

        kind = torchattacks.PGD if linf else torchattacks.PGDL2
        yield "PGD-20", "torchattacks", lambda x, y: kind(net, eps=threat.eps, alpha=size, steps=20)(x, y)
    if present("foolbox"):
        import foolbox

        pgd = (foolbox.attacks.LinfPGD if linf else foolbox.attacks.L2PGD)(abs_stepsize=size, steps=20)
        model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        yield "PGD-20", "Foolbox", lambda x, y: pgd(model, x, y, epsilons=threat.eps)[1]
    yield "APGD-CE", "ours", lambda x, y: APGD(threat, steps)(net, x, y)
    if present("torchattacks"):
        apgd = torchattacks.APGD(net, norm=name, eps=threat.eps, steps=steps)
        yield "APGD-CE", "torchattacks", lambda x, y: apgd(x, y)
    from pyautoattack import AutoAttack

    package = AutoAttack(net, norm=name, eps=threat.eps, seed=0)
    for attack in (package.apgd, package.apgd_targeted):
        attack.n_iter = attack.n_iter_orig = steps
        attack.n_iter_2, attack.n_iter_min = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1)
        attack.size_decr = max(int(0.03 * steps), 1)
    package.apgd.loss = "ce"
    yield "APGD-CE", "pyautoattack", lambda x, y: package.apgd.perturb(x, y)
    yield "APGD-T", "ours", lambda x, y: APGDT(threat, steps)(net, x, y)
    if present("torchattacks"):
        targeted = torchattacks.APGDT(net, norm=name, eps=threat.eps, steps=steps)
        yield "APGD-T", "torchattacks", lambda x, y: targeted(x, y)
    yield "APGD-T", "pyautoattack", lambda x, y: package.apgd_targeted.perturb(x, y)


def minimum(net: nn.Module, steps: int) -> Iterator[tuple[str, Made]]:
    yield "ours", lambda x, y: CarliniWagner(steps, SEARCH)(net, x, y)
    if present("torchattacks"):
        import torchattacks

        yield "torchattacks", lambda x, y: torchattacks.CW(net, c=1, steps=SEARCH * steps)(x, y)
    if present("foolbox"):
        import foolbox

        model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        carlini_wagner = foolbox.attacks.L2CarliniWagnerAttack(SEARCH, steps)
        yield "Foolbox", lambda x, y: carlini_wagner(model, x, y, epsilons=None)[1]


def present(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def timed(attack: Made, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    begin = time.process_time()
    return attack(x, y).detach(), time.process_time() - begin


def compare(run: str, args: argparse.Namespace) -> None:
    weights, config = located(run)
    if config is None:
        raise SystemExit(f"{run} lies in no run folder")
    cfg = OmegaConf.load(config)
    data = instantiate(cfg.data, _convert_="all")
    data.setup("fit")
    net = make_network(instantiate(cfg.network), data, bool(cfg.get("channels_last"))).eval()
    load_weights(net, weights)
    net.requires_grad_(False)  # for the packages that leave that to their callers
    rows = stratified_rows(data.test.labels, min(args.images, len(data.test)))
    x, y = data.test.images[rows].float() / 255, data.test.labels[rows]
    threat: Threat = Linf(cfg.budget.linf) if args.norm == "linf" else L2(cfg.budget.l2)
    right = net(x).argmax(1) == y
    title, ours = f"{config.parent.name}, {threat}", right
    print(f"| {title} | clean | | {100 * right.float().mean():.2f} % | | |", flush=True)
    for attack, by, made in bounded(net, threat, args.steps):
        x_adv, seconds = timed(made, x, y)
        standing = right & ~fooled(net, threat, x, x_adv, y)
        ours = standing if by == "ours" else ours
        same = "" if by == "ours" else f"{100 * (standing == ours).float().mean():.1f} %"
        share = f"{100 * standing.float().mean():.2f} %"
        print(f"| {title} | {attack} | {by} | {share} | {same} | {seconds:.1f} |", flush=True)
    x, y = x[right][: args.cw_images], y[right][: args.cw_images]
    for by, made in minimum(net, args.steps) if len(x) else ():
        x_adv, seconds = timed(made, x, y)
        length = torch.where(net(x_adv).argmax(1) != y, norms(x_adv - x, 2), torch.inf)
        ours = length if by == "ours" else ours
        shorter = "" if by == "ours" else f"ours shorter: {100 * (ours < length).float().mean():.0f} %"
        print(f"| {title} | C&W, {len(x)} images | {by} | {length.median():.4f} | {shorter} | {seconds:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cw-images", type=int, default=20)
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)  # of the packages, about tensors they read as numbers
    print(f"| net | attack | by | robust accuracy, or median L2 | same | seconds |\n{'|---' * 6}|", flush=True)
    for run in args.runs:
        compare(run, args)


if __name__ == "__main__":
    main()
