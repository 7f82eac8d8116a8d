"""The default network: small enough for adversarial training on two CPU cores in a minute or two."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from glassarmor.lightning_modules.networks.layers import conv_bn_relu, global_average_pool, initialize
from glassarmor.lightning_modules.networks.normalize import Normalize


class SmallCNN(nn.Sequential):
    """Images (N, in_channels, H, W) in [0,1] -> logits (N, num_classes), for any H and W; design: ours.

    Three stages of two convolutions with BatchNorm and ReLU, 16, 32 and 64 times ``width`` channels.  Each stage begins
    with stride 2 (``stage1``, where most of the time would go, included): 16×16, 8×8 and 4×4 positions at 32×32.
    ``last_stride`` = 1 keeps 8×8 positions in ``stage3``, for finer class activation maps at twice the work.

    logits = head(mean over positions of the output of ``stage3``).

    Raises:
        ValueError: if ``width`` leaves a stage without a channel, or ``last_stride`` is neither 1 nor 2.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        width: float = 1,
        last_stride: int = 2,
    ) -> None:
        widths = [int(base * width) for base in (16, 32, 64)]
        if widths[0] < 1:
            raise ValueError(f"network.width must be at least 1/16, a factor on the channels 16-32-64  Got: {width}")
        if last_stride not in (1, 2):
            raise ValueError(f"network.last_stride must be 1 or 2  Got: {last_stride}")
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        modules["normalize"] = Normalize(mean, std)
        channels = in_channels
        for index, (stage_width, stride) in enumerate(zip(widths, (2, 2, last_stride), strict=True)):
            modules[f"stage{index + 1}"] = nn.Sequential(
                conv_bn_relu(channels, stage_width, stride), conv_bn_relu(stage_width, stage_width)
            )
            channels = stage_width
        modules["pool"] = global_average_pool()
        modules["head"] = nn.Linear(channels, num_classes)
        super().__init__(modules)
        self.feature_layers = ("stage1", "stage2", "stage3")
        initialize(self)
