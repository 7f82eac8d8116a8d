"""Random numbers of one's own: the seed and the number of the call name them, so nothing has to be saved to repeat them."""

from __future__ import annotations

from typing import Final

import torch

_STRIDE: Final = 1_000_003  # a prime: calls of neighbouring seeds do not meet


def seed_of(seed: int, call: int) -> int:
    """The seed of one call of what is seeded by ``seed``."""
    return (seed * _STRIDE + call) % 2**63


class Seeded:
    """What draws from a generator of its own, a new one each call, also in a run that is resumed."""

    seed: int
    calls: int

    def reseed(self, call: int) -> None:
        """Make the next call draw the random numbers that belong to ``call``."""
        self.calls = call

    def next_seed(self) -> int:
        """The seed of this call; the next one has another."""
        self.calls += 1
        return seed_of(self.seed, self.calls - 1)

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of this call."""
        return torch.Generator(device).manual_seed(self.next_seed())
