"""Accuracy under attacks, counted exactly over a whole split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glassarmor.defenses.attacks.pgd import Attack
from glassarmor.defenses.evaluation.inputs import predict
from glassarmor.interpret.inputs import checked


def accuracy_under(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], attacks: Mapping[str, Attack], device: torch.device
) -> dict[str, float]:
    """Share of correct predictions, clean and under each attack, in eval mode; the net is left as it was.

    In a process group the processes take turns among the batches, and each gets what one process alone would find.

    Args:
        batches: (x, y) with x in [0,1], (N, C, H, W), and y (N,); the whole split, on every process.
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
    rank, processes = (dist.get_rank(), dist.get_world_size()) if _grouped() else (0, 1)
    correct: dict[int, dict[str, Tensor]] = {}  # by batch
    for index, (x, y) in enumerate(batches):
        if index % processes != rank:
            continue
        x, y, labels = checked(net, x.to(device), y.to(device))
        images = {"clean": x}
        for name, attack in attacks.items():
            attack.reseed(index)
            images[name] = attack(net, x, y)
        correct[index] = {name: (predict(net, given, labels).argmax(1) == y).cpu() for name, given in images.items()}
    if _grouped():
        parts: list[dict[int, dict[str, Tensor]]] = [{} for _ in range(processes)]
        dist.all_gather_object(parts, correct)
        correct = {index: found for part in parts for index, found in part.items()}
    if not correct:
        raise ValueError("evaluation: expected at least one batch, found none")
    return {name: torch.cat([correct[index][name] for index in sorted(correct)]) for name in ("clean", *attacks)}


def answers_to(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    """What the net says of clean images, in eval mode, and their labels: (N,) int64 each, on the CPU.

    Raises:
        ValueError: no batch.
    """
    answers, labels = [], []
    for x, y in batches:
        answers.append(predict(net, x.to(device)).argmax(1).cpu())
        labels.append(y.cpu())
    if not answers:
        raise ValueError("evaluation: expected at least one batch, found none")
    return torch.cat(answers), torch.cat(labels)


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
