"""The network that a command line names, the data it is looked at with, and the panels: read from a run folder, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from glassarmor.datamodules.fingerprint import fingerprint
from glassarmor.datamodules.images import ImageDataModule, ProbeBatch
from glassarmor.defenses.options import require_one_of, require_whole
from glassarmor.interpret.modes import reading
from glassarmor.interpret.network.layouts import declare_layouts
from glassarmor.interpret.storage import check_links, check_name, file_name, read_object
from glassarmor.lightning_modules.callbacks.look import Look, ProbeSet
from glassarmor.lightning_modules.networks.build import load_weights, make_network
from glassarmor.lightning_modules.run.console import console, note
from glassarmor.lightning_modules.run.data_record import Fingerprint, compared, places_of
from glassarmor.lightning_modules.run.folder import RunFolder
from glassarmor.lightning_modules.run.saved_config import read_config

ANYTHING = {  # data whose usual radius no config knows
    "glassarmor.datamodules.Arrays": "arrays",
    "glassarmor.datamodules.ImageFolder": "image_folder",
}


@contextmanager
def renamed_keys(**keys: str) -> Iterator[None]:
    """Errors that begin with one of these config keys begin with the one that the user wrote in its place."""
    try:
        yield
    except ValueError as error:
        key = str(error).replace(":", " ").split()[0]
        if key not in keys:
            raise
        raise ValueError(keys[key] + str(error).removeprefix(key)) from error


def located(checkpoint: str | None) -> tuple[Path, Path | None]:
    """The weights file, and the config of the run it belongs to where there is one.

    Raises:
        ValueError: none named, no such file, or a folder without a checkpoint.
    """
    if checkpoint is None:
        raise ValueError("checkpoint: expected a run folder or a file of weights, e.g. checkpoint=runs/NAME; found none")
    path = Path(checkpoint).expanduser()
    weights = RunFolder(path).judged if path.is_dir() else path
    if path.is_dir() and weights.name != "best.ckpt" and weights.is_file():
        console.print(f"{path} holds no best.ckpt, so no epoch is known to be better than guessing: {weights.name} is taken")
    if not weights.is_file():
        raise ValueError(f"checkpoint: expected a run folder or a file of weights, found none at {path}")
    config = weights.parent.parent / "config.yaml"
    return weights, config if config.is_file() else None


def imported(cfg: DictConfig) -> DictConfig:
    """The config with ``model`` and ``weights`` in the places of ``network`` and ``checkpoint``, where they are given.

    Raises:
        ValueError: both ways are used at once.
    """
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    if cfg.model is None:
        for key in ("mean", "std"):
            if cfg[key] is not None:
                raise ValueError(f"{key}: expected model=module:callable beside it, found {key}={cfg[key]} alone")
        if cfg.weights is not None and cfg.checkpoint is not None:
            raise ValueError("weights: says what checkpoint= says; expected one of them, found both")
        cfg.checkpoint = cfg.weights if cfg.checkpoint is None else cfg.checkpoint
        return cfg
    if (cfg.mean is None) != (cfg.std is None):
        raise ValueError(
            f"mean: expected mean and std together, a number a channel each; found mean={cfg.mean} std={cfg.std}"
        )
    if cfg.get("network") is not None or cfg.checkpoint is not None:
        raise ValueError("model: takes the place of network= and checkpoint= (with weights=), found both")
    target = "glassarmor.lightning_modules.networks.imported"
    cfg.network = {"_target_": target, "_partial_": True, "target": cfg.model, "normalize": False}
    if cfg.mean is not None:
        cfg.network.normalize = {"mean": cfg.mean, "std": cfg.std}
    cfg.checkpoint = cfg.weights
    return cfg


def completed(cfg: DictConfig, run: Path | None) -> DictConfig:
    """The config with what the command line leaves open taken from the run.

    Raises:
        ValueError: something is open that no run says.
    """
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    saved = OmegaConf.create(read_config(run, "checkpoint", cfg.trust) if run is not None else {})
    for key in ("data", "network", "threat", "budget", "channels_last", "regularizers", "output", "layouts"):
        if cfg.get(key) is None and saved.get(key) is not None:
            cfg[key] = saved[key]
    if run is not None and cfg.get("data") is not None and cfg.data == saved.get("data"):
        for place, found in places_of(cfg.data, run.parent).items():
            cfg.data[place] = found
    for key in ("data", "network", "threat"):
        if cfg.get(key) is None:
            raise ValueError(
                f"{key}: the checkpoint lies in no run folder with a config.yaml, so say what it was trained with, "
                "e.g. data=cifar10 network=resnet18 threat=linf"
            )
    # Asked before it is resolved: a radius that only the group of the data says was chosen by nobody.
    cfg.chosen = (
        cfg.eps is not None or not OmegaConf.is_interpolation(cfg.threat, "eps") or cfg.data._target_ not in ANYTHING
    )
    if cfg.eps is not None:
        cfg.threat.eps = cfg.eps
    return cfg


def network_of(cfg: DictConfig) -> Callable[..., nn.Module]:
    """What makes the network of a config, which returns its logits alone, its layers' axes declared."""
    factory = instantiate(cfg.network)

    def make(**about: Any) -> nn.Module:
        net = reading(factory(**about), cfg.get("output"))
        declare_layouts(net, cfg.get("layouts") or {})
        return net

    return make


def command_of(run: Path | None) -> str:
    """What trained a run, as far as its folder says."""
    info = run.parent / "run.json" if run is not None else None
    known = read_object(info, "checkpoint") if info is not None and info.is_file() else {}
    return str(known.get("command", "python train.py"))


def named(weights: Path, run: Path | None) -> str:
    """What a network is called: its run folder, or its file."""
    return run.parent.name if run is not None else weights.stem


def say(notes: Iterable[str]) -> None:
    """Lines that a reader must know beside the numbers."""
    for words in notes:
        note(words)


@dataclass(frozen=True)
class Subject:
    """A network to look into, with the config completed by its run."""

    cfg: DictConfig
    data: ImageDataModule
    net: nn.Module
    weights: Path | None
    run: Path | None  # config.yaml of the run folder
    about: Fingerprint  # its data
    differs: tuple[str, ...] = ()  # how that differs from what its run was about

    @property
    def name(self) -> str:
        """Its run folder, its file, or the callable that makes it."""
        return str(self.cfg.model) if self.weights is None else named(self.weights, self.run)


def subject(cfg: DictConfig) -> Subject:
    """What ``checkpoint``, or ``model`` and ``weights``, name.

    Raises:
        ValueError: weights that are not there or do not fit, or a config that is not whole.
    """
    cfg = imported(cfg)
    theirs = {"checkpoint": "weights"} if cfg.weights is not None or cfg.model else {}
    theirs |= {"network.target": "model", "network": "model"} if cfg.model else {}
    with renamed_keys(**theirs):
        weights, run = (None, None) if cfg.model and cfg.checkpoint is None else located(cfg.checkpoint)
    own = cfg.get("data") is None
    cfg = completed(cfg, run)
    for key, least in {"seed": 0, "threads": 1, "training": 1, "images": 1, "batch": 1}.items():
        require_whole(key, cfg[key], least, null=True)
    require_one_of("split", cfg.split, ("val", "test"))
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    data = instantiate(cfg.data, batch_size=1, _convert_="all")  # nothing is trained, however few the images are
    data.setup("fit")
    about = fingerprint(data, cfg.hash_images)
    differs = () if run is None else tuple(compared(run.parent, about, "checkpoint", own))
    say(differs)
    with renamed_keys(**theirs):
        net = make_network(network_of(cfg), data, bool(cfg.get("channels_last")), differentiable=cfg.suite is None)
        if weights is not None:
            say(load_weights(net, weights).notes)
    return Subject(cfg, data, net.eval(), weights, run, about, differs)


def look_of(of: Subject, images: int) -> tuple[Look, ProbeBatch]:
    """The panels of the config, rehearsed, and the images that they will show."""
    cfg, data = of.cfg, of.data
    probe = data.probe(images, cfg.split, "images")
    attack = instantiate(cfg.attack, _convert_="all")
    attack.threat.check(data.image_shape)
    panels = instantiate(cfg.panels, _convert_="all")
    shown = ProbeSet(probe.x, probe.y, tuple(probe.ids), tuple(data.class_names), data.sample_training(cfg.training))
    look = Look(panels, shown, attack, tuple(cfg.layers), run=cfg.checkpoint, command=command_of(of.run))
    if panels:
        look = look.prepared(of.net)
        look.rehearse(of.net)
    return look, probe


def new_folder(cfg: DictConfig, default: str, whole: str, what: str) -> Path:
    """Where the results go; ``whole`` is the file that says that there are some already.

    Raises:
        ValueError: a name that is a path, or results of that name.
    """
    name = file_name(default) if cfg.name is None else cfg.name
    check_name(name, cfg.out)
    folder = Path(cfg.out) / name
    if (folder / whole).exists():
        raise ValueError(f"name: {folder} holds an {what} already; choose another name, or move it away")
    check_links(folder, "name")
    return folder
