"""Masking of attack-sensitive units: some units of a trained net answer a constant from now on.

That it can be done at a manageable cost in clean accuracy is an insight of arXiv 1904.02057; criteria, fill and fine-tuning
are ours.  The mask is static and part of the net's forward, never detached: an attack on the masked net sees its true
gradients, and only such attacks judge it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from glassarmor.defenses.options import require_number, require_one_of
from glassarmor.defenses.training.defense import Defense
from glassarmor.interpret.modes import evaluating, is_compiled
from glassarmor.interpret.network.layouts import Layout, layouts_of, plain_layout
from glassarmor.interpret.observation import Observation, entry_of, find_layers, observe, record, replaced
from glassarmor.interpret.signals.conductance import conductance
from glassarmor.interpret.signals.running import RunningSensitivity
from glassarmor.interpret.signals.sensitivity import EPS, SILENT, equal_norm_noise

Criterion = Literal["sensitivity", "margin", "noise_corrected", "random"]


@dataclass(frozen=True)
class UnitMask:
    """Which units stay, by layer, (C,) bool; what a masked one answers, by layer, (C,); and what chose them.

    ``layouts``: of the layers; without one, units are the second axis.

    Raises:
        ValueError: other shapes, or a layer of which nothing would be left.
    """

    keep: Mapping[str, Tensor]
    fill: Mapping[str, Tensor]
    by: str = "hand"
    layouts: Mapping[str, Layout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer, keep in self.keep.items():
            if keep.dtype != torch.bool or keep.dim() != 1 or layer not in self.fill or self.fill[layer].shape != keep.shape:
                raise ValueError(
                    f"mask: expected keep (C,) bool and fill (C,) of layer {layer!r}, found {tuple(keep.shape)}"
                )
            if not keep.any():
                raise ValueError(f"mask: all {len(keep)} units of layer {layer!r} would be masked; mask a smaller share")


def unit_scores(
    net: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    layers: Sequence[str],
    by: Criterion,
    *,
    chunk: int = 128,
    seed: int = 0,
) -> dict[str, Tensor]:
    """How much each unit serves the attack, by layer, (C,), over all images, in eval mode.

    Args:
        x, x_adv, y: held-out images, attacked images (N, C, H, W), labels (N,).
        by: "sensitivity": v_k = mean |ΔA_k| / clean std, silent units 0; "noise_corrected": v_k less the same under noise
            of equal norm (one draw an image), so that units that move at anything don't count; "margin": mean conductance
            towards the margin Z_t − Z_t0; "random": the control.
        chunk: images at a time.
        seed: of the noise, or of the random scores.

    Raises:
        ValueError: another criterion, no layer, or an unknown one.
    """
    require_one_of("masking.by", by, get_args(Criterion))
    if not layers:
        raise ValueError("masking.layers: expected at least one layer name, found none")
    find_layers(net, layers, key="masking.layers")
    chunks = list(zip(x.split(chunk), x_adv.split(chunk), y.split(chunk), strict=True))
    if by == "margin":
        parts = [conductance(net, *images, layers=layers, chunk=chunk).units for images in chunks]
        return {layer: torch.cat([units[layer].margin for units in parts]).mean(0) for layer in layers}
    generator = torch.Generator().manual_seed(seed)
    attack: dict[str, RunningSensitivity] = {}
    noise: dict[str, RunningSensitivity] = {}
    with evaluating(net), torch.no_grad():
        for clean, adv, labels in chunks:
            obs = observe(net, clean, adv, labels, layers=layers)
            observed = [(attack, obs)]
            if by == "noise_corrected":
                noisy = observe(net, clean, equal_norm_noise(clean, adv, generator), labels, layers=layers, clean=False)
                observed.append((noise, Observation(labels, obs.target, noisy.adv, obs.clean)))
            for running, beside in observed:
                for layer in layers:
                    units = obs.adv.acts[layer].shape[1]
                    fresh = RunningSensitivity(units, SILENT, shared=False).to(x.device)
                    running.setdefault(layer, fresh).update(beside, layer)
    scores = {layer: attack[layer].compute() for layer in layers}
    if by == "noise_corrected":
        return {layer: score - noise[layer].compute() for layer, score in scores.items()}
    if by == "random":
        return {layer: torch.rand(len(score), generator=generator).to(x.device) for layer, score in scores.items()}
    return scores


def choose_units(
    net: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    layers: Sequence[str],
    share: float,
    by: Criterion = "noise_corrected",
    *,
    fill: Literal["zero", "mean"] = "zero",
    weights: Mapping[str, Tensor] | None = None,
    chunk: int = 128,
    seed: int = 0,
) -> UnitMask:
    """Mask the units that serve the attack most; the net is left as it was.  See :func:`unit_scores` for the rest.

    Choose on images that judge nothing afterwards, e.g. the validation split.

    Args:
        share: of each layer's units, rounded, at least one.
        fill: what a masked unit answers.  "zero": nothing, as if it were pruned.  "mean": its mean on the clean images,
            which takes away what it says and leaves the layers above the level they were trained on; it costs less
            clean accuracy where no fine-tuning follows.
        weights: by layer, (C,) >= 0, that multiply the scores, e.g. :func:`.concept_weights`; units
            of weight 0 are masked last.

    Raises:
        ValueError: a share outside (0, 1), or so large that nothing is left of a layer; another fill.
    """
    require_number("masking.share", share, "(0, 1)")
    require_one_of("masking.fill", fill, ("zero", "mean"))
    scores = unit_scores(net, x, x_adv, y, layers, by, chunk=chunk, seed=seed)
    keep, fills = {}, {layer: torch.zeros_like(score) for layer, score in scores.items()}
    for layer, score in scores.items():
        if weights is not None and layer in weights:
            weight = weights[layer].to(score.device)
            # Scores below 0 must not rise by a weight below 1: first all to one side, their order kept.
            score = ((score - score.min() + EPS) * weight).where(weight > 0, -1.0)
        chosen = score.topk(max(1, round(share * len(score)))).indices
        keep[layer] = torch.ones_like(score, dtype=torch.bool).index_fill(0, chosen, False)
    layouts = layouts_of(net, x, layers)
    if fill == "mean":
        with evaluating(net), torch.no_grad():
            for images in x.split(chunk):
                with record(net, layers, layouts) as acts:
                    net(images)
                for layer, act in acts.items():
                    fills[layer] += act.float().flatten(2).mean(2).sum(0) / len(x) if act.dim() > 2 else act.sum(0) / len(x)
    return UnitMask(keep, fills, by, layouts)


@torch.no_grad()
def mask_of(net: nn.Module, x: Tensor, layer: str, units: Sequence[int], by: str = "hand") -> UnitMask:
    """Mask these units of a layer, which answer zero; the net is left as it was.

    Args:
        x: a few images, (N, C, H, W), that tell how many units the layer has.

    Raises:
        ValueError: an unknown layer or unit, or no unit at all.
    """
    find_layers(net, [layer], key="masking.layers")
    layouts = layouts_of(net, x, [layer])
    with evaluating(net), record(net, [layer], layouts) as acts:
        net(x)
    count = acts[layer].shape[1]
    if not units or not all(isinstance(unit, int) and 0 <= unit < count for unit in units):
        raise ValueError(f"masking.units: expected units 0 to {count - 1} of layer {layer!r}, found {list(units)}")
    keep = torch.ones(count, dtype=torch.bool, device=x.device)
    keep[list(units)] = False
    return UnitMask({layer: keep}, {layer: torch.zeros(count, device=x.device)}, by, layouts)


def masked(net: nn.Module, mask: UnitMask) -> nn.Module:
    """A copy of the net whose masked units answer their fill, in training and evaluation; ``net`` is left as it was.

    An ordinary module of the same class with the same layer names; it shares nothing with ``net``.  Mask and fill are
    buffers of the masked layers (``LAYER.unit_keep``, ``LAYER.unit_fill``), so a state dict restores them into a net
    that is masked at the same layers.

    Raises:
        ValueError: a compiled net, an unknown layer, or one that is masked already; in the forward, another number of units.
    """
    if is_compiled(net):
        raise ValueError("mask: expected a net that torch.compile has not compiled; mask the one it was made from")
    twin = copy.deepcopy(net)
    for layer, module in find_layers(twin, list(mask.keep), key="mask").items():
        if "unit_keep" in module._buffers:
            raise ValueError(f"mask: layer {layer!r} is masked already; mask the net that it was made from")
        device = next((p.device for p in net.parameters()), mask.keep[layer].device)
        module.register_buffer("unit_keep", mask.keep[layer].to(device, copy=True))
        module.register_buffer("unit_fill", mask.fill[layer].to(device, copy=True))
        module.__dict__["unit_layout"] = mask.layouts.get(layer)
        module.register_forward_hook(_answer)
    return twin


def _answer(module: nn.Module, inputs: Any, output: Any) -> Any:
    # A function of the module, no closure: copies and pickles of the net carry their own mask.
    keep, fill = module.get_buffer("unit_keep"), module.get_buffer("unit_fill")
    known: Layout | None = module.__dict__["unit_layout"]
    found = entry_of(output, known)
    assert found is not None
    layout = known or plain_layout(found)
    values = layout.view(found)
    if values.dim() < 2 or values.shape[1] != len(keep):
        raise ValueError(f"mask: made for {len(keep)} units, but the layer gives shape {tuple(found.shape)}")
    shape = [1, -1] + [1] * (values.dim() - 2)
    answered = torch.where(keep.view(shape), values, fill.view(shape).to(values.dtype))
    return replaced(output, found, layout.restore(answered, found.shape))


def fine_tune(
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    defense: Defense,
    epochs: int = 3,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
) -> list[float]:
    """Train the net further, through its mask, with plain SGD; it ends in eval mode.

    Args:
        batches: (x, y) on the net's device, iterated once an epoch: a loader, no generator.
        defense: the loss; its attack sees the masked net.

    Returns:
        The mean loss of each epoch.

    Raises:
        ValueError: an epoch without a batch.
    """
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    losses: list[float] = []
    net.train()
    step = 0
    for epoch in range(epochs):
        seen: list[Tensor] = []
        for x, y in batches:
            defense.at(epoch, step)
            loss = defense(net, x, y).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.detach())
            step += 1
        if not seen:
            raise ValueError(f"masking.batches: expected at least one batch in epoch {epoch}, found none")
        defense.end_epoch()
        losses.append(torch.stack(seen).mean().item())
    net.eval()
    return losses
