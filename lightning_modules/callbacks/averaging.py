"""A running average of the weights, judged, kept and shown in their place."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import nn


class Averaging(EMAWeightAveraging):
    """Exponential moving average of all weights and BatchNorm statistics, by Lightning's own callback.

    Validation and test see the average, so it selects the best epoch, and a checkpoint's ``state_dict`` holds it; training
    goes on from the weights themselves, which the checkpoint holds too.  Put it before every callback that looks at the
    net at the end of an epoch, and let that one look at :meth:`net_of`.

    Args:
        decay: of one step; 0.999 to 0.9995 for runs of tens of thousands of steps, less for shorter ones.

    Raises:
        ValueError: a decay outside (0, 1).
    """

    def __init__(self, decay: float) -> None:
        if not isinstance(decay, float) or not 0 < decay < 1:
            raise ValueError(f"ema: expected null or a decay in (0, 1), found {decay!r}")
        super().__init__(decay=decay)

    def net_of(self, module: Any) -> nn.Module:
        """The averaged net of this training, else the module's own."""
        averaged = module if self._average_model is None else self._average_model.module
        net: nn.Module = getattr(averaged, "net", averaged)
        return net


def averaging(decay: float | None) -> list[Averaging]:
    """The callbacks that ``ema`` asks for: none for null."""
    return [] if decay is None else [Averaging(decay)]
