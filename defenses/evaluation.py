"""Accuracy under attacks, counted exactly over a whole split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from defenses.attacks import Attack
from interpret.modes import undisturbed


def accuracy_under(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], attacks: Mapping[str, Attack], device: torch.device
) -> dict[str, float]:
    """Share of correct predictions, clean and under each attack, in eval mode; the net is left as it was.

    Args:
        batches: (x, y) with x in [0,1], (N, C, H, W), and y (N,).
        attacks: by name.

    Returns:
        ``{"clean": …, name: …}``, each in [0,1].

    Raises:
        ValueError: no batch.
    """
    correct = dict.fromkeys(["clean", *attacks], 0)
    total = 0
    for index, (x, y) in enumerate(batches):
        x, y = x.to(device), y.to(device)
        total += len(y)
        images = {"clean": x}
        for name, attack in attacks.items():
            attack.reseed(index)
            images[name] = attack(net, x, y)
        with undisturbed(net), torch.no_grad():
            for name, x_attacked in images.items():
                correct[name] += int((net(x_attacked).argmax(1) == y).sum())
    if total == 0:
        raise ValueError("evaluation: expected at least one batch, found none")
    return {name: count / total for name, count in correct.items()}
