"""Free adversarial training: the training step's own input gradient is the attack (Shafahi et al. 2019, 1904.12843)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glassarmor.defenses.options import require_whole
from glassarmor.defenses.threat import Threat
from glassarmor.interpret.inputs import checked


class Free(nn.Module):
    """x + δ with one δ that lives as long as the training and climbs by ε in each backward pass (algorithm 1).

    No forward of its own.  Each batch is trained on ``replays`` times in a row, so an epoch has that many times the steps
    (divide ``trainer.max_epochs`` by it) and the data loader repeats batches (``data.replays``).  Its images stay in the
    graph until the backward; δ moves only where the clamp to [0,1] lets a gradient through.  δ is saved with the model; in
    a distributed run that is the first process's.

    Args:
        threat: the ball; the step is its radius.
        replays: m, 4 to 8 as published.

    Raises:
        ValueError: ``replays`` is no whole number >= 1.
    """

    def __init__(self, threat: Threat, replays: int = 4) -> None:
        super().__init__()
        require_whole("defense.attack.replays", replays, 1)
        self.threat = threat
        self.replays = replays
        self.delta: Tensor | None = None  # (largest batch so far, C, H, W)

    def reseed(self, call: int) -> None:
        """It draws nothing."""

    def forward(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """x' (N, C, H, W); where gradients are enabled, a backward through it moves δ."""
        x, _, _ = checked(net, x, y, numbers=False)
        shape = (max(len(x), 0 if self.delta is None else len(self.delta)), *x.shape[1:])
        kept = torch.zeros(shape, device=x.device)
        if self.delta is not None and self.delta.shape[1:] == x.shape[1:]:
            kept[: len(self.delta)] = self.delta
        self.delta = kept
        delta = kept[: len(x)].clone()
        if torch.is_grad_enabled():
            delta.requires_grad_().register_hook(self._climb)
        return (x + delta).clamp(0, 1)

    def _climb(self, gradient: Tensor) -> None:
        assert self.delta is not None
        n, ball = len(gradient), self.threat
        # In mixed precision a step may be skipped for a gradient that is not finite; δ must survive it.
        step = ball.eps * ball.ascent(gradient.float().nan_to_num(0, 0, 0))
        delta = self.delta.clone()
        # The image's own bounds are the clamp's affair: a grey image leaves the ball alone to bind.
        grey = torch.full_like(gradient, 0.5)
        delta[:n] = ball.project(grey, grey + delta[:n] + step) - grey
        self.delta = delta

    def get_extra_state(self) -> Tensor:
        return torch.zeros(0) if self.delta is None else self.delta

    def set_extra_state(self, state: Tensor) -> None:
        self.delta = state.clone() if state.numel() else None
