"""How many samples to run at once: as many as keep the largest activation in the cache (ours, from measurements).

Decided from shapes, never from timings, so that the same call computes the same numbers every time.  Behind the figures:
``benchmarks/interpretation.py``, where a small CNN is fastest at 128 to 256 samples and a ResNet-18 at 32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

ELEMENTS: Final = 2**21  # of the largest activation of a chunk, on CPUs
FEWEST, MOST, ON_DEVICE = 16, 256, 512


@dataclass
class Largest:
    """Elements a sample of the largest activation that was seen."""

    elements: int = 0

    def chunk(self, device: torch.device) -> int:
        """Samples a forward: 16 … 256 on a CPU, 512 elsewhere."""
        if device.type != "cpu":
            return ON_DEVICE
        return min(MOST, max(FEWEST, ELEMENTS // max(1, self.elements)))


@contextmanager
def measuring(net: nn.Module) -> Iterator[Largest]:
    """Note the largest activation of the forwards made inside the block."""
    largest = Largest()

    def note(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() > 1:
            largest.elements = max(largest.elements, output[0].numel())

    handles = [module.register_forward_hook(note) for module in net.modules()]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()
