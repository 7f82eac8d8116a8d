"""What the convolutional networks share: convolutions, pooling, initialisation.

Every network here is a straight line of named modules (:class:`torch.nn.Sequential`), so that a layer's name is its
place in the network.  Three habits serve whoever records activations: no operation is in place, each ReLU is a module
of its own that runs once in a forward pass, and the last feature map is the output of one named module, ahead of
global average pooling and a linear head, so that a class activation map adds up to the logit exactly.
"""

from __future__ import annotations

from torch import nn


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """3×3 convolution that keeps H and W at stride 1; no bias, for a BatchNorm follows."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """1×1 projection of a shortcut to the width and stride of its block."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)


def conv_bn_relu(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(conv3x3(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels), nn.ReLU())


def global_average_pool() -> nn.Sequential:
    """(N, C, H, W) -> (N, C), the mean over positions, for any H and W."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def initialize(net: nn.Module) -> None:
    """Gaussian weights that keep the scale of the signal (He et al. 2015, "Delving Deep into Rectifiers", eq. 10 and 14).

    Variance 2/fan_out before a ReLU, 1/fan_in for the linear head, which none follows; biases 0.  BatchNorm keeps
    torch's scale 1 and shift 0, as in the residual papers.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
