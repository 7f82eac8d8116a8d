"""Our region and unit effects beside Captum's, with the agreement of the values beside each ratio.

    python benchmarks/interpretation.py [--threads 1] [--rounds 5] [--nets small_cnn,resnet18]

Times are medians over rounds in which the contenders take turns, after one warm-up each, so that a busy machine hits them
all alike; with one thread it is the process's own time.  Each has its own best chunk where chunks are searched.  Nothing
is downloaded: a small CNN trained for a few seconds on the digits, and a ResNet-18 with random weights on random images.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from captum import attr
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glassarmor.datamodules.digits import Digits
from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.threat import Linf
from glassarmor.interpret.modes import undisturbed
from glassarmor.interpret.observation import strongest_wrong
from glassarmor.interpret.signals.captum_bridge import region_logit_changes
from glassarmor.interpret.signals.conductance import conductance
from glassarmor.interpret.signals.patching import cut, unit_patching
from glassarmor.interpret.signals.pse import grid_regions, region_effects
from glassarmor.lightning_modules.networks.resnet import resnet18
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN

CHUNKS = (32, 64, 128, 256, 512)
STEPS, FINE = 10, 160
Case = tuple[nn.Module, Tensor, Tensor, Tensor, Tensor, tuple[str, ...], tuple[int, int]]


def timed(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for round_ in range(rounds + 1):
        for name, run in contenders.items():
            start = clock()
            run()
            if round_:  # the first is the warm-up
                times[name].append(clock() - start)
    return {name: median(values) for name, values in times.items()}


def attacked(net: nn.Module, x: Tensor, y: Tensor, eps: float, layers: tuple[str, ...], grid: tuple[int, int]) -> Case:
    net.eval()
    x_adv = PGD(Linf(eps), steps=10)(net, x, y)
    with torch.no_grad():
        target = strongest_wrong(net(x_adv), y)
    return net, x, x_adv, y, target, layers, grid


def small_cnn() -> Case:
    images, test, _ = Digits().load()
    net = SmallCNN(num_classes=10, in_channels=1, mean=[0.5], std=[0.5]).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for rows in torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(0)).repeat(6).split(128):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images.images[rows].float() / 255), images.labels[rows]).backward()
        optimizer.step()
    layers = tuple(f"stage{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1))
    return attacked(net, test.images[:16].float() / 255, test.labels[:16], 0.06, layers, (8, 8))


def resnet_18() -> Case:
    generator = torch.Generator().manual_seed(0)
    net = resnet18(num_classes=10, in_channels=3, mean=[0.5] * 3, std=[0.25] * 3)
    x, y = torch.rand(2, 3, 32, 32, generator=generator), torch.randint(10, (2,), generator=generator)
    layers = ("stem", *(f"layer{layer}.{block}" for layer in (1, 2, 3, 4) for block in (0, 1)))
    return attacked(net, x, y, 8 / 255, layers, (8, 8))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().mean() / expected.abs().mean())


def regions(case: Case, rounds: int) -> None:
    net, x, x_adv, y, target, _, grid = case
    index = grid_regions(*x.shape[-2:], grid)
    mask, pair = index[None, None], torch.stack([y, target], 1)

    def one_label_a_call(chunk: int) -> list[Tensor]:
        ablation = attr.FeatureAblation(net)
        return [
            ablation.attribute(
                x_adv, baselines=x, feature_mask=mask, target=label, perturbations_per_eval=max(1, chunk // len(x))
            )
            for label in (y, target)
        ]

    engines: dict[str, Callable[[int], object]] = {
        "ours": lambda chunk: region_effects(net, x, x_adv, y, target, grid, chunk),
        "captum, one label a call": one_label_a_call,
        "captum, two-logit wrapper": lambda chunk: region_logit_changes(net, x, x_adv, pair, index, chunk),
    }
    with torch.no_grad():
        times = timed(
            {
                f"{name}/{chunk}": lambda run=run, chunk=chunk: run(chunk)
                for name, run in engines.items()
                for chunk in CHUNKS
            },
            rounds,
        )
        print(f"  regions {grid[0]}x{grid[1]}, both labels, {len(x)} images: seconds by chunk")
        print(f"    {'':28}" + "".join(f"{chunk:>9}" for chunk in CHUNKS) + "     best")
        best = {}
        for name in engines:
            row = [times[f"{name}/{chunk}"] for chunk in CHUNKS]
            best[name] = min(row)
            print(f"    {name:28}" + "".join(f"{seconds:9.3f}" for seconds in row) + f"{min(row):9.3f}")
        ours = region_effects(net, x, x_adv, y, target, grid)
        first = torch.stack([(index == g).flatten().nonzero()[0, 0] for g in range(grid[0] * grid[1])])
        captum = [-one_label_a_call(128)[0], one_label_a_call(128)[1]]
        both = region_logit_changes(net, x, x_adv, pair, index)
    default = timed({"ours": lambda: region_effects(net, x, x_adv, y, target, grid)}, rounds)["ours"]
    with torch.no_grad():  # perturbations_per_eval = 1 is what Captum does unless told otherwise
        untuned = timed({"captum": lambda: one_label_a_call(1)}, rounds)["captum"]
    print(
        f"    against captum, one label a call, its own default of one perturbation a forward: {untuned:.3f} s, "
        f"{untuned / default:.2f}x with our default"
    )
    for name, theirs in (
        ("captum, one label a call", [side[:, 0].flatten(1)[:, first] for side in captum]),
        ("captum, two-logit wrapper", [-both[:, 0], both[:, 1]]),
    ):
        differ = max(relative(ours.suppression, theirs[0]), relative(ours.promotion, theirs[1]))
        print(
            f"    against {name}: {best[name] / best['ours']:.2f}x at best chunks, {best[name] / default:.2f}x with "
            f"our default; mean |difference| of values {differ:.1e}"
        )


def units(case: Case, rounds: int) -> None:
    net, x, x_adv, y, target, layers, _ = case

    def captum(steps: int, method: str) -> dict[str, list[Tensor]]:
        """Suppression and promotion (N, C) of every layer, one layer and one label a call."""
        found = {}
        for layer in layers:
            engine = attr.LayerConductance(net, net.get_submodule(layer))
            maps = [
                engine.attribute(x_adv, baselines=x, target=label, n_steps=steps, method=method, internal_batch_size=64)
                for label in (y, target)
            ]
            found[layer] = [-maps[0].detach().sum((2, 3)), maps[1].detach().sum((2, 3))]
        return found

    def ours(steps: int = STEPS) -> dict[str, list[Tensor]]:
        effects = conductance(net, x, x_adv, y, target, layers=layers, steps=steps).units
        return {layer: [e.suppression, e.promotion] for layer, e in effects.items()}

    fine = ours(FINE)

    def error(found: dict[str, list[Tensor]]) -> float:
        return max(relative(torch.stack(found[layer]), torch.stack(fine[layer])) for layer in layers)

    wanted = error(ours())
    gaps = conductance(net, x, x_adv, y, target, layers=layers, steps=STEPS).relative_gaps
    print(
        f"  units of {len(layers)} layers, both labels, {len(x)} images; "
        f"errors: mean |difference| to {FINE} steps (worst layer)"
    )
    print(f"    ours, {STEPS} steps: error {wanted:.2%}, completeness gap {max(gaps.values()):.2%} (worst layer)")
    contenders: dict[str, Callable[[], object]] = {"ours": ours}
    for method in ("gausslegendre", "riemann_trapezoid"):
        contenders[f"{method}, {STEPS} steps"] = lambda method=method: captum(STEPS, method)
        print(f"    captum {method}, {STEPS} steps: error {error(captum(STEPS, method)):.2%}")
    equal = {}
    for method in ("gausslegendre", "riemann_trapezoid"):
        for steps in (*range(15, 50, 5), 80, FINE):
            found = error(captum(steps, method))
            if found <= wanted or steps == FINE:
                equal[method] = steps
                print(f"    captum {method}, {steps} steps: error {found:.2%}")
                break
    for method, steps in equal.items():  # the first is what Captum's users get unless they choose
        contenders[f"{method}, {steps} steps"] = lambda method=method, steps=steps: captum(steps, method)
    times = timed(contenders, rounds)
    for name, seconds in times.items():
        print(f"    {name:32}{seconds:9.3f} s  {seconds / times['ours']:6.1f}x")
    by_chunk = timed(
        {
            str(chunk): lambda chunk=chunk: conductance(net, x, x_adv, y, target, layers=layers, steps=STEPS, chunk=chunk)
            for chunk in (16, 32, 64, 128, 256)
        },
        rounds,
    )
    print("    ours by chunk: " + ", ".join(f"{chunk} {seconds:.3f} s" for chunk, seconds in by_chunk.items()))


def patching(case: Case, rounds: int) -> None:
    """Exact patching of one layer in the middle: only what lies above it, or everything."""
    net, x, x_adv, y, target, layers, _ = case
    layer = layers[len(layers) // 2]
    module = net.get_submodule(layer)

    def whole_passes() -> Tensor:
        """The usual way: a hook replaces the output, and the part below runs for nothing."""
        with undisturbed(net), torch.no_grad():
            clean, adv = (cut(net, layer, images).activation for images in (x, x_adv))
            gains = []
            for unit in range(adv.shape[1]):
                patched = adv.clone()
                patched[:, unit] = clean[:, unit]
                handle = module.register_forward_hook(lambda _m, _i, _o, patched=patched: patched)
                gains.append(net(x_adv).gather(1, target[:, None])[:, 0])
                handle.remove()
        return net(x_adv).detach().gather(1, target[:, None]) - torch.stack(gains, 1)

    times = timed(
        {
            "ours": lambda: unit_patching(net, x, x_adv, y, target, layer=layer),
            "whole passes": whole_passes,
        },
        rounds,
    )
    found = unit_patching(net, x, x_adv, y, target, layer=layer)
    conducted = conductance(net, x, x_adv, y, target, layers=[layer]).units[layer]
    agree = torch.corrcoef(torch.stack([found.margin.flatten(), conducted.margin.flatten()]))[0, 1]
    print(
        f"  exact patching of {layer}: ours {times['ours']:.3f} s, {times['whole passes'] / times['ours']:.1f}x faster than "
        f"whole passes; mean |difference| {relative(found.promotion, whole_passes()):.1e}; "
        f"correlation of its margin effects with conductance {agree:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nets", default="small_cnn,resnet18")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", module="captum")
    for name in args.nets.split(","):
        case = {"small_cnn": small_cnn, "resnet18": resnet_18}[name]()
        print(f"{name}, torch {torch.__version__}, {args.threads} thread(s), median of {args.rounds}", flush=True)
        regions(case, args.rounds)
        units(case, args.rounds)
        patching(case, args.rounds)


if __name__ == "__main__":
    main()
