"""Directional derivatives by central differences, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from glassarmor.interpret.observation import Observation, observe
from tests.reference.nets import seeded, smooth

MODES = ("eval", "joined", "shared")
# Below, at and above each of the layers act1 and act2: convolutions, both affine parts of both BatchNorms, the head.
PARAMETERS = ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias", "head.weight")


def setting(
    mode: str, create_graph: bool = True, layers: tuple[str, ...] = ("act1", "act2")
) -> tuple[nn.Module, Callable[[], Observation]]:
    """A smooth float64 net and an observation of it in eval mode, in a joined train-mode pass, or with shared statistics."""
    net = smooth().train(mode != "eval")
    x = torch.rand(3, 2, 6, 6, generator=seeded(1), dtype=torch.float64)
    x_adv = (x + 0.4 * torch.randn(x.shape, generator=seeded(2), dtype=torch.float64)).clamp(0, 1)
    y, target = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])

    def observed() -> Observation:
        return observe(net, x, x_adv, y, target=target, layers=layers, joined=mode == "joined", create_graph=create_graph)

    return net, observed


def check(net: nn.Module, value: Callable[[], Tensor], parameters: tuple[str, ...] = PARAMETERS, h: float = 1e-6) -> None:
    """``value`` (a scalar) differentiated by autograd equals central differences along a random direction."""
    named = [(name, net.get_parameter(name)) for name in parameters]
    analytic = torch.autograd.grad(value(), [p for _, p in named], allow_unused=True)
    largest = 0.0
    for (name, p), gradient in zip(named, analytic, strict=True):
        direction = torch.randn(p.shape, generator=seeded(7), dtype=p.dtype)
        with torch.no_grad():
            start = p.clone()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                p.copy_(start + sign * h * direction)
            ends.append(float(value().detach()))
        with torch.no_grad():
            p.copy_(start)
        numeric = (ends[0] - ends[1]) / (2 * h)
        found = 0.0 if gradient is None else float((gradient * direction).sum())
        assert found == pytest.approx(numeric, rel=1e-5, abs=1e-7), name
        largest = max(largest, abs(numeric))
    assert largest > 1e-4, "the value depends on no parameter: nothing was tested"


def weighted(signal: Tensor) -> Tensor:
    """A scalar that every entry of the signal moves."""
    return (signal * torch.randn(signal.shape, generator=seeded(11), dtype=signal.dtype)).sum()


def every(*names: str) -> list[tuple[str, str]]:
    return [(mode, name) for mode in MODES for name in names]
