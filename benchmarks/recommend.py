"""Which precision and memory layout are fastest for a config on this machine, and whether compiling the attack's net pays.

Measures a few steps, changes nothing.

    python benchmarks/recommend.py network=resnet18 data.batch_size=64      # any overrides of train.py
    python benchmarks/recommend.py +rounds=5 +images=64
    python benchmarks/recommend.py +compile=false                           # leaves compiling out, which takes minutes

``auto`` in a config never measures: it goes by the hardware's capabilities.  This command shows whether that pays here, for
this network, and says what to write.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig, open_dict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compiling import compare, ways
from benchmarks.composing import composed, help_if_asked
from benchmarks.timing import machine, paired, ratio, rows
from glassarmor.defenses.options import require_whole
from glassarmor.lightning_modules.commands import train
from glassarmor.lightning_modules.run.console import clear_errors
from glassarmor.lightning_modules.run.hardware import suited

WAYS = {
    (precision, layout): f"{precision}{', channels last' * layout}"
    for precision in ("32-true", "bf16-mixed")
    for layout in (False, True)
}


def step(
    cfg: DictConfig, precision: str, channels_last: bool, images: int | None, way: str | None = None
) -> Callable[[], None]:
    """One training step of the config, in this precision and layout, its attack's net compiled in this way."""
    cfg = cfg.copy()
    cfg.trainer.precision, cfg.channels_last = precision, channels_last
    with open_dict(cfg.defense):
        cfg.defense.compile_attack = way
    parts = train.build(cfg)
    device = device_of(cfg)
    net = parts.module.net.to(device).train()
    defense = parts.module.defense.to(device)
    optimizer = parts.module.make_optimizer(net.parameters())
    x, y = (part[:images].to(device) for part in next(iter(parts.data.train_dataloader())))

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision != "32-true", cache_enabled=False):
            loss = defense(net, x, y).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def device_of(cfg: DictConfig) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")


def main() -> None:
    help_if_asked(__doc__)
    with clear_errors(debug="debug=true" in sys.argv):
        cfg, own = composed(train.CONFIGS, "train", {"rounds": 5, "images": None, "compile": True})
        require_whole("rounds", own["rounds"], 1)
        require_whole("images", own["images"], 1, null=True)
        rounds, images, compiles = own.values()
        if not isinstance(compiles, bool):
            raise ValueError(f"compile: expected true or false, found {compiles!r}")
        train.settle(cfg)
        runs = {name: step(cfg, *way, images) for way, name in WAYS.items()}
        for run in runs.values():
            run()  # warms up
    times = paired(runs, rounds)
    best = min(WAYS.values(), key=lambda name: ratio(times, name, WAYS["32-true", False]))
    precision, channels_last = next(way for way, name in WAYS.items() if name == best)
    found = suited(cfg.trainer.accelerator)
    print(f"{machine()}, {rounds} rounds\n\n{rows(times, WAYS['32-true', False])}\n")
    print(f"fastest:  trainer.precision={precision} channels_last={str(channels_last).lower()}")
    print(f"auto is:  trainer.precision={found.precision} channels_last={str(found.channels_last).lower()}")
    if not compiles:
        return
    try:
        step(cfg, precision, channels_last, images, "inductor")
    except ValueError as error:
        print(f"compiling: not for this config: {error}")
        return
    compared = compare(lambda way: step(cfg, precision, channels_last, images, way), ways(device_of(cfg)), rounds)
    print(f"\nThe attack's net compiled, in {WAYS[precision, channels_last]}\n\n{compared}\n\n{compared.advice()}")


if __name__ == "__main__":
    main()
