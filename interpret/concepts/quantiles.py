"""Thresholds that a given share of streamed values exceeds: exact, or from a histogram whose error is bounded (ours)."""

from __future__ import annotations

import math
from typing import Final, Protocol

import torch
from torch import Tensor

LEAST_MANTISSA: Final = 4  # bits: below this a threshold could be off by more than a sixteenth
MOST_MANTISSA: Final = 10


def allowed_above(quantile: float, count: int) -> int:
    """How many of ``count`` values may exceed a threshold so that their share is at most ``quantile``."""
    return math.floor(round(quantile * count, 6))  # 0.29 · 100 is 28.999999999999996


class TailThreshold(Protocol):
    """Takes values chunk by chunk, then gives the smallest threshold T with P(value > T) ≤ quantile for every unit.

    ``relative_error``: an upper bound of (found − exact) / |exact|; 0 when exact.  What is found is never below the exact
    threshold, so that the share above it holds in any case.
    """

    relative_error: float

    def add(self, values: Tensor) -> None:
        """Values (C, n), finite, fp32."""

    def threshold(self) -> Tensor:
        """(C,) fp32."""


class ExactTail:
    """Keeps the largest values of every unit: exact in any order of arrival, ties and constant units included.

    With a = the number of values allowed above, T is the (a+1)-th largest value: at most a values are larger, and any
    smaller threshold that some value lies between would leave more above it.

    Args:
        total: values a unit will see; they must be known to know how many to keep.
    """

    relative_error = 0.0

    def __init__(self, quantile: float, total: int) -> None:
        self.keep = min(allowed_above(quantile, total) + 1, total)
        self.pending: list[Tensor] = []
        self.waiting = 0

    @staticmethod
    def bytes(quantile: float, total: int, units: int) -> int:
        """Memory of the kept values while they are merged: thrice as many, their copy, and the chosen with their indices."""
        return 4 * units * 9 * (allowed_above(quantile, total) + 1)

    def add(self, values: Tensor) -> None:
        if values.shape[1] > self.keep:
            values = values.topk(self.keep, sorted=False).values
        self.pending.append(values)
        self.waiting += values.shape[1]
        if self.waiting > 2 * self.keep:
            self._merge()

    def _merge(self) -> None:
        together = torch.cat(self.pending, 1)
        if together.shape[1] > self.keep:
            together = together.topk(self.keep, sorted=False).values
        self.pending, self.waiting = [together], together.shape[1]

    def threshold(self) -> Tensor:
        self._merge()
        return self.pending[0].amin(1)


class HistogramTail:
    """Counts the values of every unit in bins that follow the floating-point grid; needs no range beforehand.

    A bin holds all numbers with the same sign, exponent and first ``mantissa`` bits of the mantissa, so its width is at
    most 2^−mantissa of its numbers (subnormal numbers, below 1.2e-38, excepted).  The exact threshold lies in the bin that
    is found; the bin's upper end is returned, or the unit's largest value where that is smaller.

    Args:
        memory: bytes; as many mantissa bits are kept as fit, at most 10.

    Raises:
        ValueError: the budget can't hold four bits, an error of 1/16.
    """

    def __init__(self, quantile: float, total: int, units: int, memory: int, device: torch.device | None = None) -> None:
        per_bit = 16 * units * 2**9  # counts in int64, and once more while a chunk is added
        mantissa = min(MOST_MANTISSA, int(math.log2(max(1, memory // per_bit))))
        if mantissa < LEAST_MANTISSA:
            raise ValueError(
                f"memory: {units} units need a histogram of at least {per_bit << LEAST_MANTISSA:,} bytes,"
                f" found {memory:,} for this layer"
            )
        self.shift = 23 - mantissa
        self.bins = 1 << (9 + mantissa)
        self.relative_error = 2.0**-mantissa
        self.allowed = allowed_above(quantile, total)
        self.counts = torch.zeros(units, self.bins, dtype=torch.int64, device=device)
        self.highest = torch.full((units,), -torch.inf, device=device)

    def add(self, values: Tensor) -> None:
        self.highest = self.highest.maximum(values.amax(1))
        index = (_ordered(values) >> self.shift) + self.bins // 2
        rows = torch.arange(len(values), device=values.device)[:, None] * self.bins
        self.counts += torch.bincount((rows + index).flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def threshold(self) -> Tensor:
        above = self.counts.sum(1, keepdim=True) - self.counts.cumsum(1)  # values in higher bins
        bin_ = (above > self.allowed).sum(1)  # the lowest bin with few enough above it
        upper = ((bin_ - self.bins // 2 + 1) << self.shift) - 1
        return _float(upper).minimum(self.highest)


def _ordered(values: Tensor) -> Tensor:
    """fp32 → int64 in the same order: the bits themselves, those of negative numbers turned round."""
    bits = (values + 0.0).view(torch.int32).long()  # −0 becomes +0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _float(ordered: Tensor) -> Tensor:
    """Inverse of :func:`_ordered`; beyond the largest finite number that number."""
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    largest = torch.finfo(torch.float32).max
    return bits.int().view(torch.float32).nan_to_num(nan=largest, posinf=largest)
