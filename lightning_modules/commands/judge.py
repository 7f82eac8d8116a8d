"""Judge a network by a suite of attacks: robust accuracy, whether to trust it, and why images fell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from glassarmor.datamodules.images import ImageDataModule
from glassarmor.defenses.attacks.pgd import PGD, Attack
from glassarmor.defenses.attacks.square import Square
from glassarmor.defenses.evaluation.card import accuracy_curve, make_card, margin_pgd
from glassarmor.defenses.evaluation.examples import FelledExamples, Replay
from glassarmor.defenses.evaluation.gradient import has_gradient
from glassarmor.defenses.evaluation.inputs import check_images, full_precision
from glassarmor.defenses.evaluation.robustness import Evaluation
from glassarmor.defenses.evaluation.sampling import stratified_rows
from glassarmor.defenses.evaluation.sanity import SanityReport
from glassarmor.defenses.evaluation.suite import SUITES, SuiteSettings
from glassarmor.defenses.masking import masked
from glassarmor.defenses.threat import Threat, parse_eps
from glassarmor.interpret.observation import feature_layers
from glassarmor.interpret.storage import plain
from glassarmor.interpret.views.view import View
from glassarmor.lightning_modules.callbacks.checkpointing import how_chosen
from glassarmor.lightning_modules.callbacks.look import Look
from glassarmor.lightning_modules.cards.page import draw
from glassarmor.lightning_modules.cards.report import card_view, judge, run_sanity, unset_radius, write_card
from glassarmor.lightning_modules.commands.masking import choose, require_masking
from glassarmor.lightning_modules.commands.subject import (
    ANYTHING,
    Subject,
    located,
    look_of,
    network_of,
    new_folder,
    renamed_keys,
    say,
    subject,
)
from glassarmor.lightning_modules.networks.build import load_weights, make_network
from glassarmor.lightning_modules.run.console import console, steps
from glassarmor.lightning_modules.run.data_record import compared
from glassarmor.lightning_modules.run.folder import commit, versions
from glassarmor.lightning_modules.run.saved_config import read_config
from glassarmor.lightning_modules.study.records import training_of

SANITY_IMAGES = 256
ONLY_CHECKS = "the twin serves the sanity checks alone; suite=adaptive attacks by transfer from it too"
NO_PANELS = "the panels that say why images fall need gradients, and none reaches the images of this net: they were left out"


@dataclass(frozen=True, eq=False)
class Request:
    """What is to be judged and how, checked; the config is in it only as what the card records."""

    net: nn.Module  # in eval mode, through its mask where it has one
    images: Tensor  # (N, C, H, W) in [0,1]
    labels: Tensor  # (N,)
    split: str
    threat: Threat
    settings: SuiteSettings
    look: Look  # rehearsed
    folder: Path
    source: str  # of the weights
    model: Mapping[str, Any]  # what the card says of the network, and of the data
    data: Mapping[str, Any]
    class_names: tuple[str, ...]
    unset: tuple[str, ...]  # what to say of a radius that nobody chose
    notes: tuple[str, ...]
    config: Mapping[str, Any]


def make_request(cfg: DictConfig) -> Request:
    """What ``cfg`` asks for, with everything that can be refused refused.

    Raises:
        ValueError: names the key of the config.
    """
    if cfg.suite not in SUITES:
        raise ValueError(f"suite: expected {', '.join(SUITES)}; found {cfg.suite!r}")
    of = subject(cfg)
    cfg, data, net = of.cfg, of.data, of.net
    twin, twin_differs = twin_of(of)
    images, labels = images_of(cfg, data)
    threat = instantiate(cfg.threat)
    unset = radius_unset(cfg, threat, data.image_shape[0])
    check_images(net, images, labels, threat)
    if threat.eps <= 0:
        raise ValueError(f"eps: expected a radius above 0, found {threat.eps}")
    terms = instantiate(cfg.regularizers or {}, _convert_="all")
    notes = (*((ONLY_CHECKS,) if twin is not None and cfg.suite != "adaptive" else ()), *twin_differs)
    if not has_gradient(net, images):
        if cfg.masking.by is not None:
            raise ValueError("masking: units are chosen by gradients, and none reaches the images of this net")
        cfg = without_panels(cfg)
        notes = (*notes, NO_PANELS)
    notes = (*notes, *unset)
    say(notes)
    net, through = masked_as_asked(cfg, data, net, threat)
    of = replace(of, cfg=cfg, net=net)
    look, _ = look_of(of, min(128, cfg.images or len(labels)))
    source = "as the callable returns it" if of.weights is None else str(of.weights)
    if through:
        source += f", units masked by {cfg.masking.by}"
    return Request(
        net=net,
        images=images,
        labels=labels,
        split=cfg.split,
        threat=threat,
        settings=SuiteSettings(cfg.suite, cfg.images, cfg.batch, cfg.seed, terms, twin, cfg.corruptions),
        look=look,
        folder=new_folder(cfg, f"{of.name}_{cfg.suite}{through}", "card.json", "evaluation"),
        source=source,
        model={"name": of.name, "source": source, "parameters": sum(p.numel() for p in net.parameters()), **trained(of)},
        data=described(of),
        class_names=tuple(data.class_names),
        unset=unset,
        notes=notes,
        config=plain(OmegaConf.to_container(cfg, resolve=True)),
    )


def twin_of(of: Subject) -> tuple[nn.Module | None, list[str]]:
    """The undefended net of ``cfg.twin``, and how its data differs.

    Raises:
        ValueError: no such weights, or weights that do not fit.
    """
    cfg = of.cfg
    if cfg.twin is None:
        return None, []
    with renamed_keys(checkpoint="twin", network="twin"):
        weights, run = located(cfg.twin)
        saved = cfg if run is None else OmegaConf.create(read_config(run, "twin", cfg.trust))
        twin = make_network(network_of(saved), of.data).eval()
        say(load_weights(twin, weights).notes)
    return twin, [] if run is None else compared(run.parent, of.about, "twin", own=False)


def images_of(cfg: DictConfig, data: ImageDataModule) -> tuple[Tensor, Tensor]:
    """All images of the split that is judged, in [0,1], and their labels.

    Raises:
        ValueError: fewer than are to be judged.
    """
    part = data.test if cfg.split == "test" else data.val
    if cfg.images is not None and cfg.images > len(part):
        raise ValueError(f"images: expected 1 to {len(part)} images of the {cfg.split} split, found {cfg.images}")
    return part.images.float() / 255, part.labels


def without_panels(cfg: DictConfig) -> DictConfig:
    cfg = cfg.copy()
    cfg.panels = {}
    return cfg


def masked_as_asked(cfg: DictConfig, data: ImageDataModule, net: nn.Module, threat: Threat) -> tuple[nn.Module, str]:
    """The net through the mask of ``cfg.masking``, and what its folder is called for it; itself where none is asked for."""
    if cfg.masking.by is None:
        return net, ""
    require_masking(cfg.masking)
    choosers = data.probe(min(cfg.masking.images, len(data.val)), "val", "masking.images")
    x_adv = PGD(threat, steps=20, seed=cfg.seed)(net, choosers.x, choosers.y)
    layers = feature_layers(net, choosers.x[:2])
    mask = choose(cfg.masking, net, choosers.x, x_adv, choosers.y, layers)[0]
    return masked(net, mask).eval(), f"_masked_by_{cfg.masking.by}"


def radius_unset(cfg: DictConfig, threat: Threat, channels: int) -> tuple[str, ...]:
    """What to say where ε is only the default of data that can be anything; of a run's own radius, for grey images alone."""
    default = (cfg.get("budget") or {}).get(threat.name.lower())
    inherited = channels == 1 and cfg.eps is None and default is not None and threat.eps == parse_eps(default)
    if cfg.data._target_ not in ANYTHING or (cfg.chosen and not inherited):
        return ()
    return (unset_radius(threat, channels, ANYTHING[cfg.data._target_]),)


def described(of: Subject) -> dict[str, Any]:
    """What the card says of the data."""
    split = of.cfg.split
    return {
        "name": str(of.cfg.data.get("_target_", "")).rpartition(".")[2],
        "split": split,
        "selection": selection(of, split),
        "fingerprint": of.about["splits"][split],
        "differs": list(of.differs),
    }


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


@dataclass(frozen=True, eq=False)
class Explained:
    """Whether a number is to be trusted, and why images fell."""

    places: tuple[int, ...]  # of the images of the checks and of the curve among those that were judged
    sanity: SanityReport
    curve: tuple[tuple[float, float], ...]
    views: tuple[View, ...]
    shown: str  # which images the panels show


def judge_by_suite(asked: Request) -> Path:
    """Robust accuracy by a suite, whether to trust it, and why images fell; returns the folder of ``card.json``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, twin, look = asked.net.to(device), asked.settings.twin, asked.look
    settings = replace(asked.settings, twin=None if twin is None else twin.to(device))
    felled = FelledExamples(len(look.probe_set.ids), asked.folder / "fallen.npz")
    found = judge(net, asked.images, asked.labels, asked.threat, settings, asked.folder, felled)
    found = replace(found, notes=(*found.notes, *asked.notes))
    console.print(f"attacks done; next sanity checks, accuracy against ε, {len(look.panels)} panels")
    why = explain(asked, net, settings, found, felled, device)
    card = make_card(
        found,
        asked.threat,
        model=asked.model,
        data=asked.data,
        class_names=asked.class_names,
        curve=why.curve,
        sanity=why.sanity,
        interpretation={key: value for view in why.views for key, value in view.scalars.items()},
        seed=settings.seed,
        versions=versions(),
        commit=commit(),
        config=asked.config,
        places=why.places,
    )
    lead = card_view(card, why.sanity, found, asked.unset)
    meta = {
        "network": asked.source,
        "suite": f"{settings.suite}, {asked.threat}",
        "images": f"{found.n} of the {asked.split} split, hash {found.fingerprint['images']}",
        "panels": why.shown,
        "seed": settings.seed,
        "commit": commit(),
    }
    page = draw(asked.folder, meta, [lead, *why.views], ())
    write_card(asked.folder, card)
    console.print(lead.headline, style="bold")
    console.print(f"page      {page.index}\ncard      {asked.folder / 'card.md'} and card.json")
    return asked.folder


def explain(
    asked: Request,
    net: nn.Module,
    settings: SuiteSettings,
    found: Evaluation,
    felled: FelledExamples,
    device: torch.device,
) -> Explained:
    """Sanity checks, accuracy against ε, and the panels on images that fell or stood."""
    images, labels, threat, seed = asked.images, asked.labels, asked.threat, settings.seed
    with steps(asked.folder.name) as tell:
        few = stratified_rows(found.labels, min(SANITY_IMAGES, found.n), seed)
        x, y = images[found.rows[few]].to(device), labels[found.rows[few]].to(device)
        held = found.standing[few]
        sanity = run_sanity(net, x, y, held, threat, settings.twin, seed, found, lambda step: tell(f"sanity, {step}"))
        explained = choose_explained(found, felled.places, len(asked.look.probe_set.ids))
        x_shown, y_shown = images[found.rows[explained]], labels[found.rows[explained]]
        ids = tuple(image_name(asked.split, found, place) for place in explained.tolist())
        replay = Replay(felled, explained, asked.look.attack)
        look = replace(asked.look, probe_set=replace(asked.look.probe_set, x=x_shown, y=y_shown, ids=ids), attack=replay)
        tell("accuracy against ε")
        curve = accuracy_curve(net, x, y, threat, attack=margin_pgd if found.gradient else few_queries)
        views: list[View] = []
        if look.panels:
            with full_precision(device):  # some attacks stop just over the boundary
                views = [without_accuracies(view) for view in look.views(net, device, {}, tell, strict=False)]
    shown = NO_PANELS if NO_PANELS in asked.notes else "none"
    if views:
        shown = panel_images(found, explained, replay)
    return Explained(tuple(few.tolist()), sanity, curve, tuple(views), shown)


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
