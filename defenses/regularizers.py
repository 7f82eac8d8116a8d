"""Interpretation-guided terms: what the dashboard shows, made part of the loss (all ours, following 1904.02057)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from defenses.terms import Ramp, Term
from interpret.metrics import RunningSensitivity
from interpret.observation import Observation
from interpret.pse import contribution, margin_evidence, sum_positions
from interpret.sensitivity import EPS, unit_change, unit_spread

EVIDENCE_FLOOR = 0.1  # logits; keeps the share finite for samples without evidence


class PSE(Term):
    """Evidence for the margin Z_t − Z_t0 that the attack creates: L = Σ relu(m)^q over the parts of a layer.

    m = promotion + suppression of a part (:func:`interpret.pse.unit_effects`).  Σ m is what the attack gains on the
    margin, so a small Σ relu(m) raises a lower bound of the adversarial margin and forbids a win through few parts.

    Args:
        weight: a number or a ramp.
        layers: default: the last feature layer; below a pooled linear head the effects are exact there and nearly free.
        over: "units", "positions", or "both" (their mean).
        power: q, 1 or 2.
        top: share of the parts, the largest effects, that count; 1 takes all.
        scale: "share" divides by the clean evidence Σ |(w_t − w_t0)·A(x)|, gradient through both, "margin" by the
            detached clean margin, "none" leaves logits: cheapest to meet by shrinking the logits, which hurts.

    Raises:
        ValueError: an option outside what is listed.
    """

    needs_clean = True
    needs_graph = True
    needs_attack = True

    def __init__(
        self,
        weight: float | Ramp = 1.0,
        layers: Sequence[str] = (),
        over: Literal["units", "positions", "both"] = "units",
        power: int = 1,
        top: float = 1.0,
        scale: Literal["share", "margin", "none"] = "share",
    ) -> None:
        super().__init__(weight, layers)
        if over not in ("units", "positions", "both"):
            raise ValueError(f"regularizers.pse.over: expected units, positions or both; found {over!r}")
        if power not in (1, 2):
            raise ValueError(f"regularizers.pse.power: expected 1 or 2, found {power!r}")
        if not 0 < top <= 1:
            raise ValueError(f"regularizers.pse.top: expected a share in (0, 1], found {top!r}")
        if scale not in ("share", "margin", "none"):
            raise ValueError(f"regularizers.pse.scale: expected share, margin or none; found {scale!r}")
        self.over, self.power, self.top, self.scale = over, power, top, scale

    def prepare(self, obs: Observation, features: tuple[str, ...]) -> None:
        self.layers = self.layers or features[-1:]
        if self.over != "units":
            for layer in self.layers:
                if obs.adv.acts[layer].dim() < 3:
                    raise ValueError(f"regularizers.pse.layers: {layer!r} has no positions; use over=units")

    def forward(self, obs: Observation) -> Tensor:
        """Mean over layers and kinds of part, (N,)."""
        values = [
            self._value(obs, layer, part)
            for layer in self.layers
            for part in (("units", "positions") if self.over == "both" else (self.over,))
        ]
        return torch.stack(values).mean(0)

    def _value(self, obs: Observation, layer: str, part: str) -> Tensor:
        def parts(values: Tensor) -> Tensor:
            return sum_positions(values) if part == "units" else values.sum(1).flatten(1)

        gained = parts(contribution(obs, layer, "target") - contribution(obs, layer, "true")).relu()
        if self.top < 1:
            gained = gained.topk(max(1, round(self.top * gained.shape[1])), dim=1).values
        if self.scale == "share":
            evidence = parts(margin_evidence(obs, layer)).abs().sum(1, keepdim=True)
            gained = gained / (evidence + EVIDENCE_FLOOR)
        elif self.scale == "margin":
            clean = (obs.logit("true", "clean") - obs.logit("target", "clean")).detach()
            gained = gained / clean.clamp_min(EVIDENCE_FLOOR)[:, None]
        return gained.pow(self.power).sum(1)


class UnitSensitivity(Term):
    """Movement of the units that attacks move most: L = Σ_l mean_k ω_k · mean|ΔA_k| / std_k.

    ω: running relative sensitivity of each unit over the epoch before (1 in the first), scaled to mean 1, without
    gradient.  std_k: the unit's clean standard deviation, with its gradient, so that shrinking or killing a unit gains
    nothing.

    Args:
        weight: a number or a ramp.
        layers: default: every stage of the net (:func:`interpret.observation.feature_layers`).
    """

    needs_clean = True
    needs_attack = True

    def __init__(self, weight: float | Ramp = 0.5, layers: Sequence[str] = ()) -> None:
        super().__init__(weight, layers)
        self.running = nn.ModuleList()

    def prepare(self, obs: Observation, features: tuple[str, ...]) -> None:
        self.layers = self.layers or features
        device = obs.adv.x.device
        self.running = nn.ModuleList(RunningSensitivity(obs.adv.acts[layer].shape[1]) for layer in self.layers).to(device)
        for i, layer in enumerate(self.layers):
            self.register_buffer(f"omega{i}", torch.ones(obs.adv.acts[layer].shape[1], device=device))

    def end_epoch(self) -> None:
        for i, running in enumerate(self.running):
            assert isinstance(running, RunningSensitivity)
            if running.samples > 0:
                sensitivity = running.compute()
                self.get_buffer(f"omega{i}").copy_(sensitivity / (sensitivity.mean() + EPS))
                running.reset()

    def forward(self, obs: Observation) -> Tensor:
        """(N,)."""
        total = torch.zeros(len(obs.y), device=obs.y.device)
        for i, (layer, running) in enumerate(zip(self.layers, self.running, strict=True)):
            assert isinstance(running, RunningSensitivity)
            if self.training:
                running.update(obs, layer)
            omega = self.get_buffer(f"omega{i}")
            total = total + (omega * unit_change(obs, layer) / (unit_spread(obs, layer) + EPS)).mean(1)
        return total
