"""Our suites against the bounds that others published for their networks, and against other libraries, image by image.

    python benchmarks/validation.py DATA [--images 200] [--peers 30] [--state FOLDER] [--write docs/validation.md]

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

from benchmarks.peer_attacks import installed, peers_table
from glassarmor.defenses import L2, Linf, Threat, evaluate_robustness, make_suite
from glassarmor.defenses.evaluation.robustness import Evaluation
from glassarmor.defenses.evaluation.sampling import wilson
from glassarmor.lightning_modules.networks.normalize import Normalize

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
    """A network, and what its publishers say of its images, in percent: certified, and left by the best attack (upper).

    ``sampled``: their bounds are of more images than are judged here, so that they hold only within the interval.
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


def bounds(of: Published, stood: int, n: int) -> str:
    """How a count lies to the published bounds, in words."""
    if of.sampled:
        low, high = (100 * share for share in wilson(stood, n))
        return f"interval {low:.1f} to {high:.1f} %" + ("" if low <= of.upper and high >= of.certified else ": OUTSIDE")
    certified, upper = (round(share * n / 100) for share in (of.certified, of.upper))
    return f"{stood - certified:+d} to {certified}, {stood - upper:+d} to {upper}" + (": BELOW" if stood < certified else "")


def suites_table(data: Path, n: int, state: Path | None) -> Iterator[str]:
    """A row a network and suite: what stands.  strong begins with the attacks of standard, which therefore runs but once."""
    head = (
        "network",
        "ε (L∞)",
        "images",
        "clean",
        "suite",
        "stands",
        "certified, best published attack",
        "images beyond these",
    )
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for of in PUBLISHED:
        fast, strong = (judged(of, data, suite, n, state) for suite in ("fast", "strong"))
        standard = len(make_suite("standard", of.threat, 10).steps)
        stood = {"fast": fast.accuracy, "standard": strong.attacks[standard - 1].accuracy, "strong": strong.accuracy}
        for suite, share in stood.items():
            count = round(share * n)
            yield (
                f"| {of.name} | {of.threat.eps:.4g} | {n} | {100 * fast.clean_accuracy:.1f} % | {suite} "
                f"| {count} ({100 * share:.1f} %) | {of.certified} %, {of.upper} % | {bounds(of, count, n)} |"
            )


def page(data: Path, n: int, state: Path | None, peers: int) -> Iterator[str]:
    """The document, line by line."""
    yield "# Against the numbers of others"
    yield ""
    yield "Written by `python benchmarks/validation.py DATA --write docs/validation.md`, DATA the weights and images of"
    yield "three networks that others published with bounds (the alpha-beta-CROWN repository)."
    yield ""
    yield "## Published bounds"
    yield ""
    yield from suites_table(data, n, state)
    yield ""
    yield f"The last network's bounds are of 10,000 images, of which the first {n} are judged here."
    yield ""
    yield f"**The limit.** {LIMIT}"
    yield ""
    yield "## Other libraries"
    yield ""
    found = installed()
    here = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    yield f"The same attack with the same settings, on {peers} images of the CNN-A of CIFAR-10.  Found: {here}."
    missing = ", ".join(name for name, version in found.items() if not version)
    if missing:
        yield f"Not installed, so left out: {missing}."
    yield ""
    of = PUBLISHED[1]
    yield from peers_table(*of.load(data, peers), of.threat, L2(0.25))
    yield ""
    yield "Square and C&W differ by what they draw and where they start.  A size of 0: most images come back clean, for"
    yield "they were not felled."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--peers", type=int, default=30, help="images for the other libraries")
    parser.add_argument("--state", type=Path, help="where stopped suites go on")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    lines = []
    for line in page(args.data, args.images, args.state, args.peers):
        print(line, flush=True)
        lines.append(line)
    if args.write is not None:
        args.write.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
