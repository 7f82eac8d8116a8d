"""Look into a trained network: the full analysis of one attack on one set of images, as a page, pictures and JSON; or judge
it by a suite of attacks.

python evaluate.py checkpoint=runs/NAME attack=cw images=128
python evaluate.py checkpoint=runs/NAME suite=standard
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn

from glassarmor.datamodules.fingerprint import fingerprint
from glassarmor.datamodules.images import ImageDataModule, ProbeBatch
from glassarmor.defenses.masking import masked
from glassarmor.interpret.storage import plain, write_atomic
from glassarmor.interpret.views.charts import Bars, Lines, Table
from glassarmor.interpret.views.page.page import KeyFigure
from glassarmor.interpret.views.panels.masking import masking_view
from glassarmor.interpret.views.panels.profiles import ProfilesPanel
from glassarmor.interpret.views.panels.versus import versus_view
from glassarmor.interpret.views.view import View
from glassarmor.lightning_modules.callbacks.look import Look, RehearsalAttack
from glassarmor.lightning_modules.cards.page import draw
from glassarmor.lightning_modules.commands.errors import run_command
from glassarmor.lightning_modules.commands.judge import judge_by_suite, make_request
from glassarmor.lightning_modules.commands.masking import choose, require_masking
from glassarmor.lightning_modules.commands.subject import (
    located,
    look_of,
    named,
    network_of,
    new_folder,
    renamed_keys,
    say,
    subject,
)
from glassarmor.lightning_modules.networks.build import load_weights, make_network
from glassarmor.lightning_modules.run.console import clear_errors, console, steps
from glassarmor.lightning_modules.run.data_record import compared
from glassarmor.lightning_modules.run.folder import commit, versions
from glassarmor.lightning_modules.run.saved_config import CONFIGS, read_config

KEY_FIGURES = (
    KeyFigure("outcome/clean_acc", "Accuracy, clean", "%"),
    KeyFigure("outcome/robust_acc", "Accuracy under attack", "%"),
    KeyFigure("outcome/success", "Success of the attack", "%"),
    KeyFigure("cam/interpretability", "Interpretability score"),
)


def record(views: list[View], **about: Any) -> dict[str, Any]:
    """Everything the panels measured, as plain JSON: numbers, sentences, curves, bars and tables; no maps."""
    kept = (Bars, Lines, Table)
    return {
        **about,
        "scalars": {key: value for view in views for key, value in view.scalars.items()},
        "panels": {
            view.name: {
                "headline": view.headline,
                "charts": [{"type": type(c).__name__.lower(), **asdict(c)} for c in view.charts if isinstance(c, kept)],
            }
            for view in views
        },
    }


def compare_masked(masking: DictConfig, net: nn.Module, look: Look, choosers: ProbeBatch, device: torch.device) -> View:
    """The net as it is, with the chosen units masked, and with as many masked at random; each attacked anew."""
    x, y = choosers.x.to(device), choosers.y.to(device)
    look.attack.reseed(1)
    x_adv = look.attack(net, x, y)
    masks = choose(masking, net, x, x_adv, y, look.layers)
    probes = [look.probe(each, device, {}) for each in (net, *(masked(net, mask).eval() for mask in masks))]
    units = {layer: (~keep).nonzero().flatten().tolist() for layer, keep in masks[0].keep.items()}
    return masking_view(probes, units, masking.by)


@dataclass(frozen=True)
class Other:
    """Another network for the same data."""

    name: str
    net: nn.Module


def against(cfg: DictConfig, data: ImageDataModule) -> Other:
    """The network of ``cfg.against``, its architecture from its own run where there is one.

    Raises:
        ValueError: no such weights, or a run on other data.
    """
    with renamed_keys(checkpoint="against"):
        weights, run = located(cfg.against)
    saved = OmegaConf.create(read_config(run, "against", cfg.trust)) if run is not None else cfg
    for key in ("_target_", "classes"):
        if saved.data.get(key) != cfg.data.get(key):
            raise ValueError(f"against: {cfg.against} was trained on other data: data.{key} is {saved.data.get(key)}")
    net = make_network(network_of(saved), data, bool(saved.get("channels_last")))
    with renamed_keys(checkpoint="against"):
        say(load_weights(net, weights).notes)
    if run is not None:
        say(compared(run.parent, fingerprint(data), "against", own=False))
    return Other(named(weights, run), net.eval())


def compare_networks(name: str, net: nn.Module, other: Other, look: Look, device: torch.device) -> View:
    """The profiles of both networks on the same images, each attacked anew."""
    twin = replace(look, layers=(), run=other.name)  # it has layers of its own
    panel = next((p for p in look.panels.values() if isinstance(p, ProfilesPanel)), ProfilesPanel())
    probes = (look.probe(net, device, {}), twin.probe(other.net.to(device), device, {}))
    return versus_view((name, other.name), probes, panel)


def analyse(cfg: DictConfig, attack_name: str) -> Path:
    """Attack, observe, measure, draw; returns the folder that holds the page, the pictures and ``analysis.json``."""
    with clear_errors(cfg.debug):
        of = subject(cfg)
        cfg, data, net = of.cfg, of.data, of.net
        look, images = look_of(of, 128 if cfg.images is None else cfg.images)
        attack = look.attack
        if not look.panels:
            raise ValueError("panels: expected at least one, found none")
        if cfg.masking.by is not None:
            require_masking(cfg.masking)
            choosers = data.probe(min(cfg.masking.images, len(data.val)), "val", "masking.images")
            few = choosers.x[:2]
            rehearsed = RehearsalAttack(attack.threat)(net, few, choosers.y[:2])
            choose(cfg.masking, net, few, rehearsed, choosers.y[:2], look.layers)
        other = None if cfg.against is None else against(cfg, data)
        folder = new_folder(cfg, f"{of.name}_{attack_name}", "analysis.json", "analysis")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = net.to(device)
    with steps(folder.name) as tell:
        views = look.views(net, device, {}, tell)
        if cfg.masking.by is not None:
            tell("masking")
            views.append(compare_masked(cfg.masking, net, look, choosers, device))
        if other is not None:
            tell(other.name)
            views.insert(0, compare_networks(of.name, net, other, look, device))
    meta = {
        "checkpoint": str(of.weights),
        "attack": f"{attack_name}, {attack.threat}",
        "images": f"{len(images.ids)} of the {cfg.split} split, hash {images.hash}",
        "observed layers": ", ".join(look.layers),
        **({"against": cfg.against} if other is not None else {}),
        **({"data": "; ".join(of.differs)} if of.differs else {}),
        "seed": cfg.seed,
        "commit": commit(),
    }
    page = draw(folder, meta, views, KEY_FIGURES)
    config = OmegaConf.to_container(cfg, resolve=True)
    text = json.dumps(plain(record(views, meta=meta, versions=versions(), config=config)), indent=1, allow_nan=False)
    write_atomic(folder / "analysis.json", text + "\n")  # last: its presence says that the analysis is whole
    for view in views:
        console.print(view.title, style="bold", end="  ")
        console.print(view.headline)
    console.print(f"page      {page.index}\nnumbers   {folder / 'analysis.json'}\npictures  {folder}/*.png and *.svg")
    return folder


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Entry point; see ``python evaluate.py --help`` for the groups."""
    if cfg.suite is not None:
        with clear_errors(cfg.debug):
            request = make_request(cfg)
        judge_by_suite(request)
    else:
        analyse(cfg, HydraConfig.get().runtime.choices["attack"])


def run() -> None:
    """``python evaluate.py``, ``glassarmor evaluate``."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its hints are not about this run
    run_command(main, CONFIGS, "evaluate", "the same command goes on where a suite was; an analysis begins anew")
