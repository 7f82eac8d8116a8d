"""Chunks follow the largest activation, and leave the net as it was; results don't depend on them beyond rounding."""

from __future__ import annotations

import torch
from torch import nn

from glassarmor.interpret.network.chunks import Largest, measuring
from glassarmor.interpret.signals.pse import region_effects


def test_the_chunk_keeps_the_largest_activation_in_the_cache() -> None:
    net = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))
    with measuring(net) as largest:
        net(torch.rand(5, 1, 32, 32))
    assert largest.elements == 64 * 32 * 32  # whatever the batch
    assert largest.chunk(torch.device("cpu")) == 32
    assert Largest(10).chunk(torch.device("cpu")) == 256
    assert Largest(10**8).chunk(torch.device("cpu")) == 16
    assert not any(module._forward_hooks for module in net.modules())


def test_effects_are_the_same_at_any_chunk() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    x = torch.rand(3, 1, 8, 8)
    x_adv, y = (x + 0.1 * torch.randn_like(x)).clamp(0, 1), torch.tensor([0, 1, 2])
    chosen = region_effects(net, x, x_adv, y, regions=(4, 4))
    for chunk in (1, 7, 1000):
        other = region_effects(net, x, x_adv, y, regions=(4, 4), chunk=chunk)
        torch.testing.assert_close(chosen.promotion, other.promotion, atol=1e-5, rtol=0)
