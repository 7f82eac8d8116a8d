"""Look into a trained network: the full analysis of one attack on one set of images, as a page, pictures and JSON; or judge
it by a suite of attacks.

python evaluate.py checkpoint=runs/NAME attack=cw images=128
python evaluate.py checkpoint=runs/NAME suite=standard
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from glassarmor.datamodules.concepts import procedural_concepts
from glassarmor.datamodules.fingerprint import fingerprint
from glassarmor.datamodules.images import ImageDataModule, ProbeBatch
from glassarmor.defenses.attacks.pgd import PGD, Attack
from glassarmor.defenses.attacks.square import Square
from glassarmor.defenses.evaluation.card import accuracy_curve, make_card, margin_pgd
from glassarmor.defenses.evaluation.examples import FelledExamples, Replay
from glassarmor.defenses.evaluation.gradient import has_gradient
from glassarmor.defenses.evaluation.inputs import check_images, full_precision
from glassarmor.defenses.evaluation.robustness import Evaluation
from glassarmor.defenses.evaluation.sampling import stratified_rows
from glassarmor.defenses.evaluation.suite import SUITES
from glassarmor.defenses.masking import UnitMask, choose_units, mask_of, masked
from glassarmor.defenses.threat import Threat, parse_eps
from glassarmor.interpret.concepts.association import concept_weights
from glassarmor.interpret.concepts.dissection import dissect
from glassarmor.interpret.observation import feature_layers
from glassarmor.interpret.storage import check_links, check_name, file_name, plain, read_object, write_atomic
from glassarmor.interpret.views.charts import Bars, Lines, Table
from glassarmor.interpret.views.draw.figures import save, write_png
from glassarmor.interpret.views.page.page import KeyFigure, ReportPage
from glassarmor.interpret.views.panels.masking import masking_view
from glassarmor.interpret.views.panels.profiles import ProfilesPanel
from glassarmor.interpret.views.panels.versus import versus_view
from glassarmor.interpret.views.view import View
from glassarmor.lightning_modules.callbacks.checkpointing import how_chosen
from glassarmor.lightning_modules.callbacks.dashboard import Dashboard, RehearsalAttack
from glassarmor.lightning_modules.cards.report import card_view, judge, run_sanity, unset_radius, write_card
from glassarmor.lightning_modules.commands.errors import run_command
from glassarmor.lightning_modules.networks.build import load_weights, make_network
from glassarmor.lightning_modules.run.console import clear_errors, console, note, require_whole, steps
from glassarmor.lightning_modules.run.data_record import Fingerprint, compared, places_of
from glassarmor.lightning_modules.run.folder import RunFolder, commit, versions
from glassarmor.lightning_modules.run.saved_config import CONFIGS, read_config
from glassarmor.lightning_modules.study.records import training_of

SANITY_IMAGES = 256
ANYTHING = {  # data whose usual radius no config knows
    "glassarmor.datamodules.Arrays": "arrays",
    "glassarmor.datamodules.ImageFolder": "image_folder",
}
ONLY_CHECKS = "the twin serves the sanity checks alone; suite=adaptive attacks by transfer from it too"
NO_PANELS = "the panels that say why images fall need gradients, and none reaches the images of this net: they were left out"
KEY_FIGURES = (
    KeyFigure("outcome/clean_acc", "Accuracy, clean", "%"),
    KeyFigure("outcome/robust_acc", "Accuracy under attack", "%"),
    KeyFigure("outcome/success", "Success of the attack", "%"),
    KeyFigure("cam/interpretability", "Interpretability score"),
)


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


def completed(cfg: DictConfig, run: Path | None) -> DictConfig:
    """The config with what the command line leaves open taken from the run.

    Raises:
        ValueError: something is open that no run says.
    """
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    saved = OmegaConf.create(read_config(run, "checkpoint", cfg.trust) if run is not None else {})
    for key in ("data", "network", "threat", "budget", "channels_last", "regularizers"):
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


def require_masking(masking: DictConfig) -> None:
    """Raises ValueError unless share and number of images can be what they are meant to be."""
    if not isinstance(masking.share, float) or not isinstance(masking.images, int):
        raise ValueError(
            "masking: expected a share in (0, 1) and a number of images, "
            f"found share={masking.share!r} images={masking.images!r}"
        )


def choose(
    masking: DictConfig, net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, observed: Sequence[str]
) -> list[UnitMask]:
    """The mask that was asked for, and one with as many units at random."""
    layers = list(masking.layers) or [observed[-1]]
    if masking.by == "hand":
        if len(layers) != 1:
            raise ValueError(f"masking.layers: masking.by=hand masks units of one layer, found {len(layers)}")
        by_hand = mask_of(net, x[:2], layers[0], list(masking.units))
        order = torch.randperm(len(by_hand.keep[layers[0]]), generator=torch.Generator().manual_seed(0)).tolist()
        return [by_hand, mask_of(net, x[:2], layers[0], order[: len(set(masking.units))], "random")]
    weights = None
    if masking.concepts is not None:
        data = procedural_concepts(count=500, size=min(x.shape[2:]), channels=x.shape[1])
        found = dissect(net, data, layers, quantile=0.02)
        weights = {layer: concept_weights(found[layer], masking.concepts) for layer in layers}
    share, fill = masking.share, masking.fill
    return [
        choose_units(net, x, x_adv, y, layers, share, masking.by, fill=fill, weights=weights),
        choose_units(net, x, x_adv, y, layers, share, "random", fill=fill),
    ]


def compare_masked(
    masking: DictConfig, net: nn.Module, dashboard: Dashboard, choosers: ProbeBatch, device: torch.device
) -> View:
    """The net as it is, with the chosen units masked, and with as many masked at random; each attacked anew."""
    x, y = choosers.x.to(device), choosers.y.to(device)
    dashboard.attack.reseed(1)
    x_adv = dashboard.attack(net, x, y)
    masks = choose(masking, net, x, x_adv, y, dashboard.layers)
    probes = [dashboard.probe(each, device, {}) for each in (net, *(masked(net, mask).eval() for mask in masks))]
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
    net = make_network(instantiate(saved.network), data, bool(saved.get("channels_last")))
    with renamed_keys(checkpoint="against"):
        load_weights(net, weights)
    if run is not None:
        say(compared(run.parent, fingerprint(data), "against", own=False))
    return Other(named(weights, run), net.eval())


def command_of(run: Path | None) -> str:
    """What trained a run, as far as its folder says."""
    info = run.parent / "run.json" if run is not None else None
    known = read_object(info, "checkpoint") if info is not None and info.is_file() else {}
    return str(known.get("command", "python train.py"))


def named(weights: Path, run: Path | None) -> str:
    """What a network is called: its run folder, or its file."""
    return run.parent.name if run is not None else weights.stem


def compare_networks(name: str, net: nn.Module, other: Other, dashboard: Dashboard, device: torch.device) -> View:
    """The profiles of both networks on the same images, each attacked anew."""
    twin = copy.copy(dashboard)
    twin.layers, twin.run = (), other.name  # it has layers of its own
    panel = next((p for p in dashboard.panels.values() if isinstance(p, ProfilesPanel)), ProfilesPanel())
    probes = (dashboard.probe(net, device, {}), twin.probe(other.net.to(device), device, {}))
    return versus_view((name, other.name), probes, panel)


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
    theirs = {"checkpoint": "weights", "network.target": "model", "network": "model"} if cfg.model else {}
    with renamed_keys(**theirs):
        weights, run = (None, None) if cfg.model and cfg.checkpoint is None else located(cfg.checkpoint)
    own = cfg.get("data") is None
    cfg = completed(cfg, run)
    require_whole(cfg, {"seed": 0, "threads": 1, "training": 1, "images": 1, "batch": 1})
    if cfg.split not in ("test", "val"):
        raise ValueError(f"split: expected val or test, found {cfg.split!r}")
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    data = instantiate(cfg.data, batch_size=1, _convert_="all")  # nothing is trained, however few the images are
    data.setup("fit")
    about = fingerprint(data, cfg.hash_images)
    differs = () if run is None else tuple(compared(run.parent, about, "checkpoint", own))
    say(differs)
    with renamed_keys(**theirs):
        net = make_network(instantiate(cfg.network), data, bool(cfg.get("channels_last")), differentiable=cfg.suite is None)
        if weights is not None:
            load_weights(net if cfg.mean is None else net.get_submodule("net"), weights)
    return Subject(cfg, data, net.eval(), weights, run, about, differs)


def say(notes: Iterable[str]) -> None:
    """Lines that a reader must know beside the numbers."""
    for words in notes:
        note(words)


def dashboard_of(of: Subject, images: int) -> tuple[Dashboard, ProbeBatch]:
    """The panels of the config, rehearsed, and the images that they will show."""
    cfg, data = of.cfg, of.data
    probe = data.probe(images, cfg.split, "images")
    attack = instantiate(cfg.attack, _convert_="all")
    attack.threat.check(data.image_shape)
    dashboard = Dashboard(
        instantiate(cfg.panels, _convert_="all"),
        probe.x,
        probe.y,
        probe.ids,
        attack,
        data.class_names,
        layers=list(cfg.layers),
        training=data.sample_training(cfg.training),
    )
    dashboard.run, dashboard.command = cfg.checkpoint, command_of(of.run)
    if dashboard.panels:
        dashboard.prepare(of.net)
        dashboard.rehearse(of.net)
    return dashboard, probe


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


def draw(folder: Path, meta: dict[str, Any], views: list[View], figures: tuple[KeyFigure, ...]) -> ReportPage:
    """A self-contained page, and a PNG and SVG a panel."""
    folder.mkdir(parents=True, exist_ok=True)
    for view in views:
        if view.figure is not None:
            write_png(view.figure, folder / f"{view.name}.png")
        if view.drawing is not None:
            save(view.drawing, folder / f"{view.name}.svg")
    page = ReportPage(folder, folder.name, meta, key_figures=figures, overview=None)
    page.write_epoch(0, 0, {}, views)
    page.finish()
    return page


def analyse(cfg: DictConfig, attack_name: str) -> Path:
    """Attack, observe, measure, draw; returns the folder that holds the page, the pictures and ``analysis.json``."""
    with clear_errors(cfg.debug):
        of = subject(cfg)
        cfg, data, net = of.cfg, of.data, of.net
        dashboard, images = dashboard_of(of, 128 if cfg.images is None else cfg.images)
        attack = dashboard.attack
        if not dashboard.panels:
            raise ValueError("panels: expected at least one, found none")
        if cfg.masking.by is not None:
            require_masking(cfg.masking)
            choosers = data.probe(min(cfg.masking.images, len(data.val)), "val", "masking.images")
            few = choosers.x[:2]
            rehearsed = RehearsalAttack(attack.threat)(net, few, choosers.y[:2])
            choose(cfg.masking, net, few, rehearsed, choosers.y[:2], dashboard.layers)
        other = None if cfg.against is None else against(cfg, data)
        folder = new_folder(cfg, f"{of.name}_{attack_name}", "analysis.json", "analysis")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = net.to(device)
    with steps(folder.name) as tell:
        views = dashboard.look(net, device, {}, tell)
        if cfg.masking.by is not None:
            tell("masking")
            views.append(compare_masked(cfg.masking, net, dashboard, choosers, device))
        if other is not None:
            tell(other.name)
            views.insert(0, compare_networks(of.name, net, other, dashboard, device))
    meta = {
        "checkpoint": str(of.weights),
        "attack": f"{attack_name}, {attack.threat}",
        "images": f"{len(images.ids)} of the {cfg.split} split, hash {images.hash}",
        "observed layers": ", ".join(dashboard.layers),
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


def imported(cfg: DictConfig) -> DictConfig:
    """The config with ``model`` and ``weights`` in the places of ``network`` and ``checkpoint``, where they are given.

    Raises:
        ValueError: both ways are used at once.
    """
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    if cfg.model is None:
        for key in ("weights", "mean", "std"):
            if cfg[key] is not None:
                raise ValueError(f"{key}: expected model=module:callable beside it, found {key}={cfg[key]} alone")
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


def radius_unset(cfg: DictConfig, threat: Threat, channels: int) -> tuple[str, ...]:
    """What to say where ε is only the default of data that can be anything; of a run's own radius, for grey images alone."""
    default = (cfg.get("budget") or {}).get(threat.name.lower())
    inherited = channels == 1 and cfg.eps is None and default is not None and threat.eps == parse_eps(default)
    if cfg.data._target_ not in ANYTHING or (cfg.chosen and not inherited):
        return ()
    return (unset_radius(threat, channels, ANYTHING[cfg.data._target_]),)


def judge_by_suite(cfg: DictConfig) -> Path:
    """Robust accuracy by ``cfg.suite``, whether to trust it, and why images fell; returns the folder of ``card.json``."""
    with clear_errors(cfg.debug):
        if cfg.suite not in SUITES:
            raise ValueError(f"suite: expected {', '.join(SUITES)}; found {cfg.suite!r}")
        of = subject(cfg)
        cfg, data, net = of.cfg, of.data, of.net
        twin, twin_differs = None, list[str]()
        if cfg.twin is not None:
            with renamed_keys(checkpoint="twin", network="twin"):
                twin_weights, twin_run = located(cfg.twin)
                saved = cfg if twin_run is None else OmegaConf.create(read_config(twin_run, "twin", cfg.trust))
                twin = make_network(instantiate(saved.network), data).eval()
                load_weights(twin, twin_weights)
            if twin_run is not None:
                twin_differs = compared(twin_run.parent, of.about, "twin", own=False)
        part = data.test if cfg.split == "test" else data.val
        if cfg.images is not None and cfg.images > len(part):
            raise ValueError(f"images: expected 1 to {len(part)} images of the {cfg.split} split, found {cfg.images}")
        threat = instantiate(cfg.threat)
        unset = radius_unset(cfg, threat, data.image_shape[0])
        images, labels = part.images.float() / 255, part.labels
        check_images(net, images, labels, threat)
        if threat.eps <= 0:
            raise ValueError(f"eps: expected a radius above 0, found {threat.eps}")
        terms = instantiate(cfg.regularizers or {}, _convert_="all")
        left_out = (*((ONLY_CHECKS,) if twin is not None and cfg.suite != "adaptive" else ()), *twin_differs)
        if not has_gradient(net, images):
            if cfg.masking.by is not None:
                raise ValueError("masking: units are chosen by gradients, and none reaches the images of this net")
            cfg.panels = {}
            left_out = (*left_out, NO_PANELS)
        left_out = (*left_out, *unset)
        say(left_out)
        if cfg.masking.by is not None:
            require_masking(cfg.masking)
            choosers = data.probe(min(cfg.masking.images, len(data.val)), "val", "masking.images")
            x_adv = PGD(threat, steps=20, seed=cfg.seed)(net, choosers.x, choosers.y)
            layers = feature_layers(net, choosers.x[:2])
            net = masked(net, choose(cfg.masking, net, choosers.x, x_adv, choosers.y, layers)[0]).eval()
        dashboard, _ = dashboard_of(replace(of, cfg=cfg, net=net), min(128, cfg.images or len(part)))
        through = f"_masked_by_{cfg.masking.by}" if cfg.masking.by is not None else ""
        folder = new_folder(cfg, f"{of.name}_{cfg.suite}{through}", "card.json", "evaluation")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, twin = net.to(device), None if twin is None else twin.to(device)
    fallen = FelledExamples(len(dashboard.ids), folder / "fallen.npz")
    found = judge(
        net,
        images,
        labels,
        threat,
        cfg.suite,
        folder,
        subset=cfg.images,
        batch_size=cfg.batch,
        seed=cfg.seed,
        terms=terms,
        twin=twin,
        corruptions=cfg.corruptions,
        fallen=fallen,
    )
    found = replace(found, notes=(*found.notes, *left_out))
    console.print(f"attacks done; next sanity checks, accuracy against ε, {len(dashboard.panels)} panels")
    with steps(folder.name) as tell:
        few = stratified_rows(found.labels, min(SANITY_IMAGES, found.n), cfg.seed)
        x, y = images[found.rows[few]].to(device), labels[found.rows[few]].to(device)
        held = found.standing[few]
        sanity = run_sanity(net, x, y, held, threat, twin, cfg.seed, found, lambda step: tell(f"sanity, {step}"))
        explained = choose_explained(found, fallen.places, len(dashboard.ids))
        dashboard.x, dashboard.y = images[found.rows[explained]], labels[found.rows[explained]]
        dashboard.ids = tuple(image_name(cfg.split, found, place) for place in explained.tolist())
        dashboard.attack = Replay(fallen, explained, dashboard.attack)
        tell("accuracy against ε")
        curve = accuracy_curve(net, x, y, threat, attack=margin_pgd if found.gradient else few_queries)
        with full_precision(device):  # some attacks stop just over the boundary
            views = (
                [without_accuracies(v) for v in dashboard.look(net, device, {}, tell, strict=False)]
                if dashboard.panels
                else []
            )
    source = "as the callable returns it" if of.weights is None else str(of.weights)
    if cfg.masking.by is not None:
        source += f", units masked by {cfg.masking.by}"
    card = make_card(
        found,
        threat,
        model={"name": of.name, "source": source, "parameters": sum(p.numel() for p in net.parameters()), **trained(of)},
        data={
            "name": str(cfg.data.get("_target_", "")).rpartition(".")[2],
            "split": cfg.split,
            "selection": selection(of, cfg.split),
            "fingerprint": of.about["splits"][cfg.split],
            "differs": list(of.differs),
        },
        class_names=data.class_names,
        curve=curve,
        sanity=sanity,
        interpretation={key: value for view in views for key, value in view.scalars.items()},
        seed=cfg.seed,
        versions=versions(),
        commit=commit(),
        config=plain(OmegaConf.to_container(cfg, resolve=True)),
        places=few.tolist(),
    )
    lead = card_view(card, sanity, found, unset)
    meta = {
        "network": source,
        "suite": f"{cfg.suite}, {threat}",
        "images": f"{found.n} of the {cfg.split} split, hash {found.fingerprint['images']}",
        "panels": panel_images(found, explained, dashboard.attack)
        if views
        else NO_PANELS
        if NO_PANELS in left_out
        else "none",
        "seed": cfg.seed,
        "commit": commit(),
    }
    page = draw(folder, meta, [lead, *views], ())
    write_card(folder, card)
    console.print(lead.headline, style="bold")
    console.print(f"page      {page.index}\ncard      {folder / 'card.md'} and card.json")
    return folder


def few_queries(threat: Threat) -> Attack:
    """What draws the accuracy against ε of a net without gradients."""
    return Square(threat, queries=300, seed=7)


def choose_explained(found: Evaluation, kept: Tensor, most: int) -> Tensor:
    """Which judged images the panels show, by place: three in four that the suite felled where there are so many.

    First those whose adversarial image was ``kept`` (k,), as the sample orders them; the others as chance has it.
    """
    chance = torch.randperm(found.n, generator=torch.Generator().manual_seed(0))
    chance = torch.cat([kept, chance[~torch.isin(chance, kept)]])
    fell, held, wrong = (chance[each[chance]] for each in (found.felled >= 0, found.standing, found.felled < -1))
    fell = fell[: max(most - len(held), most * 3 // 4)]
    return torch.cat([fell, held, wrong])[:most]


def without_accuracies(view: View) -> View:
    """The accuracies of the images that a suite's page shows are no estimate: the images were chosen because they fell."""
    if view.name != "outcome":
        return view
    return replace(view, headline=f"Among the images chosen for this page: {view.headline}", answers=())


def image_name(split: str, found: Evaluation, place: int) -> str:
    """A judged image by its row, and the attack that felled it."""
    attack = int(found.felled[place])
    return f"{split}-{int(found.rows[place])}" + (f", felled by {found.attacks[attack].name}" if attack >= 0 else "")


def panel_images(found: Evaluation, explained: Tensor, attack: Replay) -> str:
    """Which images the panels show, and by which adversarial images."""
    felled = found.felled[explained]
    by = [(a.name, int((felled[attack.known] == place).sum())) for place, a in enumerate(found.attacks)]
    told = ", ".join(f"{count} by {name}" for name, count in by if count)
    own = type(attack.attack).__name__
    kinds = {"stood": felled == -1, "were wrong without any attack": felled < -1, "fell": (felled >= 0) & ~attack.known}
    others = ", ".join(f"{int(which.sum())} that {words}" for words, which in kinds.items() if which.any())
    text = f"{len(explained)} of these images"
    text += f"; as the suite felled them: {told}" if told else ""
    return text + (f"; attacked by {own} for the page: {others}" if others else "")


def selection(of: Subject, split: str) -> str:
    """What chose the weights, as far as their folder says."""
    if of.run is None or of.weights is None:
        return "unknown: the weights lie in no run folder"
    if of.weights.name != "best.ckpt":
        return f"{of.weights.name} of its run: the epoch was not selected"
    return f"{how_chosen(of.weights)} (best.ckpt)" + ("; these images chose it: not a test" if split == "val" else "")


def trained(of: Subject) -> dict[str, Any]:
    """What the card says of the training: the hash of the config that ran, and what was changed on the way."""
    return {} if of.run is None or of.weights is None else {"training": training_of(of.run.parent)}


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Entry point; see ``python evaluate.py --help`` for the groups."""
    if cfg.suite is not None:
        judge_by_suite(cfg)
    else:
        analyse(cfg, HydraConfig.get().runtime.choices["attack"])


def run() -> None:
    """``python evaluate.py``, ``glassarmor evaluate``."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its hints are not about this run
    run_command(main, CONFIGS, "evaluate", "the same command goes on where a suite was; an analysis begins anew")
