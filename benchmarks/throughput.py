"""Robust training of a ResNet-18 against the same training driven by other libraries, paired in one process.

    python benchmarks/throughput.py [--what step attack trades folding few profile layers optimizer] [--peers ART …]
        [--batch 64] [--steps 10] [--rounds 3] [--threads 1]

Of ours alone: what folding gains in an attack, and where it takes few gradients of few images; where an attack's time goes,
by operator, and layer by layer beside what torch could do for each; ways to make an optimiser's step.

Each library as its users run it, fp32 in torch's own layout, and again in bf16 with channels last (autocast around it).
Peers are found by import; where one is absent its rows are left out.  They go into a folder of their own:

    pip install --target DIR --no-deps torchattacks==3.5.1 foolbox==3.3.4 eagerpy==0.30.0 GitPython gitdb smmap \\
        adversarial-robustness-toolbox==1.20.1 six secml-torch==1.5
    PYTHONPATH=DIR python benchmarks/throughput.py

Random images and weights: the cost does not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import Times, machine, matmul_rate, operators, paired, positive, ratio, rows, shares, traced, version
from glassarmor.defenses.attacks.objectives import KLToClean
from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.threat import Linf
from glassarmor.defenses.training.defense import Defense
from glassarmor.defenses.training.terms import AdversarialCE, CleanCE, TradesKL
from glassarmor.interpret.network.folding import foldable, folded
from glassarmor.lightning_modules.networks.resnet import resnet18
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN

WHAT = ["step", "attack", "trades", "folding", "few", "profile", "layers", "optimizer"]
FEW = ((1, 1), (1, 4), (1, 8), (1, 16), (1, 32), (2, 1), (3, 1), (4, 1))  # gradients, images
EPS, STEP = 8 / 255, 2 / 255
IMAGES: dict[str, Any] = {"in_channels": 3, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
Run = Callable[[Tensor, Tensor], object]


class Unfolded(PGD):
    """PGD on the net as it is: what folding gains is counted apart."""

    def _lightened(self, net: nn.Module, x: Tensor) -> AbstractContextManager[nn.Module]:
        return nullcontext(net)


class Folded(PGD):
    """PGD on the folded net, also where folding is known not to pay."""

    def _lightened(self, net: nn.Module, x: Tensor) -> AbstractContextManager[nn.Module]:
        return folded(net, x)


def optimizer_of(net: nn.Module, fused: bool = False) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=fused or None)


def learn(net: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# --- The same training, five times: each returns one step, or the attack alone ---------------------------------------


def ours(net: nn.Module, steps: int, train: bool, attack: type[PGD] = PGD) -> Run:
    pgd = attack(Linf(EPS), steps, STEP)
    defense, optimizer = Defense(pgd, {"ce": AdversarialCE()}), optimizer_of(net, fused=True)
    return (lambda x, y: learn(net, optimizer, defense(net, x, y).loss)) if train else (lambda x, y: pgd(net, x, y))


def torchattacks(net: nn.Module, steps: int, train: bool) -> Run:
    from torchattacks import PGD as Attack

    attack, optimizer = Attack(net, eps=EPS, alpha=STEP, steps=steps), optimizer_of(net)

    def step(x: Tensor, y: Tensor) -> None:
        x_adv = attack(x, y)
        net.train()
        learn(net, optimizer, F.cross_entropy(net(x_adv), y))

    return step if train else attack


def foolbox(net: nn.Module, steps: int, train: bool) -> Run:
    from foolbox import PyTorchModel
    from foolbox.attacks import LinfPGD

    attack, optimizer = LinfPGD(abs_stepsize=STEP, steps=steps), optimizer_of(net)

    def run(x: Tensor, y: Tensor) -> Tensor:
        _, x_adv, _ = attack(PyTorchModel(net.eval(), bounds=(0, 1), device="cpu"), x, y, epsilons=EPS)
        return x_adv

    def step(x: Tensor, y: Tensor) -> None:
        x_adv = run(x, y)
        net.train()
        learn(net, optimizer, F.cross_entropy(net(x_adv), y))

    return step if train else run


class Float(nn.Module):
    """ART hands logits to numpy, which knows no bf16."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits.float()


def art(net: nn.Module, steps: int, train: bool) -> Run:
    from art.defences.trainer import AdversarialTrainerMadryPGD
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        Float(net), nn.CrossEntropyLoss(), (3, 32, 32), 10, optimizer_of(net), clip_values=(0, 1), device_type="cpu"
    )
    trainer = AdversarialTrainerMadryPGD(classifier, eps=EPS, eps_step=STEP, max_iter=steps)
    trainer.attack.set_params(verbose=False)

    def run(x: Tensor, y: Tensor) -> None:
        trainer.attack.set_params(batch_size=len(x))
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            if train:
                trainer.fit(x.numpy(), y.numpy(), nb_epochs=1, batch_size=len(x))
            else:
                trainer.attack.generate(x.numpy(), y.numpy())

    return run


def secml(net: nn.Module, steps: int, train: bool) -> Run:
    from secmlt.adv.backends import Backends
    from secmlt.adv.evasion.pgd import PGD as Attack
    from secmlt.defenses.adv_training.pytorch.adversarial_trainer import AdversarialTrainer
    from secmlt.models.pytorch.base_pytorch_nn import BasePyTorchClassifier
    from torch.utils.data import DataLoader, TensorDataset

    attack = Attack("linf", EPS, steps, STEP, random_start=True, backend=Backends.NATIVE)
    trainer = AdversarialTrainer(optimizer_of(net), epochs=1)

    def run(x: Tensor, y: Tensor) -> None:
        batches = DataLoader(TensorDataset(x, y), batch_size=len(x))
        if train:
            trainer.train(net, batches, attack)
        else:
            attack(BasePyTorchClassifier(net.eval()), batches)

    return run


PEERS: dict[str, tuple[Callable[..., Run], str]] = {
    "torchattacks": (torchattacks, "torchattacks"),
    "Foolbox": (foolbox, "foolbox"),
    "ART": (art, "adversarial-robustness-toolbox"),
    "secml-torch": (secml, "secml-torch"),
}


# --- TRADES ----------------------------------------------------------------------------------------------------------


def our_trades(net: nn.Module, steps: int, attack: type[PGD] = PGD) -> Run:
    pgd = attack(Linf(EPS), steps, STEP, start="gaussian", objective=KLToClean())
    defense, optimizer = Defense(pgd, {"ce": CleanCE(), "kl": TradesKL(6)}), optimizer_of(net, fused=True)
    return lambda x, y: learn(net, optimizer, defense(net, x, y).loss)


def published_trades(net: nn.Module, steps: int) -> Run:
    """The order of passes of the released TRADES loop, written anew: 2 K + 3 forwards, K + 3 backwards.

    The clean logits are computed again in each attack step, and once more for the robust term of the loss.
    """
    optimizer = optimizer_of(net)

    def divergence(images: Tensor, x: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(net(images), 1), F.softmax(net(x), 1), reduction="sum")

    def step(x: Tensor, y: Tensor) -> None:
        net.eval()
        x_adv = x + 0.001 * torch.randn_like(x)
        for _ in range(steps):
            x_adv.requires_grad_()
            (gradient,) = torch.autograd.grad(divergence(x_adv, x), [x_adv])
            moved = x_adv.detach() + STEP * gradient.sign()
            x_adv = torch.clamp(torch.min(torch.max(moved, x - EPS), x + EPS), 0, 1)
        net.train()
        loss = F.cross_entropy(net(x), y) + 6 * divergence(x_adv, x) / len(x)
        learn(net, optimizer, loss)

    return step


# --- Measuring -------------------------------------------------------------------------------------------------------


@contextmanager
def low_precision(low: bool) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        yield


def bound(make: Callable[[nn.Module], Run], net: nn.Module, low: bool, x: Tensor, y: Tensor) -> Callable[[], object]:
    """One run on a net of its own, after a first, in which folding looks at a batch so large, and what lasts is made."""
    own = copy.deepcopy(net)
    run = make(own.to(memory_format=torch.channels_last) if low else own)  # type: ignore[call-overload]

    def once() -> None:
        with low_precision(low):
            run(x, y)

    once()
    return once


def passes(net: nn.Module, x: Tensor) -> tuple[float, float, float]:
    """FLOP of a forward, of the gradient of the images, of the gradients of the weights, over this batch."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as forward:
        net(x)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    with FlopCounterMode(display=False) as inputs:
        net(x.clone().requires_grad_()).sum().backward()
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    with FlopCounterMode(display=False) as everything:
        net(x.clone().requires_grad_()).sum().backward()
    first, second, third = (float(mode.get_total_flops()) for mode in (forward, inputs, everything))
    return first, second - first, third - second


def compare(what: str, peers: list[str], net: nn.Module, x: Tensor, y: Tensor, steps: int, rounds: int) -> Times:
    runs: dict[str, Callable[[], object]] = {}
    train = what == "step"

    def add(name: str, make: Callable[[nn.Module], Run], low: bool) -> None:
        runs[f"{name}, {'bf16 channels last' if low else 'fp32'}"] = bound(make, net, low, x, y)

    for low in (True, False):
        if what == "trades":
            add("ours", lambda own: our_trades(own, steps), low)
            add("ours unfolded", lambda own: our_trades(own, steps, Unfolded), low)
            add("published loop", lambda own: published_trades(own, steps), low)
            continue
        add("ours", lambda own: ours(own, steps, train), low)
        add("ours unfolded", lambda own: ours(own, steps, train, Unfolded), low)
        for name in peers:
            make, package = PEERS[name]
            if version(package) == "absent":
                print(f"{name} is not installed: its rows are left out")
                continue
            add(f"{name} {version(package)}", lambda own, make=make: make(own, steps, train), low)
    return paired(runs, rounds)


# --- Where the rest is ------------------------------------------------------------------------------------------------


def relus_kept(net: nn.Module) -> nn.Module:
    """Its ReLUs have hooks now, so that folding leaves them as they are."""
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda *_: None)
    return net


def folding(net: nn.Module, x: Tensor, y: Tensor, steps: int, rounds: int) -> str:
    """The attack on the net as it is, with BatchNorm folded, and with ReLUs in place as well; the new weights alone."""
    runs: dict[str, Callable[[], object]] = {}
    for low in (True, False):
        kind = "bf16 channels last" if low else "fp32"
        runs[f"as it is, {kind}"] = bound(lambda own: ours(own, steps, False, Unfolded), net, low, x, y)
        runs[f"BatchNorm folded, {kind}"] = bound(lambda own: ours(relus_kept(own), steps, False), net, low, x, y)
        runs[f"ReLUs in place too, {kind}"] = bound(lambda own: ours(own, steps, False), net, low, x, y)
        runs[f"the new weights alone, {kind}"] = bound(weights_alone, net, low, x, y)
    return rows(paired(runs, rounds), "ReLUs in place too, bf16 channels last")


def weights_alone(net: nn.Module) -> Run:
    def run(x: Tensor, y: Tensor) -> None:
        with folded(net.eval(), x):
            pass

    return run


def few(nets: dict[str, nn.Module], rounds: int) -> str:
    """A Markdown table: the time of an attack on the folded net over that on the net as it is, in fp32 and in bf16."""
    heads, rule = "| fp32 / bf16 |", "| values that BatchNorms make of an image, weights scaled |"
    lines = [f"| {steps} gradient{'s' * (steps > 1)} of {images} image{'s' * (images > 1)} |" for steps, images in FEW]
    for name, net in nets.items():
        image = torch.rand(2, 3, 32, 32)
        found = foldable(copy.deepcopy(net).eval(), image)
        heads, rule = f"{heads} {name} |", f"{rule} {found.share * image[0].numel():,.0f}, {found.weights:,} |"
        for row, (steps, images) in enumerate(FEW):
            x, y = torch.rand(images, 3, 32, 32), torch.arange(images) % 10
            ratios = []
            for low in (False, True):
                runs = {
                    kind.__name__: bound(lambda own, kind=kind: ours(own, steps, False, kind), net, low, x, y)  # noqa: B023
                    for kind in (Unfolded, Folded)
                }
                ratios.append(ratio(paired(runs, rounds), "Folded", "Unfolded"))
            lines[row] += f" {ratios[0]:.2f} / {ratios[1]:.2f} |"
    return "\n".join([heads, "|---" * (1 + len(nets)) + "|", rule, *lines])


def convolutions(net: nn.Module, x: Tensor) -> Counter[tuple[int, ...]]:
    """How often each kind runs: channels in and out, kernel, stride, height of its input."""
    found: Counter[tuple[int, ...]] = Counter()

    def note(conv: nn.Conv2d, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        found[conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], inputs[0].shape[-1]] += 1

    handles = [conv.register_forward_hook(note) for conv in net.modules() if isinstance(conv, nn.Conv2d)]
    with torch.no_grad():
        net(x[:1])
    for handle in handles:
        handle.remove()
    return found


def convolved(image: Tensor, weight: Tensor, stride: int) -> dict[str, Callable[[], Tensor]]:
    """A convolution's passes as an attack runs them, and as torch could (packed and fused: what its compiler emits)."""
    pad = weight.shape[-1] // 2
    place = [pad, pad], [stride, stride], [1, 1], 1
    gradient = F.conv2d(image, weight, None, stride, pad)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *place, list(image.shape))
    fused = torch.ops.mkldnn._convolution_pointwise
    turned = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)

    def backward() -> Tensor:
        found: Tensor = torch.ops.aten.convolution_backward(
            gradient, image, weight, None, *reversed(place[:2]), [1, 1], False, [0, 0], 1, [True, False, False]
        )[0]
        return found

    return {
        "forward": lambda: F.conv2d(image, weight, None, stride, pad),
        "weights packed before": lambda: fused(image, packed, None, *place, "none", [], ""),
        "and ReLU fused": lambda: fused(image, packed, None, *place, "relu", [], ""),
        "gradient of the input": backward,
        "by turned weights": backward if stride > 1 else lambda: F.conv2d(gradient, turned, None, 1, pad),
    }


def layers(net: nn.Module, x: Tensor, rounds: int) -> str:
    """A Markdown table: milliseconds of each kind of convolution in bf16, channels last, times how often it runs."""
    total: Counter[str] = Counter()
    lines: list[str] = []
    for (inside, out, size, stride, height), often in convolutions(net, x).items():
        image, weight = (
            torch.randn(shape).to(torch.bfloat16, memory_format=torch.channels_last)
            for shape in ((len(x), inside, height, height), (out, inside, size, size))
        )
        runs = convolved(image, weight, stride)
        for run in runs.values():
            run()
        spent = {name: 1000 * often * median(found) for name, found in paired(runs, rounds).items()}
        total.update(spent)
        rate = 2 * often * runs["forward"]().numel() * inside * size**2 / spent["forward"] / 1e6
        cells = " | ".join(f"{value:.1f}" for value in spent.values())
        lines.append(f"| {often} of {size}×{size}, {inside} → {out}, stride {stride}, {height}² | {cells} | {rate:.0f} |")
    head = f"| ms | {' | '.join(total)} | GFLOP/s, forward |"
    everything = f"| all | {' | '.join(f'{value:.0f}' for value in total.values())} | |"
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *lines, everything])


def sgd_step(net: nn.Module, way: str, repeats: int) -> tuple[Callable[[], None], list[nn.Parameter]]:
    """So many steps on gradients of one, by a copy of the net, whose parameters come with it."""
    parameters = list(copy.deepcopy(net).parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    sgd = torch.optim.SGD(
        parameters, lr=1e-4, momentum=0.9, weight_decay=5e-4, foreach=way == "foreach", fused=way == "fused"
    )

    def run() -> None:
        for _ in range(repeats):
            sgd.step()

    run()
    return run, parameters


def optimizers(nets: dict[str, nn.Module], rounds: int) -> str:
    """A Markdown table: milliseconds of an SGD step in torch's three ways, and whether all end at the same bits."""
    lines = ["| SGD step | loop, ms | foreach | fused | loop ÷ fused | its range | the same bits |", "|---" * 7 + "|"]
    for name, net in nets.items():
        repeats = 1 + 50_000_000 // sum(p.numel() for p in net.parameters())
        made = {way: sgd_step(net, way, repeats) for way in ("loop", "foreach", "fused")}
        times = paired({way: run for way, (run, _) in made.items()}, rounds)
        ratios = [a / b for a, b in zip(times["loop"], times["fused"], strict=True)]
        same = all(torch.equal(a, b) for _, ends in made.values() for a, b in zip(ends, made["fused"][1], strict=True))
        cells = " | ".join(f"{1000 * median(found) / repeats:.3f}" for found in times.values())
        lines.append(
            f"| {name} | {cells} | {median(ratios):.2f} | {min(ratios):.2f}–{max(ratios):.2f} | {'yes' if same else 'no'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT[:3])
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--steps", type=positive, default=10)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    net = resnet18(num_classes=10, **IMAGES)
    x, y = torch.rand(args.batch, 3, 32, 32), torch.arange(args.batch) % 10
    print(f"{machine()}; ResNet-18, {args.batch} images of 3×32×32, {args.steps} attack steps, {args.rounds} rounds")
    if "profile" in args.what:
        attacks = {"as it is": Unfolded, "folded": PGD}
        runs = {
            name: bound(lambda own, kind=kind: ours(own, args.steps, False, kind), net, True, x, y)
            for name, kind in attacks.items()
        }
        spent = traced(runs, repeats=1)
        print(f"\nattack alone, bf16 channels last\n\n{shares(spent)}\n\n{operators(spent)}")
    if "folding" in args.what:
        print(f"\nattack alone\n\n{folding(net, x, y, args.steps, args.rounds)}")
    nets = {"small CNN": SmallCNN(num_classes=10, **IMAGES), "ResNet-18": net}
    if "few" in args.what:
        print(f"\nattack alone, folded ÷ as it is; above 1 folding costs more than it saves\n\n{few(nets, args.rounds)}")
    if "layers" in args.what:
        print(f"\nits convolutions, bf16 channels last\n\n{layers(net, x, args.rounds)}")
        print(f"\nfastest bf16 matrix product: {matmul_rate(torch.device('cpu'), torch.bfloat16) / 1e9:.0f} GFLOP/s")
    if "optimizer" in args.what:
        print(f"\n{optimizers(nets, args.rounds)}")
    for what in [what for what in args.what if what in WHAT[:3]]:
        times = compare(what, args.peers, net, x, y, args.steps, args.rounds)
        mine, full = "ours, bf16 channels last", "ours, fp32"
        print(f"\n{what}\n\n{rows(times, mine, args.batch)}\n")
        others = [name for name in times if not name.startswith("ours")]
        for low, own in (("fp32", mine), ("fp32", full), ("bf16", mine)):
            rivals = [name for name in others if low in name]
            if rivals:
                fastest = min(rivals, key=lambda name: ratio(times, name, own))
                print(f"{own}: {ratio(times, fastest, own):.2f} × as fast as {fastest}, the fastest of them")
        forward, inputs, weights = passes(copy.deepcopy(net), x)
        work = args.steps * (forward + inputs)
        if what == "trades":
            work += forward
        if what != "attack":
            work += (2 if what == "trades" else 1) * (forward + inputs + weights)
        peak = matmul_rate(torch.device("cpu"), torch.bfloat16)
        reached = work / sorted(times[mine])[len(times[mine]) // 2]
        print(
            f"{work / 1e9:.0f} GFLOP at {reached / 1e9:.0f} GFLOP/s: {100 * reached / peak:.0f} % of a bf16 matrix product"
        )


if __name__ == "__main__":
    main()
