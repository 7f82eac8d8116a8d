"""Do gradients tell the truth about the architecture peers?  One Markdown table on the embedded digits.

    python benchmarks/peers.py [--seed 0] [--epochs 6] [--quick]

Each net is trained by PGD-AT with its auxiliary term and attacked by PGD-20, then by PGD-20 on a twin of the same weights
whose gate hides nothing (for FSR: whose gate is softer).  Where the twin's images do more harm, the net's own gradients hide
something.  "worst": whichever attack turns an image.  All on the test images, at ε and at 2ε.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glassarmor.defenses import PGD, Linf
from glassarmor.lightning_modules.commands.train import CONFIGS, build

ROWS = {  # what is trained, and what its twin does otherwise
    "small CNN": (["network=small_cnn", "network.width=0.5", "regularizers=[]"], None),
    "CAS-like": (["network=cas"], None),
    "CAS-like, select=argmax": (["network=cas", "network.gate.select=argmax"], "network.gate.select=soft"),
    "CIFS-like": (["network=cifs"], None),
    "CIFS-like, detach=true": (["network=cifs", "network.gate.detach=true"], "network.gate.detach=false"),
    "FSR-like": (["network=fsr", "regularizers.auxiliary.weight=1"], "network.gate.temperature=1"),
}
COMMON = ["defense=pgd_at", "defense.attack.steps=3", "data.batch_size=64", "panels=[]", "trainer.accelerator=cpu"]
PEER = ["network.base.width=0.5", "regularizers=[auxiliary]"]


def config(overrides: list[str]) -> DictConfig:
    peer = [] if "network=small_cnn" in overrides else PEER
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [overrides[0], *COMMON, *peer, *overrides[1:]])


def row(name: str, sizes: list[str]) -> str:
    overrides, other = ROWS[name]
    cfg = config([*overrides, *sizes])
    parts = build(cfg)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    instantiate(cfg.trainer, **quiet).fit(parts.module, datamodule=parts.data)
    net = parts.module.net.eval()
    x, y = parts.data.test.images.float() / 255, parts.data.test.labels

    def right(images: Tensor) -> Tensor:
        with torch.no_grad():
            return net(images).argmax(1) == y

    def percent(found: Tensor) -> str:
        return f"{100 * found.double().mean().item():.1f}"

    cells = [name, percent(right(x))]
    for eps in (cfg.threat.eps, 2 * cfg.threat.eps):
        attack = PGD(Linf(eps), steps=20)
        own = right(attack(net, x, y))
        if other is None:
            cells += [percent(own), "", ""]
            continue
        twin = build(config([*overrides, *sizes, other])).module.net.eval()
        twin.load_state_dict(net.state_dict())
        through = right(attack(twin, x, y))
        cells += [percent(own), percent(through), percent(own & through)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="one epoch on few images: to see that it runs")
    args = parser.parse_args()
    sizes = [f"seed={args.seed}", f"trainer.max_epochs={1 if args.quick else args.epochs}"]
    sizes += ["data.train_limit=160", "data.test_limit=40"] if args.quick else []
    print("| network | clean | PGD-20 | of twin | worst | PGD-20 at 2ε | of twin | worst |")
    print("|---|---|---|---|---|---|---|---|")
    for name in ROWS:
        print(row(name, sizes), flush=True)


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    torch.set_num_threads(1)
    main()
