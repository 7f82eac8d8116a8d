"""Normalisation as the first layer of a network, so that images, attacks and budgets stay in [0,1] everywhere else."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Channel-wise ``(images - mean) / std``; images (N, C, H, W) in [0,1], ``mean`` and ``std`` in the same unit.

    The statistics are part of the state dict: a checkpoint keeps the normalisation that it was trained with, whatever
    the data module of a later run says.

    Raises:
        ValueError: if ``mean`` and ``std`` differ in length, hold a non-finite value or a ``std`` that is not positive;
            in the forward pass, if the images have another number of channels (which would broadcast silently).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        mean, std = [float(value) for value in mean], [float(value) for value in std]
        if len(mean) != len(std) or not mean:
            raise ValueError(f"mean and std must hold one value for each channel  Got: {len(mean)} and {len(std)} values")
        if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise ValueError(f"mean must be finite and std positive, in [0,1] pixel units  Got: mean={mean}, std={std}")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-3] != len(self.mean):
            raise ValueError(
                f"the network takes images with {len(self.mean)} channel(s), as many as its mean and std have values"
                f"  Got: images of shape {tuple(images.shape)}"
            )
        return (images - self.mean) / self.std


def normalised(net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """A net for images in [0,1] from one that wants ``(images - mean) / std``: as attacks, defenses and suites take it.

    ``net`` becomes its submodule ``net`` (layers are then named "net....") and is not copied.

        judged = normalised(torchvision_net, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    Raises:
        ValueError: as :class:`Normalize`.
    """
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), net=net)).train(net.training)
