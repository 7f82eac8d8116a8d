"""What an epoch's Activation Profiles cost beyond the forward passes, and what the structure graph costs once a run.

    python benchmarks/profiles.py [--threads 1] [--rounds 5] [--images 2000] [--examples 32] [--nets small_cnn,resnet18]

Random weights and random images: the cost does not depend on them.  With one thread, times are the process's own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glassarmor.interpret.network.structure import layout, overview, structure
from glassarmor.interpret.observation import Observation, observe
from glassarmor.interpret.profiles.background import Background, background_features, choose_background
from glassarmor.interpret.profiles.profiles import activation_profiles, compare, strength_positions
from glassarmor.lightning_modules.networks.resnet import resnet18
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN

DATA = {"num_classes": 10, "in_channels": 3, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
NETS: dict[str, Callable[[], nn.Module]] = {"small_cnn": lambda: SmallCNN(**DATA), "resnet18": lambda: resnet18(**DATA)}


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Median after one warm-up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(rounds + 1):
        start = clock()
        run()
        times.append(clock() - start)
    return median(times[1:])


def planted(background: Background, obs: Observation, images: int) -> Background:
    """A background of full size without its forward passes: noise of the right shapes around the few real features."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % 10
    features = {
        layer: phi.mean(0) + phi.std(0) * torch.randn(images, phi.shape[1], generator=generator)
        for layer, phi in background.features.items()
    }
    return Background(features, labels, tuple(map(str, range(images))))


def report(name: str, rounds: int, images: int, examples: int) -> None:
    net = NETS[name]().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(examples, 3, 32, 32, generator=generator)
    x_adv = (x + 0.03 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    y: Tensor = torch.arange(examples) % 10
    graph = structure(net, x[:2])
    drawing = overview(graph)
    # The nodes of the overview and the activations inside them, at most 20 of them over the whole depth.
    named = [node.layer for node in drawing.nodes if node.observable]
    named += [node.layer for node in graph.nodes if node.observable and node.kind == "activation"]
    every = [layer for layer in graph.layers() if layer in named]
    picks = torch.linspace(0, len(every) - 1, min(20, len(every))).round().long().tolist()
    layers = tuple(every[i] for i in picks)
    with torch.no_grad():
        obs = observe(net, x, x_adv, y, target=(y + 1 + torch.arange(examples) // 10) % 10, layers=layers)
        forward = seconds(lambda: observe(net, x, x_adv, y, layers=layers), max(1, rounds // 2))
    background = planted(background_features(net, [(x, y)], layers), obs, images)
    profiles = activation_profiles(obs, background)
    widest = max(phi.shape[1] for phi in background.features.values())
    last = background.features[layers[-3]].repeat(5, 1)  # ahead of pooling and head
    small = background_features(net, [(x, y)], layers)
    cost = seconds(lambda: activation_profiles(obs, background), rounds)
    path = seconds(lambda: strength_positions(net, x[:4], x_adv[:4], y[:4], y[:4] - 1, small, points=6), 1)
    tracing = seconds(lambda: structure(net, x[:2]), rounds)
    placing = seconds(lambda: layout(drawing), rounds)
    choice = seconds(lambda: choose_background(last, background.labels.repeat(5), images // 10), 1)
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), median of {rounds}")
    print(
        f"  profiles {cost:.3f} s: {examples} examples of {len(profiles.pairs)} pairs, {images} background images, ", end=""
    )
    print(f"{len(layers)} layers of at most {widest} units; their two observed passes {forward:.3f} s")
    print(f"  comparison of two {seconds(lambda: compare(profiles, profiles), rounds):.4f} s")
    print(f"  strength path of 4 examples, 6 points, forwards included {path:.3f} s")
    print(f"  once a run: structure of {len(graph.nodes)} nodes {tracing:.3f} s, its layout {placing:.4f} s; ", end="")
    print(f"choice of {images} from {len(last)} images by {last.shape[1]} features {choice:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--nets", default="small_cnn,resnet18")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for name in args.nets.split(","):
        report(name, args.rounds, args.images, args.examples)


if __name__ == "__main__":
    main()
