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
    return {name: float(right.double().mean()) for name, right in correct_under(net, batches, attacks, device).items()}


def correct_under(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], attacks: Mapping[str, Attack], device: torch.device
) -> dict[str, Tensor]:
    """As :func:`accuracy_under`, image by image in the order of the batches: (N,) bool on the CPU, by attack.

    Raises:
        ValueError: no batch.
    """
    correct: dict[str, list[Tensor]] = {name: [] for name in ("clean", *attacks)}
    for index, (x, y) in enumerate(batches):
        x, y = x.to(device), y.to(device)
        images = {"clean": x}
        for name, attack in attacks.items():
            attack.reseed(index)
            images[name] = attack(net, x, y)
        with undisturbed(net), torch.no_grad():
            for name, x_attacked in images.items():
                correct[name].append((net(x_attacked).argmax(1) == y).cpu())
    if not correct["clean"]:
        raise ValueError("evaluation: expected at least one batch, found none")
    return {name: torch.cat(parts) for name, parts in correct.items()}
