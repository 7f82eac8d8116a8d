"""Class activation maps, signed and in logits, so that the maps of x and of x' compare (Zhou 2016; Selvaraju 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from glassarmor.interpret.observation import Label, Observation, Side


def class_activation_map(obs: Observation, layer: str, label: Label | Tensor = "true", side: Side = "adv") -> Tensor:
    """Map of a class (given classes: (N,), one a sample) over the positions of a layer, (N, h, w), signed, differentiable.

    P · Σ_k ∂Z_c/∂A_k(p) · A_k(p) at each of the P positions p: gradient times activation, place by place.  Below global
    average pooling and a linear head it is exactly Zhou's CAM, Σ_k w_ck A_k, and its mean plus the bias is the logit.
    Below a head that weighs places differently (flatten and linear) Grad-CAM, which averages the gradient over places
    first, points elsewhere; this map does not (its mean plus the bias is the logit again, where the head is linear).
    Nothing is rescaled per map: clean and adversarial share one scale.  Of tokens, the grid is shown; class tokens and
    registers stand for no place.

    Raises:
        ValueError: the layer's positions form no map.
    """
    act = obs.side(side).acts[layer].float()
    evidence = obs.maps(layer, (obs.layer_gradient(layer, side, label) * act).sum(1), lead=1)
    return evidence * evidence[0].numel()


def cam_change(obs: Observation, layer: str, label: Label | Tensor = "true") -> Tensor:
    """Signed difference CAM_c(x') − CAM_c(x), (N, h, w)."""
    return class_activation_map(obs, layer, label, "adv") - class_activation_map(obs, layer, label, "clean")


@dataclass(frozen=True)
class CAMTable:
    """The four maps C(x,t0), C(x,t), C(x',t0), C(x',t), each (N, h, w), signed and on one scale."""

    clean_true: Tensor
    clean_target: Tensor
    adv_true: Tensor
    adv_target: Tensor


def cam_table(obs: Observation, layer: str) -> CAMTable:
    """The maps of both labels at both images, from one observation: two backward passes a side serve all four."""
    return CAMTable(
        clean_true=class_activation_map(obs, layer, "true", "clean"),
        clean_target=class_activation_map(obs, layer, "target", "clean"),
        adv_true=class_activation_map(obs, layer, "true", "adv"),
        adv_target=class_activation_map(obs, layer, "target", "adv"),
    )


def upsampled(cam: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, h, w) bilinearly over the image, (N, H, W)."""
    return interpolate(cam[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]


def class_region(cam: Tensor, size: tuple[int, int], quantile: float = 0.8) -> Tensor:
    """B_c = [CAM_c ≥ its q-quantile over the image], (N, H, W) bool; a share 1 − q of the pixels unless values tie.

    Raises:
        ValueError: a quantile outside [0, 1).
    """
    if not 0 <= quantile < 1:
        raise ValueError(f"quantile: expected 0 <= quantile < 1, found {quantile}")
    large = upsampled(cam, size)
    flat = large.flatten(1)
    # kthvalue: torch.quantile refuses large batches.
    threshold = flat.kthvalue(int(quantile * flat.shape[1]) + 1, dim=1).values
    return large >= threshold[:, None, None]


def interpretability_score(cam: Tensor, delta: Tensor, quantile: float = 0.8) -> Tensor:
    """IS(δ, c) = ‖B_c ∘ δ‖₂ / ‖δ‖₂ per sample, (N,) in [0,1] (ours, following StrAttack 1808.01664).

    Says nothing without its controls: see :func:`interpretability`.

    Args:
        cam: map of class c, (N, h, w).
        delta: x' − x, (N, C, H, W).  Where it is 0 the score is NaN.
    """
    height, width = delta.shape[-2:]
    energy = delta.float().square().sum(1)
    inside = (energy * class_region(cam, (height, width), quantile)).sum((1, 2))
    return (inside / energy.sum((1, 2))).sqrt()


@dataclass(frozen=True)
class Interpretability:
    """Interpretability score and what it must beat, each (N,).

    ``chance``: sqrt(mean(B_c)), the score of a δ spread evenly.  ``shuffled``: with the positions of the map permuted, so
    that a δ gathered in few places gets its own, lower, chance level.  ``swapped``: with the map of the next image of the
    batch, which shares habits such as looking at the middle; NaN for a batch of one.
    """

    score: Tensor
    chance: Tensor
    shuffled: Tensor
    swapped: Tensor


@torch.no_grad()
def interpretability(
    cam: Tensor, delta: Tensor, quantile: float = 0.8, *, draws: int = 20, seed: int = 0
) -> Interpretability:
    """:func:`interpretability_score` with its chance level and two controls (ours).

    Args:
        draws: permutations that ``shuffled`` averages over, from a generator of their own.
    """
    n, height, width = cam.shape
    generator = torch.Generator().manual_seed(seed)
    shuffled = []
    for _ in range(draws):
        order = torch.rand(n, height * width, generator=generator).argsort(1).to(cam.device)
        mixed = cam.flatten(1).gather(1, order).view_as(cam)
        shuffled.append(interpretability_score(mixed, delta, quantile))
    region = class_region(cam, (delta.shape[-2], delta.shape[-1]), quantile)
    swapped = interpretability_score(cam.roll(1, 0), delta, quantile)
    return Interpretability(
        score=interpretability_score(cam, delta, quantile),
        chance=region.float().mean((1, 2)).sqrt(),
        shuffled=torch.stack(shuffled).mean(0),
        swapped=swapped if n > 1 else torch.full_like(swapped, torch.nan),
    )
