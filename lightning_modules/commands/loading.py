"""Getting a net out of a run: with its normalisation, threat and class names, or as plain weights."""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.utils import instantiate
from torch import nn

from glassarmor.defenses.threat import Threat
from glassarmor.interpret.modes import reading
from glassarmor.interpret.network.layouts import declare_layouts
from glassarmor.interpret.storage import read_object, write_atomic
from glassarmor.lightning_modules.networks.build import load_weights
from glassarmor.lightning_modules.run.console import clear_errors, console
from glassarmor.lightning_modules.run.saved_config import read_config


@dataclass(frozen=True)
class Loaded:
    """A trained network and what it was trained for.

    ``net``: images (N, C, H, W) in [0,1] to logits (N, K), in eval mode, its normalisation inside; ``threat``: the ball that
    it was trained against; ``class_names``: by class index.
    """

    net: nn.Module
    threat: Threat
    class_names: tuple[str, ...]


def load(run: str | Path, checkpoint: str = "best", trust: bool = False) -> Loaded:
    """The network of a run folder, on the CPU.

    Args:
        run: the run folder.
        checkpoint: "best", "last", or another name of its ``checkpoints``.
        trust: its config may name code that is not part of this package.

    Raises:
        ValueError: no run folder, no such checkpoint, a config that would run foreign code, or a run from before runs
            recorded their classes.

    Example:
        >>> loaded = load("runs/NAME")  # doctest: +SKIP
        >>> loaded.class_names[int(loaded.net(image[None]).argmax())]  # doctest: +SKIP
        'cat'
    """
    folder = Path(run)
    weights = folder / "checkpoints" / f"{checkpoint}.ckpt"
    if not weights.is_file() or not (folder / "config.yaml").is_file():
        raise ValueError(f"run: expected a run folder with config.yaml and {weights.name}, found none at {folder}")
    config = read_config(folder / "config.yaml", "run", trust)
    classes = read_object(folder / "run.json", "run").get("data", {}).get("classes")
    if not classes:
        raise ValueError(f"run: {folder / 'run.json'} does not record the classes; evaluate.py judges such a run")
    channels = _channels(weights)
    one = (0.0,) * channels, (1.0,) * channels  # the weights bring mean and deviation along
    net = instantiate(config["network"])(num_classes=len(classes), in_channels=channels, mean=one[0], std=one[1])
    net = reading(net, config.get("output"))
    declare_layouts(net, config.get("layouts") or {})
    load_weights(net, weights)
    return Loaded(net.eval(), instantiate(config["threat"]), tuple(classes))


def _channels(weights: Path) -> int:
    """Of the images: those of the normalisation, or of the first weight that looks at them."""
    state = torch.load(weights, weights_only=True, map_location="cpu")["state_dict"]
    known = [value.numel() for name, value in state.items() if name.endswith("normalize.mean")]
    kernels = [value.shape[1] for name, value in state.items() if name.startswith("net.") and value.dim() == 4]
    return int((known or kernels or [3])[0])


def run() -> None:
    """``glassarmor export RUN FILE``."""
    parser = argparse.ArgumentParser("glassarmor export", description="write a run's network as a plain state dict")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("file", type=Path, help="what torch.load(FILE, weights_only=True) will read")
    parser.add_argument("--checkpoint", default="best", help="best, last, ...")
    parser.add_argument("--trust", action="store_true", help="its config may name code of somebody else")
    args = parser.parse_args()
    with clear_errors(False, "--debug"):
        loaded, content = load(args.run, args.checkpoint, args.trust), io.BytesIO()
        torch.save(loaded.net.state_dict(), content)
        write_atomic(args.file, content.getbuffer())
    console.print(f"{args.file}: weights for images in [0,1], {len(loaded.class_names)} classes, {loaded.threat}")
