"""Adversarial weight perturbation: learn from the gradient at the worst weights nearby (Wu et al. 2020, 2004.05884)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glassarmor.defenses.options import require_number
from glassarmor.interpret.modes import buffers_kept

Shifts = Mapping[nn.Parameter, Tensor]  # parameter → what is added to it, of its shape


@dataclass(frozen=True)
class AWP:
    """One step of the inner maximisation over weights: v = γ·‖w‖·g/‖g‖ of each weight tensor (2004.05884, § 4, K₂ = 1).

    As released, tensors of two and more dimensions move, biases and normalisations don't.  The gradient of the loss is
    taken at w + v and applied to w, weight decay included (the released code decays w + v).

    Args:
        gamma: γ, 0.005 to 0.01 as published; 0 makes it absent.
        warmup: epochs before it begins.

    Raises:
        ValueError: an option that is no finite number >= 0.
    """

    gamma: float = 0.0
    warmup: float = 0.0

    def __post_init__(self) -> None:
        for name in ("gamma", "warmup"):
            require_number(f"awp.{name}", getattr(self, name), "[0, inf)")

    def shifts(self, net: nn.Module, loss: Callable[[], Tensor]) -> dict[nn.Parameter, Tensor]:
        """v of each weight tensor that learns, along the gradient of ``loss()``, averaged over processes.

        Buffers, flags and ``.grad`` of the net are left as they were.
        """
        weights = [p for p in net.parameters() if p.dim() > 1 and p.requires_grad]
        with buffers_kept(net):
            value = loss()
            if not weights or not value.requires_grad:
                return {}
            gradients = torch.autograd.grad(value, weights, allow_unused=True)
        known = {w: g for w, g in zip(weights, gradients, strict=True) if g is not None}
        return {w: self._shift(w.detach(), g) for w, g in averaged(known).items()}

    def _shift(self, weight: Tensor, gradient: Tensor) -> Tensor:
        # In double: the squares of a tiny gradient underflow.
        length = gradient.double().norm()
        scale = self.gamma * weight.double().norm() / torch.where(length > 0, length, 1)
        return (scale * gradient).to(weight.dtype)


def averaged(gradients: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
    """Means over the processes of a distributed run, in one message; elsewhere the same tensors."""
    if not gradients or not (dist.is_available() and dist.is_initialized()):
        return gradients
    flat = torch.cat([g.flatten() for g in gradients.values()])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([g.numel() for g in gradients.values()])
    return {w: part.view_as(w) for w, part in zip(gradients, parts, strict=True)}


@contextmanager
def moved(net: nn.Module, shifts: Shifts) -> Iterator[None]:
    """Inside, ``net`` computes with w + shift, and gradients reach w: nothing has to be moved back.

    Parameters, state dict and hooks stay what they are, so a graph made inside may be used outside.
    """
    values = {weight: weight + shift for weight, shift in shifts.items()}
    places = [
        (module.__dict__, name, values[parameter])
        for module in net.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in values
    ]
    for attributes, name, value in places:
        attributes[name] = value  # an instance attribute shadows the parameter of that name
    try:
        yield
    finally:
        for attributes, name, _ in places:
            del attributes[name]
