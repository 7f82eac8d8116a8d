"""Running statistics as torchmetrics: sums and counts, so that they are right over batches, epochs and processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from glassarmor.interpret.observation import Observation
from glassarmor.interpret.signals.pse import KIND_NAMES, PromotionSuppression
from glassarmor.interpret.signals.sensitivity import EPS, clean_statistics, silent_units, unit_change


class KindShares(Metric):
    """Share of suppression-dominated, promotion-dominated, balanced and inactive parts, (4,) in ``KIND_NAMES`` order.

    Args:
        shared: over all processes; else of this one alone, which then waits for no other.
    """

    full_state_update = False
    higher_is_better = None
    counts: Tensor

    def __init__(self, shared: bool = True) -> None:
        super().__init__(sync_on_compute=shared)
        self.add_state("counts", torch.zeros(len(KIND_NAMES), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, effects: PromotionSuppression) -> None:
        self.counts += torch.bincount(effects.kind.flatten(), minlength=len(KIND_NAMES)).to(self.counts.device)

    def compute(self) -> Tensor:
        return self.counts / self.counts.sum().clamp_min(1)


class RunningSensitivity(Metric):
    """Relative unit sensitivity v_k = mean |ΔA_k| / std of A_k over all samples seen, (C,).

    States are sums in float64 (means of means would be wrong for unequal batches), saved with the model so that a
    resumed run goes on from the same estimates.

    Args:
        units: C.
        silent: as in :func:`.relative_unit_sensitivity`: 0 for a loss, ``SILENT`` for rankings.
        shared: over all processes; else of this one alone.
    """

    full_state_update = False
    higher_is_better = False
    change: Tensor
    total: Tensor
    squares: Tensor
    samples: Tensor
    positions: Tensor

    def __init__(self, units: int, silent: float = 0.0, shared: bool = True) -> None:
        super().__init__(sync_on_compute=shared)
        self.silent = silent
        for name in ("change", "total", "squares"):
            self.add_state(name, torch.zeros(units, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)
        for name in ("samples", "positions"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum", persistent=True)

    @torch.no_grad()
    def update(self, obs: Observation, layer: str) -> None:
        mean, variance = (value.detach().double() for value in clean_statistics(obs, layer))
        clean = obs.clean.acts[layer]
        positions = clean.numel() / clean.shape[1]
        self.change += unit_change(obs, layer).detach().double().sum(0)
        self.total += mean * positions
        self.squares += (variance + mean.square()) * positions
        self.samples += len(clean)
        self.positions += positions

    def compute(self) -> Tensor:
        positions, samples = self.positions.clamp_min(1), self.samples.clamp_min(1)  # no data: no sensitivity
        mean = self.total / positions
        variance = (self.squares / positions - mean.square()).clamp_min(0)
        spread = variance.sqrt()
        relative = (self.change / samples / (spread + EPS)).float()
        return relative.masked_fill(silent_units(spread, self.silent), 0) if self.silent else relative


class ClassCentroids(Metric):
    """Mean feature vector of each class over all samples seen, (K, D), NaN for a class without samples.

    States are sums in float64, saved with the model.
    """

    full_state_update = False
    higher_is_better = None
    total: Tensor
    samples: Tensor

    def __init__(self, classes: int, features: int) -> None:
        super().__init__()
        for name, shape in (("total", (classes, features)), ("samples", (classes, 1))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)

    @torch.no_grad()
    def update(self, features: Tensor, y: Tensor) -> None:
        """Features (N, D) and labels (N,)."""
        # A product: sums by index are not reproducible on a GPU, and wait for it.
        member = (y[:, None] == torch.arange(len(self.total), device=y.device)).double()
        self.total += member.T @ features.detach().double()
        self.samples += member.sum(0)[:, None]

    def compute(self) -> Tensor:
        return (self.total / self.samples).float()


class TurningCounts(Metric):
    """How many samples turned at each of L layers, (L,); see :func:`.turning_layer`."""

    full_state_update = False
    higher_is_better = None
    counts: Tensor

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(layers, dtype=torch.long), dist_reduce_fx="sum", persistent=True)

    def update(self, turned: Tensor) -> None:
        """Index of the turning layer of each sample, (N,); negative: none."""
        self.counts += (turned[:, None] == torch.arange(len(self.counts), device=turned.device)).sum(0)

    def compute(self) -> Tensor:
        return self.counts
