"""Residual networks for small images: a 3×3 stem of stride 1 and no max pooling, so that 32×32 images keep positions.

Sources: He et al. 2016, "Deep Residual Learning for Image Recognition" (blocks, widths, projection shortcuts) and
"Identity Mappings in Deep Residual Networks" (pre-activation).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from glassarmor.lightning_modules.networks.layers import conv1x1, conv3x3, conv_bn_relu, global_average_pool, initialize
from glassarmor.lightning_modules.networks.normalize import Normalize


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus shortcut, then ReLU: (N, C, H, W) -> (N, width, H/stride, W/stride)."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != width:
            self.shortcut = nn.Sequential(conv1x1(in_channels, width, stride), nn.BatchNorm2d(width))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(residual + self.shortcut(x))


class PreActBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-(dropout)-conv plus shortcut: (N, C, H, W) -> (N, width, H/stride, W/stride).

    A shortcut that changes shape projects the pre-activated input, any other passes the raw input on.
    """

    def __init__(self, in_channels: int, width: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3x3(width, width)
        self.projection = conv1x1(in_channels, width, stride) if stride != 1 or in_channels != width else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        shortcut = x if self.projection is None else self.projection(activated)
        return self.conv2(self.dropout(self.relu2(self.bn2(self.conv1(activated))))) + shortcut


class ResNet(nn.Sequential):
    """Images (N, in_channels, H, W) in [0,1] -> logits (N, num_classes).

    ``blocks[i]`` blocks of ``widths[i]`` channels make ``layer{i+1}``; each layer after the first halves H and W.  The
    last layer ends in a ReLU: logits = head(mean of its output over positions).
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        *,
        num_classes: int,
        in_channels: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        modules["normalize"] = Normalize(mean, std)
        modules["stem"] = conv_bn_relu(in_channels, widths[0])
        channels = widths[0]
        for index, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
            first = BasicBlock(channels, width, stride=1 if index == 0 else 2)
            modules[f"layer{index + 1}"] = nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(depth - 1)))
            channels = width
        modules["pool"] = global_average_pool()
        modules["head"] = nn.Linear(channels, num_classes)
        super().__init__(modules)
        self.feature_layers = tuple(f"layer{index + 1}" for index in range(len(blocks)))
        initialize(self)


class PreActResNet(nn.Sequential):
    """Images (N, in_channels, H, W) in [0,1] -> logits (N, num_classes), with pre-activation blocks.

    ``blocks[i]`` blocks of ``widths[i]`` channels make ``layer{i+1}``; each layer after the first halves H and W.  The
    layers hold the raw residual stream; ``final`` is the BN-ReLU after the last one: logits = head(mean of its output
    over positions).
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        *,
        stem_width: int,
        num_classes: int,
        in_channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        dropout: float = 0.0,
    ) -> None:
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        modules["normalize"] = Normalize(mean, std)
        modules["stem"] = conv3x3(in_channels, stem_width)
        channels = stem_width
        for index, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
            first = PreActBlock(channels, width, 1 if index == 0 else 2, dropout)
            rest = (PreActBlock(width, width, 1, dropout) for _ in range(depth - 1))
            modules[f"layer{index + 1}"] = nn.Sequential(first, *rest)
            channels = width
        modules["final"] = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        modules["pool"] = global_average_pool()
        modules["head"] = nn.Linear(channels, num_classes)
        super().__init__(modules)
        self.feature_layers = (*(f"layer{index + 1}" for index in range(len(blocks) - 1)), "final")
        initialize(self)


def resnet18(*, num_classes: int, in_channels: int, mean: Sequence[float], std: Sequence[float]) -> ResNet:
    """ResNet-18 with the stem for small images: 11.17 M parameters for 10 classes; last feature map ``layer4``."""
    return ResNet((2, 2, 2, 2), (64, 128, 256, 512), num_classes=num_classes, in_channels=in_channels, mean=mean, std=std)


def preact_resnet18(*, num_classes: int, in_channels: int, mean: Sequence[float], std: Sequence[float]) -> PreActResNet:
    """PreActResNet-18 with the stem for small images: 11.17 M parameters; last feature map ``final``."""
    return PreActResNet(
        (2, 2, 2, 2),
        (64, 128, 256, 512),
        stem_width=64,
        num_classes=num_classes,
        in_channels=in_channels,
        mean=mean,
        std=std,
    )
