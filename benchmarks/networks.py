"""Which signals each family of networks has: writes ``docs/networks.md``.

    python -m benchmarks.networks            the table
    python -m benchmarks.networks --kernel   what attention that can be differentiated twice costs

Every cell is computed: a signal that refuses a layer says so, in the sentence a user would get.  That the numbers are
right is tested: ``tests/interpret/test_networks.py`` compares all of them with hooks and gradients of its own.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from glassarmor.datamodules import procedural_concepts
from glassarmor.defenses import PGD, PSE, AdversarialCE, CAMDiscrepancy, Defense, Linf, UnitSensitivity
from glassarmor.defenses.masking import mask_of, masked
from glassarmor.interpret import (
    class_activation_map,
    conductance,
    feature_layers,
    layouts_of,
    observe,
    unit_effects,
    unit_patching,
    unit_sensitivity,
)
from glassarmor.interpret.concepts.dissection import dissect
from glassarmor.interpret.modes import twice_differentiable
from glassarmor.interpret.profiles.background import background_features
from glassarmor.interpret.profiles.profiles import activation_profiles
from glassarmor.lightning_modules.networks import small_vit
from tests.reference.families import FAMILIES, images

PAGE = Path(__file__).parents[1] / "docs" / "networks.md"
Signal = Callable[[nn.Module, Tensor, Tensor, Tensor, str], object]


def profile(net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, layer: str) -> object:
    obs = observe(net, x, x_adv, y, layers=[layer])
    return activation_profiles(obs, background_features(net, [(x.repeat(4, 1, 1, 1), y.repeat(4))], [layer]), neighbours=2)


def trained(net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, layer: str) -> object:
    terms = {"pse": PSE(layers=[layer]), "sensitivity": UnitSensitivity(layers=[layer])}
    step = Defense(PGD(Linf(0.03), steps=1), {"ce": AdversarialCE()}, terms)(net, x, y)
    step.loss.backward()
    return step


SIGNALS: dict[str, Signal] = {
    "unit effects (PSE)": lambda net, x, x_adv, y, layer: unit_effects(observe(net, x, x_adv, y, layers=[layer]), layer),
    "sensitivity": lambda net, x, x_adv, y, layer: unit_sensitivity(observe(net, x, x_adv, y, layers=[layer]), layer),
    "conductance": lambda net, x, x_adv, y, layer: conductance(net, x, x_adv, y, layers=[layer], steps=2),
    "patching": lambda net, x, x_adv, y, layer: unit_patching(net, x, x_adv, y, layer=layer),
    "profiles": profile,
    "masking": lambda net, x, x_adv, y, layer: masked(net, mask_of(net, x, layer, [0]))(x),
    "regularisers": trained,
    "CAM": lambda net, x, x_adv, y, layer: class_activation_map(observe(net, x, x_adv, y, layers=[layer]), layer),
    "CAM regulariser": lambda net, x, x_adv, y, layer: Defense(
        PGD(Linf(0.03), steps=1), {"ce": AdversarialCE()}, {"cam": CAMDiscrepancy(layers=[layer])}
    )(net, x, y),
    "dissection": lambda net, x, x_adv, y, layer: dissect(
        net, procedural_concepts(count=4, size=x.shape[-1], channels=x.shape[1]), [layer], quantile=0.1, top=1
    ),
}


def row(name: str, notes: list[str]) -> str:
    """One family: its last default layer, how that is read, and each signal: yes, or the number of a note."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    net = family.make().eval()
    x, x_adv, y = images(family)
    layer = feature_layers(net, x)[-1]
    layout = layouts_of(net, x, [layer])[layer]
    cells = []
    for signal in SIGNALS.values():
        try:
            signal(net, x, x_adv, y, layer)
            cells.append("yes")
        except ValueError as error:
            said = str(error).replace(repr(layer), "the layer")
            notes += [] if said in notes else [said]
            cells.append(f"no ({notes.index(said) + 1})")
    grid = "×".join(map(str, layout.grid)) or "none"
    read = f"{layout.axes}, {layout.calls} calls" if layout.recurrent else layout.axes
    return " | ".join((name, f"`{layer}`", read, str(layout.prefix or ""), grid, *cells))


def kernel_cost(rounds: int = 12) -> float:
    """CPU seconds of a training step of ``small_vit`` with the attention kernel that can be differentiated twice, over those
    with torch's own choice: the median of paired rounds.
    """
    net = small_vit(num_classes=10, in_channels=1, mean=(0.5,), std=(0.5,))
    x, y = torch.rand(64, 1, 32, 32), torch.arange(64) % 10
    ratios = []
    for _ in range(rounds):
        seconds = []
        for twice in (False, True):
            begin = time.process_time()
            with twice_differentiable(twice):
                logits = net(x)
            nn.functional.cross_entropy(logits, y).backward()
            seconds.append(time.process_time() - begin)
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)


def main() -> None:
    if "--kernel" in sys.argv:
        print(f"a step with the twice differentiable kernel: {kernel_cost():.2f} times")
        return
    notes: list[str] = []
    rows = [row(name, notes) for name in FAMILIES]
    columns = ("network", "last default layer", "axes", "tokens without a place", "map", *SIGNALS)
    text = PAGE.read_text(encoding="utf-8")
    begin, end = "<!-- table: python -m benchmarks.networks -->\n", "<!-- end of table -->\n"
    table = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *(f"| {line} |" for line in rows), ""]
    table += [f"{number}. {said}" for number, said in enumerate(notes, 1)]
    before, rest = text.split(begin)
    PAGE.write_text(before + begin + "\n" + "\n".join(table) + "\n\n" + end + rest.split(end)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
