"""Unit sensitivity: how much an attack moves each unit (Zhang et al. 1909.06978; the relative form is ours)."""

from __future__ import annotations

from torch import Tensor

from interpret.observation import Observation

EPS = 1e-6  # a dead unit has standard deviation 0 and moves by 0


def unit_change(obs: Observation, layer: str) -> Tensor:
    """Mean over positions of |ΔA_k| per sample, (N, C).  Absolute first: opposite changes must not cancel."""
    change = obs.delta(layer).abs()
    return change.flatten(2).mean(2) if change.dim() > 2 else change


def unit_spread(obs: Observation, layer: str) -> Tensor:
    """Standard deviation of each unit over clean samples and positions, (C,), in graph."""
    clean = obs.clean.acts[layer].float()
    dims = [d for d in range(clean.dim()) if d != 1]
    # Inside the square root so that the gradient of a constant unit is finite.
    return (clean.var(dims, correction=0) + EPS**2).sqrt()


def unit_sensitivity(obs: Observation, layer: str) -> Tensor:
    """σ_k: mean over samples of :func:`unit_change`, (C,)."""
    return unit_change(obs, layer).mean(0)


def relative_unit_sensitivity(obs: Observation, layer: str) -> Tensor:
    """v_k = σ_k / std_k over clean data, (C,): units of different scale compare."""
    return unit_sensitivity(obs, layer) / (unit_spread(obs, layer) + EPS)
