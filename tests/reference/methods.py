"""Training methods as loops, written from the papers: slow, in place, one thing after another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn


def awp_step(net: nn.Module, loss: Callable[[nn.Module], Tensor], gamma: float) -> float:
    """2004.05884, section 4: move the weights to where the loss is larger, backward there, move them back.

    Leaves ``.grad``; returns the loss at the moved weights.
    """
    proxy = copy.deepcopy(net)  # as released: its BatchNorm statistics are thrown away with it
    proxy.zero_grad()
    loss(proxy).backward()
    old = {}
    for (name, weight), (_, twin) in zip(net.named_parameters(), proxy.named_parameters(), strict=True):
        if weight.dim() <= 1:
            continue
        w, g = weight.detach().numpy().astype(np.float64), twin.grad.numpy().astype(np.float64)
        v = gamma * np.sqrt((w**2).sum()) * g / np.sqrt((g**2).sum())
        old[name] = weight.detach().clone()
        weight.data = torch.tensor(w + v, dtype=weight.dtype)
    net.zero_grad()
    value = loss(net)
    value.backward()
    for name, weight in net.named_parameters():
        if name in old:
            weight.data = old[name]
    return float(value.detach())


def free_training(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], eps: float, replays: int, optimizer: torch.optim.Optimizer
) -> Tensor:
    """1904.12843, algorithm 1, L∞; returns δ."""
    delta: Tensor | None = None
    for x, y in batches:
        if delta is None:
            delta = torch.zeros_like(x)
        for _ in range(replays):
            noise = delta[: len(x)].clone().requires_grad_()
            loss = nn.functional.cross_entropy(net((x + noise).clamp(0, 1)), y)
            optimizer.zero_grad()
            loss.backward()
            delta[: len(x)] = (delta[: len(x)] + eps * noise.grad.sign()).clamp(-eps, eps)
            optimizer.step()
    assert delta is not None
    return delta
