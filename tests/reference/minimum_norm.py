"""Smallest changes that cross a hyperplane, and group norms: slow, float64, from the definitions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tests.reference.nets import conv_bn


def bisect(reaches, low: float, high: float) -> float:
    """The smallest multiplier that reaches, to 60 halvings; ``reaches(high)`` holds."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def shortest_in_box(x: Tensor, w: Tensor, gap: Tensor) -> Tensor:
    """L2 length of the shortest δ with w·δ = gap and x + δ in [0,1], (N,); inf where there is none.

    Stationarity: δ = clip(λ w) for one multiplier λ ≥ 0.
    """
    lengths = []
    for xi, wi, gi in zip(x.double().numpy(), w.double().numpy(), gap.double().numpy(), strict=True):

        def delta(multiplier, xi=xi, wi=wi):
            return np.clip(xi + multiplier * wi, 0, 1) - xi

        def reaches(multiplier, wi=wi, gi=gi, delta=delta):
            return wi @ delta(multiplier) >= gi

        lengths.append(np.linalg.norm(delta(bisect(reaches, 0.0, 1e6))) if reaches(1e6) else np.inf)
    return torch.tensor(lengths, dtype=torch.float32)


def elastic_net(w: Tensor, gap: float, beta: float) -> Tensor:
    """argmin ‖δ‖₂² + β‖δ‖₁ subject to w·δ = gap, (N, D): δ = sign(w) max(λ|w| − β, 0) / 2."""
    rows = []
    for wi in w.double().numpy():

        def delta(multiplier, wi=wi):
            return np.sign(wi) * np.maximum(multiplier * np.abs(wi) - beta, 0) / 2

        rows.append(delta(bisect(lambda m, wi=wi, delta=delta: wi @ delta(m) >= gap, 0.0, 1e6)))
    return torch.tensor(np.stack(rows), dtype=torch.float32)


def undecided(x: Tensor, lead: float = 0.1) -> tuple[nn.Sequential, Tensor]:
    """A small net with dropout, and its predictions on x, (N,), which lead by ``lead`` logits where they lead least.

    So that a few steps change some of them.
    """
    net = conv_bn(dropout=0.3).eval()
    with torch.no_grad():
        winner = net(x).sum(0).argmax()
        first, second = net(x).topk(2, 1).values.T
        net.head.bias[winner] -= (first - second).min() - lead
        return net, net(x).argmax(1)


def group_norms(delta: Tensor, side: int) -> Tensor:
    """‖δ_G‖₂ for square cells of ``side`` pixels, cut off at the border, (N, rows, columns)."""
    values = delta.double().numpy()
    n, _, height, width = values.shape
    squares = np.zeros((n, -(-height // side), -(-width // side)))
    for i in range(height):
        for j in range(width):
            squares[:, i // side, j // side] += (values[:, :, i, j] ** 2).sum(1)
    return torch.tensor(np.sqrt(squares), dtype=torch.float32)
