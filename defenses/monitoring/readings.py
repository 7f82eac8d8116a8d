"""A look at the health of robust training: what one-step, multi-step and other attacks do to the same held-out images.

The measures are cheap enough to be taken while a network trains; the alarms say which of them are bad news.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from scipy.stats import binom
from torch import Tensor, nn

from glassarmor.defenses.attacks.objectives import Margin
from glassarmor.defenses.attacks.pgd import FGSM, PGD
from glassarmor.defenses.threat import Threat, norms
from glassarmor.defenses.training.local import GradAlign, loss_and_gradient
from glassarmor.interpret.modes import undisturbed
from glassarmor.interpret.observation import Observation, observe
from glassarmor.interpret.profiles.background import background_features
from glassarmor.interpret.profiles.profiles import centroids, evidence_position, turning_layer
from glassarmor.interpret.signals.pse import KIND_NAMES, unit_effects

NOISES: Final = 4  # draws of noise that a thorough look compares with the attack
LONGER: Final = 4  # times as many steps
LUCK: Final = 0.01  # one guesser in a hundred is as lucky
FEW: Final = 32  # images that gradients and signals are read from, which would cost more and say less by more images
MULTI_STEP: Final = ("pgd", "margin", "longer")  # accuracies, all of the same images, of which the lowest is believed


@dataclass(frozen=True)
class Reading:
    """One look: ``values`` by name, shares in [0,1]; what was not measured is missing."""

    epoch: int
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Images:
    """What every reading looks at: held-out images (N, C, H, W) in [0,1], labels (N,), and training images that stand for
    their classes (M, C, H, W), labels (M,).
    """

    x: Tensor
    y: Tensor
    background: tuple[Tensor, Tensor]

    def to(self, device: torch.device) -> Images:
        images, labels = self.background
        return Images(self.x.to(device), self.y.to(device), (images.to(device), labels.to(device)))


def measure(
    net: nn.Module,
    images: Images,
    threat: Threat,
    layers: Sequence[str],
    *,
    steps: int = 5,
    thorough: bool = True,
    suspect: float | None = None,
    eps_share: float = 1.0,
    seed: int = 0,
) -> dict[str, float]:
    """All measures of the network as it is now, in eval mode and fp32; the net is left as it was.

    ======================  ============================================================================================
    ``nonfinite``           weights, else logits that are not finite, of ``weights`` or ``logits`` in all; where there are
                            any, nothing else is measured
    ``clean fgsm pgd``      accuracies; PGD with ``steps`` steps from a random start
    ``guess one_class``     is it better than guessing (:func:`guessing`)?
    ``gap``                 ``fgsm`` − the lowest of ``pgd margin longer`` that was measured: above 0.2 the net answers
                            one-step attacks and no others (Wong 2020); while ε climbs, in the ball that training has
                            reached, ``eps_share`` of ε: in a larger one every net answers one step better than many
    ``misalignment``        mean 1 − cos of the input gradients at x and at noise (Andriushchenko & Flammarion 2020)
    ``zero_gradient``       share of images whose input gradient is exactly zero
    ``dead``                largest share over the layers of units that never change; ``dead/LAYER`` each
    ``kind_drift``          distance of the shares of the kinds of units (PSE) under FGSM and under PGD (ours)
    ``turning_drift``       distance of the distributions of turning layers under FGSM and under PGD (ours)
    ``kinds_one/KIND``      the shares themselves, and ``kinds_many/KIND``; ``depth_one``, ``depth_many``: mean turning
                            layer, 0 the first, 1 none
    thorough: ``noise``     accuracy under the worst of four draws of noise from the ball; ``noise_wins``: share of images
                            that PGD leaves right and noise does not
    ``margin longer``       accuracies under PGD on the margin loss, and with four times the steps; ``margin_gain``,
                            ``step_gain``: how far below ``pgd`` they are
    ======================  ============================================================================================

    Accuracies, and what is made of them, are of all images; gradients, dead units, kinds and turning layers of the first
    ``FEW``.  Distances are total variation, ½ Σ|p − q|, in [0,1].  Forwards, gradients not counted: steps + 4 passes over
    all images, thorough 5·steps + 6 more, 8 over the few, and one over the background.

    Args:
        layers: observed, in execution order; PSE is read at the last of them, by unit.
        suspect: a gap from which on the look is thorough, asked or not: more steps may show that it is worse.
        eps_share: the share of the threat's ε that training attacks with by now, in [0, 1].
    """
    broken, weights = count_nonfinite(net)
    if broken:
        return {"nonfinite": float(broken), "weights": float(weights)}
    x, y = images.x, images.y
    one, many = FGSM(threat)(net, x, y), PGD(threat, steps, seed=seed)(net, x, y)
    few, labels = x[:FEW], y[:FEW]
    with undisturbed(net):
        with torch.no_grad():
            logits = net(torch.cat([x, one, many]))
        broken = int((~logits.isfinite()).sum())
        if broken:
            return {"nonfinite": float(broken), "logits": float(logits.numel())}
        clean, fgsm, pgd = (logits.argmax(1) == y.repeat(3)).chunk(3)
        attacked = torch.cat([one[:FEW], many[:FEW]])
        obs = observe(net, few.repeat(2, 1, 1, 1), attacked, labels.repeat(2), layers=layers)
        found = {
            "nonfinite": 0.0,
            "clean": share(clean),
            "fgsm": share(fgsm),
            "pgd": share(pgd),
            **guessing(logits[: len(y)].argmax(1), y, logits.shape[1]),
            **gradients(net, few, labels, threat, seed),
            **dead_units(obs),
            **kinds(obs, layers[-1]),
            **turning(net, obs, images.background, layers),
        }
    here = {"fgsm": found["fgsm"], "pgd": found["pgd"]}
    if eps_share < 1:
        found["eps_share"], here = eps_share, withstood(net, x, y, threat.scaled(eps_share), steps, seed)
    if thorough or (suspect is not None and here["fgsm"] - here["pgd"] >= suspect):
        found |= other_attacks(net, x, y, threat, steps, pgd, seed)
        here |= {name: found[name] for name in MULTI_STEP}
        if eps_share < 1:
            here = withstood(net, x, y, threat.scaled(eps_share), steps, seed, longer=True)
    found["gap"] = here["fgsm"] - min(here[name] for name in MULTI_STEP if name in here)
    return found


def withstood(
    net: nn.Module, x: Tensor, y: Tensor, threat: Threat, steps: int, seed: int = 0, longer: bool = False
) -> dict[str, float]:
    """Accuracies ``fgsm`` and ``pgd`` in this ball, and ``longer`` if asked; a ball of no size holds the image alone."""
    attacks: dict[str, PGD] = {}
    if threat.eps > 0:
        attacks = {"fgsm": FGSM(threat), "pgd": PGD(threat, steps, seed=seed)}
        attacks |= {"longer": PGD(threat, LONGER * steps, seed=seed)} if longer else {}
    attacked = {name: attack(net, x, y) for name, attack in attacks.items()} or {"fgsm": x, "pgd": x}
    with undisturbed(net), torch.no_grad():
        return {name: share(net(images).argmax(1) == y) for name, images in attacked.items()}


def count_nonfinite(net: nn.Module) -> tuple[int, int]:
    """How many weights and running statistics are not finite, and of how many."""
    held = [p for p in (*net.parameters(), *net.buffers()) if p.is_floating_point()]
    return sum(int((~p.isfinite()).sum()) for p in held), sum(p.numel() for p in held)


@contextmanager
def watched_logits(net: nn.Module) -> Iterator[list[Tensor]]:
    """Every output of the net meanwhile, its images or attacked ones, as one flag: is any logit not finite?

    Weights that are all finite can be so large that their logits are not.
    """
    flags: list[Tensor] = []

    def look(module: nn.Module, inputs: object, logits: Tensor) -> None:
        broken = ~logits.detach().isfinite().all()
        flags[:] = [broken | flags[0] if flags else broken]  # read at the end: no wait for the device on the way

    handle = net.register_forward_hook(look)
    try:
        yield flags
    finally:
        handle.remove()


def guessing(answers: Tensor, y: Tensor, classes: int) -> dict[str, float]:
    """Does the net know anything?  From its answers (N,) to clean images and their labels (N,); ours.

    ``guess``: the accuracy from which on luck is ruled out (by answers as frequent as these that do not depend on the
    image, and by 1/``classes``, it is reached with probability ``LUCK`` at most), as a multiple of the net's own.  Above 1
    the net is not told from a guesser.  Left out where so few images rule out nothing.
    ``one_class``: share of the images of other classes that get the commonest answer; left out where there are none.
    """
    labels, given = (torch.bincount(v, minlength=classes) for v in (y, answers))
    agreement = float((labels * given).sum()) / len(y) ** 2
    needed = int(binom.isf(LUCK, len(y), max(agreement, 1 / classes))) + 1
    right, other = int((answers == y).sum()), y != given.argmax()
    found = {"guess": needed / max(right, 1)} if needed <= len(y) else {}
    return found | ({"one_class": share(answers[other] == given.argmax())} if other.any() else {})


def share(flags: Tensor) -> float:
    return float(flags.float().mean())


def total_variation(p: Tensor, q: Tensor) -> float:
    """½ Σ|p − q| of two distributions (K,): 0 where they agree, 1 where they have nothing in common."""
    return float((p - q).abs().sum() / 2)


@torch.no_grad()
def gradients(net: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int = 0) -> dict[str, float]:
    """``misalignment``, the value that the GradAlign term would penalise, and ``zero_gradient``."""
    here = observe(net, x, x, y)
    _, gradient = loss_and_gradient(here, x, y)
    return {
        "misalignment": float(GradAlign(threat, seed=seed)(here).mean()),
        "zero_gradient": share(norms(gradient, float("inf")) == 0),
    }


def dead_units(obs: Observation) -> dict[str, float]:
    """By observed layer the share of units with one and the same output at every position of every image, x and x'."""
    found = {}
    for layer, clean in obs.clean.acts.items():
        units = torch.cat([clean, obs.adv.acts[layer]]).detach().transpose(0, 1).flatten(1)  # (C, …)
        found[f"dead/{layer}"] = share(units.amax(1) == units.amin(1))
    return {"dead": max(found.values()), **found}


def kinds(obs: Observation, layer: str) -> dict[str, float]:
    """Shares of the kinds of units under the first half of the attacked images and under the second, and their distance."""
    sides = unit_effects(obs, layer).kind.chunk(2)
    one, many = (torch.bincount(kind.flatten(), minlength=len(KIND_NAMES)) / kind.numel() for kind in sides)
    named = {
        f"kinds_{side}/{name}": float(value)
        for side, shares in (("one", one), ("many", many))
        for name, value in zip(KIND_NAMES, shares, strict=True)
    }
    return {"kind_drift": total_variation(one, many), **named}


@torch.no_grad()
def turning(net: nn.Module, obs: Observation, background: tuple[Tensor, Tensor], layers: Sequence[str]) -> dict[str, float]:
    """Where the first half of the attacked images turns and where the second, and the distance of the distributions.

    An image whose classes the background does not hold turns nowhere.
    """
    known = background_features(net, [background], layers)
    classes = obs.adv.logits.shape[1]
    clean, adv = [], []
    for layer, features in known.features.items():
        centre = centroids(features, known.labels, classes)
        ends = centre[obs.y], centre[obs.target]
        clean.append(evidence_position(known.phi(obs.clean.acts[layer]), *ends))
        adv.append(evidence_position(known.phi(obs.adv.acts[layer]), *ends))
    turned = turning_layer(torch.stack(clean), torch.stack(adv))
    where = torch.where(turned < 0, len(layers), turned)
    one, many = (torch.bincount(part, minlength=len(layers) + 1) / len(part) for part in where.chunk(2))
    depth_one, depth_many = (float(part.float().mean() / len(layers)) for part in where.chunk(2))
    return {"turning_drift": total_variation(one, many), "depth_one": depth_one, "depth_many": depth_many}


def other_attacks(
    net: nn.Module, x: Tensor, y: Tensor, threat: Threat, steps: int, right: Tensor, seed: int = 0
) -> dict[str, float]:
    """Does anything beat PGD by much?  Then its gradients are masked.  ``right`` (N,): what PGD leaves right."""
    generator = torch.Generator(x.device).manual_seed(seed)
    noisy = [threat.project(x, x + threat.noise(x, generator)) for _ in range(NOISES)]
    margin = PGD(threat, steps, objective=Margin(), seed=seed)(net, x, y)
    longer = PGD(threat, LONGER * steps, seed=seed)(net, x, y)
    with undisturbed(net), torch.no_grad():
        answers = net(torch.cat([*noisy, margin, longer])).argmax(1).view(NOISES + 2, -1) == y
    in_noise, pgd = answers[:NOISES].all(0), share(right)
    found = {"noise": share(in_noise), "margin": share(answers[-2]), "longer": share(answers[-1])}
    return {
        **found,
        "noise_wins": share(right & ~in_noise),
        "margin_gain": pgd - found["margin"],
        "step_gain": pgd - found["longer"],
    }
