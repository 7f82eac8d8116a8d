"""Small networks whose behaviour is known, and what the tests compare of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def conv_bn(channels: tuple[int, int] = (6, 8), classes: int = 5, dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """Conv–BN–ReLU twice, global average pooling, linear head; layers act1 (H, W) and act2 (H/2, W/2)."""
    torch.manual_seed(seed)
    parts: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(3, channels[0], 3, padding=1, bias=False)),
        ("bn1", nn.BatchNorm2d(channels[0])),
        ("act1", nn.ReLU()),
        ("conv2", nn.Conv2d(channels[0], channels[1], 3, stride=2, padding=1, bias=False)),
        ("bn2", nn.BatchNorm2d(channels[1])),
        ("act2", nn.ReLU()),
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
    ]
    if dropout:
        parts.insert(3, ("drop", nn.Dropout2d(dropout)))
    parts.append(("head", nn.Linear(channels[1], classes)))
    net = nn.Sequential(OrderedDict(parts))
    with torch.no_grad():  # statistics and scales that are not the identity, so that ignoring them shows
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.3, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
            elif isinstance(module, nn.Conv2d):
                module.weight.mul_(3)  # so that a perturbation moves the logits
        net.head.weight.mul_(5)
    return net


def smooth(seed: int = 0) -> nn.Sequential:
    """A float64 net without kinks; layers act1 and act2, BatchNorm below, between and nothing but a pooled head above."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(2, 3, 3, padding=1),
            bn1=nn.BatchNorm2d(3),
            act1=nn.Softplus(),
            conv2=nn.Conv2d(3, 4, 3, stride=2, padding=1),
            bn2=nn.BatchNorm2d(4),
            act2=nn.Tanh(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(4, 3),
        )
    ).double()
    with torch.no_grad():
        for bn in (net.bn1, net.bn2):
            bn.weight.uniform_(0.5, 1.5)
            bn.bias.normal_(0, 0.3)
            bn.running_mean.normal_(0, 0.2)
            bn.running_var.uniform_(0.3, 1.5)
        net.head.weight.mul_(3)
    return net


class Residual(nn.Module):
    """Stem, two residual blocks (the second halves the resolution), BatchNorm, pooled linear head."""

    class Block(nn.Module):
        def __init__(self, inner: int, outer: int, stride: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(inner, outer, 3, stride=stride, padding=1)
            self.bn = nn.BatchNorm2d(outer)
            self.shortcut = nn.Conv2d(inner, outer, 1, stride=stride)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.bn(self.conv(x)) + self.shortcut(x))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block1 = self.Block(6, 6, 1)
        self.block2 = self.Block(6, 8, 2)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.weight.mul_(3)  # so that a perturbation moves the logits

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block2(self.block1(self.stem(x)))).mean((2, 3)))


class Linear(nn.Module):
    """Z = W x + b on the flattened image: everything about it is known in closed form."""

    def __init__(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> None:
        super().__init__()
        self.head = nn.Linear(shape[0] * shape[1] * shape[2], classes)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=seeded(seed)))
            self.head.bias.copy_(torch.randn(classes, generator=seeded(seed + 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def batch(n: int = 4, size: int = 8, channels: int = 3, classes: int = 5, eps: float = 0.1, seed: int = 0):
    """Images in [0.15, 0.85], perturbed images within eps, labels."""
    generator = seeded(seed)
    x = torch.rand(n, channels, size, size, generator=generator) * 0.7 + 0.15
    x_adv = (x + (torch.rand(x.shape, generator=generator) * 2 - 1) * eps).clamp(0, 1)
    return x, x_adv, torch.randint(classes, (n,), generator=generator)


def hooks(net: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks)
        for m in net.modules()
    )


@contextmanager
def unchanged(net: nn.Module) -> Iterator[None]:
    """Fails unless the block leaves the net as it found it, bit for bit, the objects themselves included."""

    def snapshot() -> dict[str, object]:
        return {
            "modes": [m.training for m in net.modules()],
            "flags": [p.requires_grad for p in net.parameters()],
            "grad objects": [id(p.grad) for p in net.parameters()],
            "parameter objects": [id(p) for p in net.parameters()],
            "buffer objects": [id(b) for b in net.buffers()],
            "hooks": hooks(net),
            "forwards": [m.__dict__.get("forward") for m in net.modules()],
        }

    before = snapshot()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    try:
        yield
    finally:
        after = snapshot()
        for what, value in before.items():
            assert after[what] == value, f"{what} changed"
        for name, value in net.state_dict().items():
            assert torch.equal(value, state[name]), f"state {name} changed"
        for parameter, grad in zip(net.parameters(), grads, strict=True):
            assert grad is None or torch.equal(parameter.grad, grad), ".grad changed"


def untidy(net: nn.Module) -> nn.Module:
    """A net in the middle of training: mixed modes, some flags off, gradients present."""
    net.train()
    for index, module in enumerate(net.modules()):
        if index % 3 == 2:
            module.training = False
    for index, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, 0.25) if index % 2 else None
        parameter.requires_grad_(index % 4 != 1)
    return net
