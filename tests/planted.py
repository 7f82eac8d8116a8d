"""Defenses that hide their gradients, planted on any trained classifier, and nets that hide nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Planted(nn.Module):
    """``net`` behind a defense."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


class Quantised(Planted):
    """The input rounded to 8 grey levels: its derivative is zero."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 7).round() / 7)


class Saturated(Planted):
    """Logits so large that the softmax is 0 or 1 in fp32."""

    scale = 1000.0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


class Noisy(Planted):
    """Gaussian noise on every image, in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.05 * torch.randn_like(x))


class Resized(Planted):
    """Each batch shrunk to a random size and put at a random place (after Xie et al. 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-1]
        small = int(torch.randint(side - max(2, side // 8), side, ()))
        left, top = (int(torch.randint(side - small + 1, ())) for _ in range(2))
        image = F.interpolate(x, size=(small, small), mode="bilinear", align_corners=False)
        return self.net(F.pad(image, (left, side - small - left, top, side - small - top)))


class Compressed(Planted):
    """As JPEG does: cosine transforms of 4×4 blocks, rounded to tenths, in numpy, where autograd does not see it."""

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        blocks = x.detach().cpu().double().numpy().reshape(n, channels, height // 4, 4, width // 4, 4)
        k, i = np.mgrid[:4, :4]
        cosines = np.cos((2 * i + 1) * k * np.pi / 8) * np.where(k > 0, 0.5**0.5, 0.5)  # orthonormal
        spectrum = np.einsum("ki,ncaibj,lj->ncakbl", cosines, blocks, cosines)
        rounded = np.einsum("ki,ncakbl,lj->ncaibj", cosines, spectrum.round(1), cosines)
        return self.net(torch.from_numpy(rounded.reshape(x.shape)).to(x).clamp(0, 1))


class Argmax(Planted):
    """One-hot decisions for outputs."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return F.one_hot(logits.argmax(1), logits.shape[1]).float()


class Gated(Planted):
    """Channels weighted by their evidence for the predicted class, the weights detached (after CIFS, Yan et al. 2021).

    For a Sequential whose last module is linear on pooled features.
    """

    def forward(self, x: Tensor) -> Tensor:
        *body, head = self.net
        features = x
        for module in body:
            features = module(features)
        evidence = (features * head.weight[head(features).argmax(1)]).relu().detach()
        return head(features * evidence / evidence.mean(1, keepdim=True).clamp_min(1e-6))


class Probabilities(Planted):
    """Softmax at the end."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(1)


class Cut(Planted):
    """The net's function, and no gradient: ``how`` it leaves autograd."""

    def __init__(self, net: nn.Module, how: str) -> None:
        super().__init__(net)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "no_grad":
                with torch.no_grad():
                    return self.net(x)
            case "inference_mode":
                with torch.inference_mode():
                    return self.net(x)
            case "detach":
                return self.net(x).detach()
            case "numpy":
                return self.net(torch.from_numpy(x.numpy()))  # which refuses what asks for a gradient
            case "whole numbers":
                return (self.net(x) * 1e6).round().long()
            case "argmax":
                return F.one_hot(self.net(x).argmax(1), 5)
            case _:
                return self.net((x - 0.5).sign() / 2 + 0.5)


SAME = ("no_grad", "inference_mode", "detach", "numpy", "whole numbers")  # to rounding, the net's own function
CUTS = (*SAME, "argmax", "sign")


class Shattered(Planted):
    """A smooth ripple on the input: the gradient is right, and says nothing beyond a few thousandths of a grey level."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.02 * (400 * x).sin())


class Winners(nn.Module):
    """Keeps the largest half of each layer's units where they were rectified (k-WTA, Xiao et al. 2020, 1905.10510)."""

    def forward(self, x: Tensor) -> Tensor:
        least = x.flatten(1).topk(x[0].numel() // 2, 1).values[:, -1]
        return x * (x >= least.view(-1, *[1] * (x.dim() - 1)))


def winners(net: nn.Module) -> nn.Module:
    """A copy of a net of rectified units, whose units compete instead; no training, so that it is as accurate as it is."""
    net = copy.deepcopy(net)
    for module in [*net.modules()]:
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, Winners())
    return net


DEFENSES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "quantised input": Quantised,
    "saturated logits": Saturated,
    "noise": Noisy,
    "random resize": Resized,
    "compression in numpy": Compressed,
    "argmax": Argmax,
    "detached gate": Gated,
    "probabilities": Probabilities,
    "shattered gradients": Shattered,
    "winners take all": winners,
}
