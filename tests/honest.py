"""Nets that hide nothing, of many families, and images with flat areas: what no sanity check may call out."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassarmor.defenses.attacks.pgd import FGSMRS
from glassarmor.defenses.threat import Linf
from tests.reference.nets import seeded

CLASSES, SIDE, EPS = 5, 16, 0.06

# Images, (n, 3, 16, 16), and labels


def _fields(n: int, generator: torch.Generator, cells: int = 4) -> Tensor:
    """Smooth random colour fields about 0, as soft as photographs."""
    return F.interpolate(torch.randn(n, 3, cells, cells, generator=generator), SIDE, mode="bicubic")


def natural(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """One field a class under fields and noise of each image's own."""
    generator = seeded(seed)
    y = torch.randint(CLASSES, (n,), generator=generator)
    own = 0.09 * _fields(n, generator, 6) + 0.02 * torch.randn(n, 3, SIDE, SIDE, generator=generator)
    return (0.5 + 0.13 * _fields(CLASSES, seeded(100))[y] + own).clamp(0, 1), y


def black(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """A few grey strokes on black: as handwritten digits, one figure a class, at a place of its own."""
    generator = seeded(seed)
    y = torch.randint(CLASSES, (n,), generator=generator)
    figures = (F.interpolate(torch.rand(CLASSES, 1, 5, 5, generator=seeded(101)), 10, mode="bicubic") - 0.45).clamp(0, 1)
    images = torch.zeros(n, 3, SIDE, SIDE)
    places = torch.randint(SIDE - 9, (n, 2), generator=generator).tolist()
    bright = 1.2 + torch.rand(n, generator=generator)
    for i, (top, left) in enumerate(places):
        images[i, :, top : top + 10, left : left + 10] = (bright[i] * figures[y[i]]).clamp(0, 1)
    return images, y


def white(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Strokes on white."""
    images, y = black(n, seed)
    return 1 - images, y


def letterboxed(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Photographs between two black bars."""
    images, y = natural(n, seed)
    images[:, :, :4], images[:, :, -4:] = 0, 0
    return images, y


def cartoon(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Flat areas of five grey levels a channel, black and white among them."""
    images, y = natural(n, seed)
    coarse = F.avg_pool2d(images - 0.5, 4) * 2.2 + 0.5
    return (coarse.clamp(0, 1) * 4).round().div(4).repeat_interleave(4, 2).repeat_interleave(4, 3), y


IMAGES: dict[str, Callable[[int, int], tuple[Tensor, Tensor]]] = {
    "natural": natural,
    "black": black,
    "white": white,
    "letterboxed": letterboxed,
    "cartoon": cartoon,
}

# Nets


def _block(inner: int, outer: int, act: Callable[[], nn.Module] = nn.ReLU, norm: bool = True, **conv: int) -> nn.Sequential:
    layers = [nn.Conv2d(inner, outer, 3, padding=conv.pop("padding", 1), **conv)]
    return nn.Sequential(*layers, *([nn.BatchNorm2d(outer)] if norm else []), act())


def _headed(*layers: nn.Module, width: int = 16) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def _plain(act: Callable[[], nn.Module], pool: Callable[[], nn.Module], norm: bool = True) -> nn.Sequential:
    return _headed(_block(3, 8, act, norm), pool(), _block(8, 16, act, norm), pool(), _block(16, 16, act, norm))


class Median(nn.Module):
    """The median of each 3×3 neighbourhood."""

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3)
        return patches.view(len(x), x.shape[1], 9, -1).median(2).values.view_as(x)


class Maxout(nn.Module):
    """The larger of two halves of the channels (Goodfellow et al. 2013, 1302.4389)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(*x.chunk(2, 1))


class Sum(nn.Module):
    """x + f(x), a residual block."""

    def __init__(self, inside: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.inside, self.after = inside, after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.inside(x))


class Joined(nn.Module):
    """Branches side by side, as channels; of x itself too if ``dense``."""

    def __init__(self, *branches: nn.Module, dense: bool = False) -> None:
        super().__init__()
        self.branches, self.dense = nn.ModuleList(branches), dense

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.dense + [branch(x) for branch in self.branches], 1)


class Excited(nn.Module):
    """Channels weighted by a sigmoid of their means (Hu et al. 2018, 1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weigh = nn.Sequential(nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weigh(x.mean((2, 3)))[..., None, None]


class ViT(nn.Module):
    """Patches of 4×4, two layers of attention, the mean token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, stride=4)
        self.place = nn.Parameter(0.02 * torch.randn(1, 16, 24))
        layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.layers(tokens).mean(1))


def _residual(channels: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> Sum:
    convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
    return Sum(nn.Sequential(convs[0], norm(channels), nn.ReLU(), convs[1], norm(channels)), nn.ReLU())


def _max() -> nn.Module:
    return nn.MaxPool2d(2)


def _mean() -> nn.Module:
    return nn.AvgPool2d(2)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "conv, BN, ReLU, max-pool": lambda: _plain(nn.ReLU, _max),
    "conv, BN, ReLU, overlapping max-pool": lambda: _plain(nn.ReLU, lambda: nn.MaxPool2d(3, 2, 1)),
    "max-pool on the image": lambda: _headed(nn.MaxPool2d(2), _block(3, 16), _max(), _block(16, 16)),
    "median filter": lambda: nn.Sequential(Median(), _plain(nn.ReLU, _max)),
    "conv, BN, ReLU, average pool": lambda: _plain(nn.ReLU, _mean),
    "conv, ReLU, no normalisation": lambda: _plain(nn.ReLU, _max, norm=False),
    "leaky ReLU": lambda: _plain(lambda: nn.LeakyReLU(0.1), _max),
    "GELU": lambda: _plain(nn.GELU, _max),
    "SiLU, strided": lambda: _headed(_block(3, 8, nn.SiLU, stride=2), _block(8, 16, nn.SiLU, stride=2)),
    "sigmoid": lambda: _plain(nn.Sigmoid, _mean),
    "tanh": lambda: _plain(nn.Tanh, _max),
    "ReLU6 and hard swish": lambda: _headed(_block(3, 8, nn.ReLU6), _max(), _block(8, 16, nn.Hardswish)),
    "maxout": lambda: _headed(nn.Conv2d(3, 16, 3, padding=1), Maxout(), _mean(), nn.Conv2d(8, 32, 3, padding=1), Maxout()),
    "ResNet": lambda: _headed(_block(3, 16), _residual(16), _max(), _residual(16)),
    "ResNet, group normalisation": lambda: _headed(_block(3, 16), _residual(16, lambda c: nn.GroupNorm(4, c)), _mean()),
    "layer normalisation": lambda: _headed(
        nn.Conv2d(3, 16, 3, 2, 1), nn.LayerNorm([16, 8, 8]), nn.GELU(), nn.Conv2d(16, 16, 3, 2, 1), nn.GELU()
    ),
    "instance normalisation": lambda: _headed(
        nn.Conv2d(3, 16, 3, padding=1), nn.InstanceNorm2d(16, affine=True), nn.ReLU(), _max(), _block(16, 16)
    ),
    "dense connections": lambda: _headed(
        _block(3, 8), Joined(_block(8, 8), dense=True), _max(), Joined(_block(16, 8), dense=True), width=24
    ),
    "squeeze and excite": lambda: _headed(_block(3, 16), Excited(16), _max(), _block(16, 16), Excited(16)),
    "depthwise": lambda: _headed(_block(3, 16), _block(16, 16, groups=16), nn.Conv2d(16, 16, 1), nn.ReLU(), _max()),
    "dilated": lambda: _headed(_block(3, 8), _block(8, 16, dilation=2, padding=2), _max()),
    "inception": lambda: _headed(
        _block(3, 8),
        Joined(nn.Conv2d(8, 8, 1), _block(8, 8), nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 8, 1))),
        width=24,
    ),
    "dropout": lambda: _headed(_block(3, 8), nn.Dropout2d(0.2), _max(), _block(8, 16), nn.Dropout(0.2)),
    "perceptron": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES)
    ),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, CLASSES)),
    "global max-pool": lambda: nn.Sequential(
        _block(3, 16), _max(), _block(16, 16), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)
    ),
    "vision transformer": ViT,
}


def trained(family: str, images: str, seed: int = 0, steps: int = 120, robust: bool = True) -> nn.Module:
    """A net after a few seconds of training, on one-step attacks if ``robust``; in eval mode."""
    steps *= 3 if family == "vision transformer" else 1  # attention learns slowly
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = FAMILIES[family]()
        x, y = IMAGES[images](1024, seed + 1)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.005)
        attack = FGSMRS(Linf(EPS), seed=seed)
        for step in range(steps):
            rows = torch.randint(len(x), (64,))
            shown = attack(net, x[rows], y[rows]) if robust and step > steps // 4 else x[rows]
            loss = F.cross_entropy(net.train()(shown), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()
