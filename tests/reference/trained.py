"""A small net that has learned something, and an attack that fools it: signals of an untrained net prove little."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from tests.reference.nets import Residual, conv_bn, seeded

CLASSES, SIZE = 5, 8


def images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy copies of one random pattern a class, (n, 3, 8, 8) in [0,1], and their labels."""
    patterns = torch.rand(CLASSES, 3, SIZE, SIZE, generator=seeded(100)) * 0.3 + 0.35
    generator = seeded(seed)
    y = torch.randint(CLASSES, (n,), generator=generator)
    return (patterns[y] + 0.15 * torch.randn(n, 3, SIZE, SIZE, generator=generator)).clamp(0, 1), y


def pgd(net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int = 10) -> Tensor:
    """Plain L∞ PGD without random start."""
    x_adv = x.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(net(x_adv), y), x_adv)
        x_adv = (x_adv.detach() + eps / 4 * gradient.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return x_adv


@cache
def _weights(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = make().train()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    x, y = images(512, seed=1)
    for step in range(80):
        rows = torch.arange(step * 64, step * 64 + 64) % 512
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    return net.state_dict()


def attacked(
    make: Callable[[], nn.Module] = conv_bn, n: int = 8, eps: float = 0.1
) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A fresh copy of the trained net in eval mode; x, x', true labels, targets."""
    net = make()
    net.load_state_dict(_weights(make))
    net.eval()
    x, y = images(n, seed=2)
    x_adv = pgd(net, x, y, eps)
    target = net(x_adv).detach().scatter(1, y[:, None], -torch.inf).argmax(1)
    return net, x, x_adv, y, target


__all__ = ["Residual", "attacked", "conv_bn", "images", "pgd"]
