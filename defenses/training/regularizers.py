"""Interpretation-guided terms: what the dashboard shows, made part of the loss.

PSE and unit sensitivity are ours, following 1904.02057; the CAM discrepancy is that of 2006.14748.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from glassarmor.defenses.options import require_flag, require_number, require_one_of, require_whole
from glassarmor.defenses.training.terms import Ramp, Term
from glassarmor.interpret.concepts.association import Mode, concept_weights
from glassarmor.interpret.concepts.dissection import ConceptData, dissect
from glassarmor.interpret.modes import evaluating
from glassarmor.interpret.observation import Label, Observation, observe
from glassarmor.interpret.profiles.profiles import evidence_position, pooled, turning_layer
from glassarmor.interpret.signals.cam import cam_change, class_activation_map
from glassarmor.interpret.signals.pse import contribution, margin_evidence, mean_slope, sum_positions
from glassarmor.interpret.signals.running import ClassCentroids, RunningSensitivity, TurningCounts
from glassarmor.interpret.signals.sensitivity import EPS, equal_norm_noise, unit_change, unit_spread

CONCEPT_QUANTILE = 0.02  # of positions that count as active, as in the dissection panel
NOISE_IMAGES = 32  # of each batch that tell what noise moves: an average over an epoch needs no more
EVIDENCE_FLOOR = 0.1  # logits; keeps the share finite for samples without evidence
Samples = Literal["all", "held", "flipped"]


def selected(obs: Observation, samples: Samples) -> Tensor:
    """1 for the samples that a term is about, else 0, (N,) without gradient; their share stays in the batch's mean.

    "held": the attack has not yet flipped the prediction at x'; "flipped": it has.
    """
    if samples == "all":
        return torch.ones(len(obs.y), device=obs.y.device)
    held = obs.adv.logits.detach().argmax(1) == obs.y
    return (held if samples == "held" else ~held).float()


class PSE(Term):
    """Evidence for the margin Z_t − Z_t0 that the attack creates: L = Σ relu(m)^q over the parts of a layer.

    m = promotion + suppression of a part (:func:`.unit_effects`).  Σ m is what the attack gains on the
    margin, so a small Σ relu(m) raises a lower bound of the adversarial margin and forbids a win through few parts.

    Args:
        weight: a number or a ramp.
        layers: default: the last feature layer; below a pooled linear head the effects are exact there and nearly free.
        over: "units", "positions", "both" (their mean), or "activations", each unit at each position alone.
        power: q, 1 or 2.
        top: share of the parts, the largest effects, that count; 1 takes all.
        scale: "share" divides by the clean evidence Σ |(w_t − w_t0)·A(x)|, gradient through both, "margin" by the
            detached clean margin, "logits" by ‖Z(x) − mean Z(x)‖₂, gradient through both, "none" leaves logits: cheapest
            to meet by shrinking the logits, which hurts.
        samples: all, or those whose prediction the attack has not yet ("held") or has ("flipped") flipped.
        promotion, suppression: m weighs the two apart, m = promotion · p + suppression · s; the bound holds at 1 and 1.

    Raises:
        ValueError: an option outside what is listed.
    """

    needs_clean = True
    needs_graph = True
    needs_attack = True

    def __init__(
        self,
        weight: float | Ramp = 0.5,
        layers: Sequence[str] = (),
        over: Literal["units", "positions", "both", "activations"] = "units",
        power: int = 1,
        top: float = 1.0,
        scale: Literal["share", "margin", "logits", "none"] = "share",
        samples: Samples = "all",
        promotion: float = 1.0,
        suppression: float = 1.0,
    ) -> None:
        super().__init__(weight, layers)
        require_one_of("regularizers.pse.over", over, ("units", "positions", "both", "activations"))
        require_one_of("regularizers.pse.power", power, (1, 2))
        require_number("regularizers.pse.top", top, "(0, 1]")
        require_one_of("regularizers.pse.scale", scale, ("share", "margin", "logits", "none"))
        require_one_of("regularizers.pse.samples", samples, get_args(Samples))
        require_number("regularizers.pse.promotion", promotion, "[0, inf)")
        require_number("regularizers.pse.suppression", suppression, "[0, inf)")
        if promotion == suppression == 0:
            raise ValueError("regularizers.pse.promotion: expected it or suppression above 0, found both 0")
        self.over, self.power, self.top, self.scale, self.samples = over, power, top, scale, samples
        self.promotion, self.suppression = promotion, suppression

    def prepare(self, obs: Observation, features: tuple[str, ...]) -> None:
        self.layers = self.layers or features[-1:]
        if self.over in ("positions", "both"):
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
        return selected(obs, self.samples) * torch.stack(values).mean(0)

    def _value(self, obs: Observation, layer: str, part: str) -> Tensor:
        def parts(values: Tensor) -> Tensor:
            if part == "activations":
                return values.flatten(1)
            return sum_positions(values) if part == "units" else values.sum(1).flatten(1)

        # One product with ΔA for both logits.
        slopes = self.promotion * mean_slope(obs, layer, "target") - self.suppression * mean_slope(obs, layer, "true")
        gained = parts(slopes * obs.delta(layer)).relu()
        if self.top < 1:
            gained = gained.topk(max(1, round(self.top * gained.shape[1])), dim=1).values
        if self.scale == "share":
            evidence = parts(margin_evidence(obs, layer)).abs().sum(1, keepdim=True)
            gained = gained / (evidence + EVIDENCE_FLOOR)
        elif self.scale == "margin":
            clean = (obs.logit("true", "clean") - obs.logit("target", "clean")).detach()
            gained = gained / clean.clamp_min(EVIDENCE_FLOOR)[:, None]
        elif self.scale == "logits":
            centred = obs.clean.logits - obs.clean.logits.mean(1, keepdim=True)
            gained = gained / (centred.norm(dim=1, keepdim=True) + EVIDENCE_FLOOR)
        return gained.pow(self.power).sum(1)


class UnitKL(Term):
    """TRADES' KL unit by unit: what each unit's movement, alone and C-fold, does to the two-class prediction (ours).

        L = 1/C Σ_k KL(b(M) ‖ b(M − C·m_k)),    b = (sigmoid, 1 − sigmoid),

    with M the clean margin Z_t0 − Z_t and m_k a unit's promotion + suppression (:func:`.unit_effects`).  KL is
    convex in the second logits, so L ≥ KL(b(M) ‖ b(M − Σ m_k)), the KL between x and x' over the two classes, with equality
    where all units move alike: units that help and units that hurt don't cancel.

    Args:
        weight: a number or a ramp; in place of the KL: ``defense=trades defense.loss.kl.weight=0 regularizers=[unit_kl]``.
        layers: default: the last feature layer; below a pooled linear head the effects are exact there and nearly free.
    """

    needs_clean = True
    needs_graph = True
    needs_attack = True

    def __init__(self, weight: float | Ramp = 6.0, layers: Sequence[str] = ()) -> None:
        super().__init__(weight, layers)

    def prepare(self, obs: Observation, features: tuple[str, ...]) -> None:
        self.layers = self.layers or features[-1:]

    def forward(self, obs: Observation) -> Tensor:
        """Mean over layers, (N,)."""
        return torch.stack([self._value(obs, layer) for layer in self.layers]).mean(0)

    def _value(self, obs: Observation, layer: str) -> Tensor:
        moved = sum_positions(contribution(obs, layer, "target") - contribution(obs, layer, "true"))
        clean = (obs.logit("true", "clean") - obs.logit("target", "clean"))[:, None]
        moved = moved * moved.shape[1]
        # KL of two logistic distributions, from softplus: no logarithm of a probability that underflows.
        return (softplus(clean - moved) - softplus(clean) + clean.sigmoid() * moved).mean(1)


class UnitSensitivity(Term):
    """Movement of the units that attacks move most: L = Σ_l λ_l · mean_k ω_k · mean|ΔA_k| / std_k.

    ω: running relative sensitivity of each unit over the epoch before (1 in the first), scaled to mean 1, without
    gradient.  std_k: the unit's clean standard deviation, with its gradient, so that shrinking or killing a unit gains
    nothing.  λ: 1, or where attacks turn the prediction (ours, following the idea of 2103.10229).

    Args:
        weight: a number or a ramp.
        layers: default: every stage of the net (:func:`.feature_layers`).
        at: "all" weighs the layers alike; "turning" by how many samples of the epoch before had their turning layer there
            (:func:`.turning_layer`, between the class centroids of the epoch before that one), scaled
            to mean 1 over layers: all ones in the first two epochs, and after an epoch in which nothing turned.
        concepts: (size, channels) → annotated images.  With them the net is dissected at the start of each epoch but the
            first, and ω is multiplied by :func:`.concept_weights` of ``mode``.  None: no dissection.
        mode: which units that favours; "protect_detectors" and "suppress_non_detectors" press on the others.
        samples: all, or those whose prediction the attack has not yet ("held") or has ("flipped") flipped.
        noise_corrected: ω follows what the attack moves a unit beyond random noise of the same L2 norm, image by image
            (:func:`.equal_norm_noise`), as far as that is above 0: units that merely vary a lot are
            left alone, and a layer without others too.  Costs a pass a step, in eval mode and without gradients, over
            the first 32 images of a batch and their noisy twins.

    Raises:
        ValueError: another ``at``, ``mode``, ``samples`` or ``noise_corrected``.
    """

    needs_clean = True
    needs_attack = True

    def __init__(
        self,
        weight: float | Ramp = 0.1,
        layers: Sequence[str] = (),
        at: Literal["all", "turning"] = "all",
        concepts: Callable[..., ConceptData] | None = None,
        mode: Mode = "stabilise_detectors",
        samples: Samples = "all",
        noise_corrected: bool = False,
    ) -> None:
        super().__init__(weight, layers)
        require_flag("regularizers.sensitivity.noise_corrected", noise_corrected)
        require_one_of("regularizers.sensitivity.samples", samples, get_args(Samples))
        require_one_of("regularizers.sensitivity.at", at, ("all", "turning"))
        require_one_of("regularizers.sensitivity.mode", mode, get_args(Mode))
        self.at, self.samples = at, samples
        self.concepts, self.mode = concepts, mode
        self.concept_data: ConceptData | None = None
        self.dissecting = False
        self.running = nn.ModuleList()
        self.noise_corrected, self.noise, self.step = noise_corrected, nn.ModuleList(), 0
        self.turning: _Turning | None = None

    def prepare(self, obs: Observation, features: tuple[str, ...]) -> None:
        self.layers = self.layers or features
        device = obs.adv.x.device
        if self.at == "turning":
            self.layers = tuple(name for name in obs.adv.acts if name in self.layers)  # a first layer needs an order
            self.turning = _Turning(obs, self.layers).to(device)
        self.running, self.noise = (
            nn.ModuleList(RunningSensitivity(obs.adv.acts[layer].shape[1]) for layer in layers).to(device)
            for layers in (self.layers, self.layers if self.noise_corrected else ())
        )
        for i, layer in enumerate(self.layers):
            self.register_buffer(f"omega{i}", torch.ones(obs.adv.acts[layer].shape[1], device=device))
        if self.concepts is not None:
            channels, *sides = obs.adv.x.shape[1:]
            self.concept_data = self.concepts(size=min(sides), channels=channels)
            # A buffer, so that a resumed run dissects when an uninterrupted one would.  Steps ask ``dissecting``, no device.
            self.register_buffer("dissect_next", torch.tensor(False, device=device))
            self.register_load_state_dict_post_hook(_read_dissecting)

    def reseed(self, step: int) -> None:
        self.step = step

    def end_epoch(self) -> None:
        for i, running in enumerate(self.running):
            assert isinstance(running, RunningSensitivity)
            if running.samples > 0:
                sensitivity = running.compute()
                if self.noise_corrected:
                    noise = self.noise[i]
                    assert isinstance(noise, RunningSensitivity)
                    sensitivity = (sensitivity - noise.compute()).relu()
                    noise.reset()
                self.get_buffer(f"omega{i}").copy_(sensitivity / (sensitivity.mean() + EPS))
                running.reset()
                if self.concept_data is not None:
                    self._dissect_next(True)
        if self.turning is not None:
            self.turning.end_epoch()

    def forward(self, obs: Observation) -> Tensor:
        """(N,)."""
        if self.training and self.turning is not None:
            self.turning.update(obs, self.layers)
        if self.training and self.concept_data is not None and self.dissecting:
            self._weigh_by_concepts(obs, self.concept_data)
        if self.training and self.noise_corrected:
            self._feel_noise(obs)
        total = torch.zeros(len(obs.y), device=obs.y.device)
        for i, (layer, running) in enumerate(zip(self.layers, self.running, strict=True)):
            assert isinstance(running, RunningSensitivity)
            if self.training:
                running.update(obs, layer)
            omega = self.get_buffer(f"omega{i}")
            part = (omega * unit_change(obs, layer) / (unit_spread(obs, layer) + EPS)).mean(1)
            total = total + (part if self.turning is None else self.turning.share[i] * part)
        return selected(obs, self.samples) * total

    @torch.no_grad()
    def _feel_noise(self, obs: Observation) -> None:
        """How far noise moves the units, on the first images of a batch, in eval mode: nothing is learned from it."""
        assert obs.net is not None
        assert obs.x is not None
        x, x_adv, y = (part[:NOISE_IMAGES].detach() for part in (obs.x, obs.adv.x, obs.y))
        noisy = equal_norm_noise(x, x_adv, torch.Generator(x.device).manual_seed(self.step))
        with evaluating(obs.net):
            beside = observe(obs.net, x, noisy, y, layers=self.layers, joined=True)
        for layer, running in zip(self.layers, self.noise, strict=True):
            assert isinstance(running, RunningSensitivity)
            running.update(beside, layer)

    def _weigh_by_concepts(self, obs: Observation, data: ConceptData) -> None:
        """Multiply ω by the concept weights of the net as it is now; a layer in which they are all 0 keeps its ω."""
        assert obs.net is not None
        found = dissect(obs.net, data, self.layers, quantile=CONCEPT_QUANTILE)
        for i, layer in enumerate(self.layers):
            omega = self.get_buffer(f"omega{i}")
            weighted = omega * concept_weights(found[layer], self.mode).to(omega.device)
            if weighted.sum() > 0:
                omega.copy_(weighted / weighted.mean())
        self._dissect_next(False)

    def _dissect_next(self, asked: bool) -> None:
        self.get_buffer("dissect_next").fill_(asked)
        self.dissecting = asked


def _read_dissecting(module: nn.Module, _: object) -> None:
    assert isinstance(module, UnitSensitivity)
    module.dissecting = bool(module.get_buffer("dissect_next"))


class _Turning(nn.Module):
    """``share`` (L,): how often each layer was the turning layer in the epoch before, scaled to mean 1; no gradient."""

    share: Tensor

    def __init__(self, obs: Observation, layers: Sequence[str]) -> None:
        super().__init__()
        shapes = [(obs.adv.logits.shape[1], obs.adv.acts[layer].shape[1]) for layer in layers]
        self.running = nn.ModuleList(ClassCentroids(*shape) for shape in shapes)
        self.counts = TurningCounts(len(layers))
        self.register_buffer("share", torch.ones(len(layers)))
        for i, shape in enumerate(shapes):
            # Not a number until a class was seen: no line can then be said to have crossed over to it.
            self.register_buffer(f"centroids{i}", torch.full(shape, torch.nan))

    @torch.no_grad()
    def update(self, obs: Observation, layers: Sequence[str]) -> None:
        lines: dict[str, list[Tensor]] = {"clean": [], "adv": []}
        for i, (layer, running) in enumerate(zip(layers, self.running, strict=True)):
            clean, adv = (pooled(forward.acts[layer]) for forward in (obs.clean, obs.adv))
            assert isinstance(running, ClassCentroids)
            running.update(clean, obs.y)
            centroids = self.get_buffer(f"centroids{i}")
            for name, features in (("clean", clean), ("adv", adv)):
                lines[name].append(evidence_position(features, centroids[obs.y], centroids[obs.target]))
        self.counts.update(turning_layer(torch.stack(lines["clean"]), torch.stack(lines["adv"])))

    @torch.no_grad()
    def end_epoch(self) -> None:
        for i, running in enumerate(self.running):
            assert isinstance(running, ClassCentroids)
            if running.samples.sum() == 0:  # an epoch without a batch changes nothing
                return
            self.get_buffer(f"centroids{i}").copy_(running.compute())
            running.reset()
        counts = self.counts.compute().float()
        self.share.copy_(counts / counts.mean() if counts.sum() > 0 else torch.ones_like(counts))
        self.counts.reset()


class CAMDiscrepancy(Term):
    """How far the attack moves the class activation maps (Boopathy et al. 2020, 2006.14748).

        D = ‖ΔCAM_t0‖₁ + Σ_{c≠t0} q_c ‖ΔCAM_c‖₁,    q the softmax at x' over the wrong classes, with its gradient.

    ΔCAM is :func:`.cam_change`, the l1 norm a sum over the P positions.  Below pooling and a linear head an
    attack that makes class c win has to pay for it: ½(‖ΔCAM_t0‖₁ + ‖ΔCAM_c‖₁) ≥ (P/2)·(Z_t0 − Z_c at x).

    Args:
        weight: a number or a ramp; 0.01 as published.
        layers: default: the last feature layer; below a pooled linear head the bound is exact there and the term is cheap.
        classes: how many wrong classes count, the most probable at x'; a backward from the logits to the layer each
            (in separate passes: two).  Null takes all, as published.  With fewer, q stays the share among all wrong
            classes, so that D is a lower bound of the published one (ours).
        scale: "none" as published; it falls when the logits shrink.  "share" (ours, as in :class:`PSE`) divides by the
            same sum for the clean maps instead of their change, gradient through both.

    Raises:
        ValueError: an option outside what is listed.
    """

    needs_clean = True
    needs_graph = True
    needs_attack = True

    def __init__(
        self,
        weight: float | Ramp = 0.01,
        layers: Sequence[str] = (),
        classes: int | None = 9,
        scale: Literal["none", "share"] = "none",
    ) -> None:
        super().__init__(weight, layers)
        require_whole("regularizers.cam_discrepancy.classes", classes, 1, null=True)
        require_one_of("regularizers.cam_discrepancy.scale", scale, ("none", "share"))
        self.classes, self.scale = classes, scale

    def prepare(self, obs: Observation, features: tuple[str, ...]) -> None:
        self.layers = self.layers or features[-1:]
        for layer in self.layers:
            if not obs.spatial(layer):
                raise ValueError(f"regularizers.cam_discrepancy.layers: {layer!r} gives no map over the image")

    def forward(self, obs: Observation) -> Tensor:
        """Mean over layers, (N,)."""
        q = obs.adv.logits.scatter(1, obs.y[:, None], -torch.inf).softmax(1)
        wrong = q.shape[1] - 1
        shares, order = q.topk(min(self.classes or wrong, wrong), dim=1)
        ranked = list(zip(order.unbind(1), shares.unbind(1), strict=True))
        return torch.stack([self._value(obs, layer, ranked) for layer in self.layers]).mean(0)

    def _value(self, obs: Observation, layer: str, ranked: list[tuple[Tensor, Tensor]]) -> Tensor:
        def size(maps: Tensor) -> Tensor:
            return maps.abs().flatten(1).sum(1)

        labels: list[tuple[Label | Tensor, Tensor | float]] = [("true", 1.0), *ranked]
        moved = torch.stack([share * size(cam_change(obs, layer, c)) for c, share in labels]).sum(0)
        if self.scale == "none":
            return moved
        clean = torch.stack([share * size(class_activation_map(obs, layer, c, "clean")) for c, share in labels]).sum(0)
        positions = math.prod(obs.layout(layer).grid)
        return moved / (clean + EVIDENCE_FLOOR * positions)
