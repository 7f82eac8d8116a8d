"""Our suites against the bounds that others published for their networks, and against other libraries, image by image.

    python benchmarks/validation.py DATA [--suites fast strong] [--images 200] [--state FOLDER] [--write docs/validation.md]

DATA holds the weights and images of ``PUBLISHED`` (from the alpha-beta-CROWN repository).  Each suite keeps its state in
FOLDER and goes on where it was stopped.  Peers that are not installed are named and left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from defenses import Linf, Threat, evaluate_robustness
from defenses.robustness import Evaluation
from defenses.sampling import wilson
from lightning_modules.networks.normalize import Normalize

SUITES: Final = ("fast", "strong")
LIMIT: Final = (
    "What stands is not certified: a suite gives an upper limit of the robust accuracy, and a solver finds counterexamples "
    "that no suite of gradient attacks and random searches finds (images between the two bounds)."
)


def cnn_a(channels: int) -> nn.Sequential:
    """Two convolutions of stride 2 and two linear layers (Dathathri et al. 2020, 2010.11645)."""
    side = {1: 7, 3: 8}[channels]
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * side * side, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


class _Block(nn.Module):
    def __init__(self, inner: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, 16, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.shortcut = nn.Sequential(nn.Conv2d(inner, 16, 1, stride=stride)) if stride > 1 else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        inside = F.relu(self.conv1(x))
        return F.relu(self.conv2(inside) + self.shortcut(x))


class ResNet2B(nn.Module):
    """Two residual blocks without BatchNorm (ResNet-2B of the VNN competition 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.layer1 = nn.Sequential(_Block(8, 2), _Block(16, 1))
        self.linear1, self.linear2 = nn.Linear(1024, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear2(F.relu(self.linear1(self.layer1(F.relu(self.conv1(x))).flatten(1))))
        return logits


@dataclass(frozen=True)
class Published:
    """A network, and what its publishers say of its first ``n`` images: shares in percent, best attack and certified.

    ``several``: the bounds are of more images than are judged here, so that they hold only within the interval.
    """

    name: str
    weights: str
    images: str
    make: Callable[[], nn.Module]
    threat: Threat
    upper: float
    certified: float
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    sampled: bool = False

    def load(self, data: Path, n: int) -> tuple[nn.Module, Tensor, Tensor]:
        """The network in eval mode, behind its normalisation; images (N, C, H, W) in [0,1] and labels."""
        net = self.make()
        saved = torch.load(data / self.weights, weights_only=True, map_location="cpu")
        net.load_state_dict(saved.get("state_dict", saved))
        whole = nn.Sequential(Normalize(self.mean, self.std), net) if self.mean else net
        with np.load(data / self.images) as arrays:
            images, labels = arrays["images"][:n], arrays["labels"][:n]
        x = torch.from_numpy(images).float() / 255
        x = x.permute(0, 3, 1, 2).contiguous() if x.dim() == 4 else x[:, None]
        return whole.eval(), x, torch.from_numpy(labels).long()


PUBLISHED: Final = (
    Published("CNN-A, MNIST", "mnist_cnn_a_adv.pt", "mnist/test.npz", lambda: cnn_a(1), Linf(0.3), 76.5, 76.0),
    Published(
        "CNN-A, CIFAR-10",
        "cifar_cnn_a_adv.pt",
        "cifar/test.npz",
        lambda: cnn_a(3),
        Linf("2/255"),
        50.0,
        48.5,
        mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
        std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
    ),
    Published(
        "ResNet-2B, CIFAR-10",
        "cifar_resnet2b.pt",
        "../cifar10/test.npz",
        ResNet2B,
        Linf("2/255"),
        54.82,
        26.88,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2471, 0.2435, 0.2616),
        sampled=True,
    ),
)


def judged(of: Published, data: Path, suite: str, n: int, state: Path | None = None) -> Evaluation:
    """One suite on the first ``n`` images."""
    net, x, y = of.load(data, n)
    path = None if state is None else state / f"{Path(of.weights).stem}-{suite}-{n}.json"
    return evaluate_robustness(net, x, y, of.threat, suite, subset=len(x), batch_size=200, state=path)


def bounds(of: Published, found: Evaluation) -> str:
    """How a count lies to the published bounds, in words."""
    stood = int(found.standing.sum())
    low, high = (100 * share for share in wilson(stood, found.n))
    if of.sampled:
        inside = low <= of.upper and high >= of.certified
        return "interval between the bounds" if inside else "OUTSIDE"
    certified, upper = (round(share * found.n / 100) for share in (of.certified, of.upper))
    if stood < certified:
        return f"BELOW the {certified} that are certified"
    return f"{certified} certified, {upper} left by the best published attack ({stood - upper:+d})"


def suites_table(data: Path, suites: list[str], n: int, state: Path | None) -> Iterator[str]:
    """A row a network, suite and number of attacks that have run: what stands."""
    yield "| network, ε (L∞) | images | suite | clean | stands | upper, certified as published | |"
    yield "|---|---|---|---|---|---|---|"
    for of in PUBLISHED:
        for suite in suites:
            found = judged(of, data, suite, n, state)
            low, high = found.interval
            for attack in found.attacks:
                print(f"{of.name}, {suite}: {attack.name} {attack.accuracy:.4f}, {attack.seconds:.0f} s", file=sys.stderr)
            share = f"{int(found.standing.sum())} ({100 * found.accuracy:.2f} %, {100 * low:.1f} to {100 * high:.1f})"
            yield (
                f"| {of.name}, {of.threat.eps:.4g} | {found.n} | {suite} | {100 * found.clean_accuracy:.2f} % | {share} "
                f"| {of.upper} %, {of.certified} % | {bounds(of, found)} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--suites", nargs="+", default=[*SUITES])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    print("\n".join(suites_table(args.data, args.suites, args.images, args.state)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
