"""Activation Profiles: where, layer by layer, an image stands between two classes (following the idea of 2103.10229).

The evidence axis and the turning layer are ours: they give the vertical axis of a profile a meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12


def pooled(activation: Tensor) -> Tensor:
    """φ of a layer: its mean over positions, fp32, (N, C)."""
    activation = activation.float()
    return activation.flatten(2).mean(2) if activation.dim() > 2 else activation


def evidence_position(features: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Place of each sample on the line from the centroid of its true class (0) to that of the target (1), (N,).

    e = ⟨φ − μ_t0, μ_t − μ_t0⟩ / ‖μ_t − μ_t0‖².

    Args:
        features: φ(x), (N, D).
        start, end: μ_t0 and μ_t of each sample, (N, D).
    """
    way = end - start
    return ((features - start) * way).sum(1) / way.square().sum(1).clamp_min(EPS)


def turning_layer(clean: Tensor, adv: Tensor) -> Tensor:
    """First layer from which on the adversarial line stays above ½ while the clean line is below it there, (N,) int64.

    −1 where the adversarial line ends below ½, or the clean line is above ½ at every such layer.

    Args:
        clean, adv: evidence positions by layer in execution order, (L, N).
    """
    above = adv > 0.5
    stays = above.flip(0).cumprod(0).flip(0).bool()  # above here and at every later layer
    turned = stays & (clean < 0.5)
    first = turned.int().argmax(0)
    return torch.where(turned.any(0), first, -1)
