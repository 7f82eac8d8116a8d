"""Promotion–suppression effect (PSE): how an attack promotes the target's evidence and suppresses the true label's.

The idea is that of arXiv 1904.02057; the definitions by region, unit and position below are ours, following the paper.
Everything is measured on logits: a softmax would couple the two labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from glassarmor.interpret.modes import evaluating
from glassarmor.interpret.network.chunks import measuring
from glassarmor.interpret.observation import Label, Observation, strongest_wrong

FLOOR: Final = 1e-3  # logits; an effect below this does not count
KIND_NAMES: Final = ("suppression", "promotion", "balanced", "inactive")
SUPPRESSION, PROMOTION, BALANCED, INACTIVE = range(4)


@dataclass(frozen=True)
class PromotionSuppression:
    """Effects in logits, both of one shape: (N, regions), (N, units) or (N, H, W).

    ``promotion``: gain of the target's logit; ``suppression``: loss of the true label's.
    ``total_promotion``, ``total_suppression`` (N,): the change of the two logits that the parts should add up to.
    """

    promotion: Tensor
    suppression: Tensor
    total_promotion: Tensor
    total_suppression: Tensor

    @property
    def margin(self) -> Tensor:
        """What the attack gained on the margin Z_t − Z_t0, part by part."""
        return self.promotion + self.suppression

    @property
    def ratio(self) -> Tensor:
        """Promotion–suppression ratio, log2 of the two effects, each at least ``FLOOR``."""
        return torch.log2(self.promotion.clamp_min(FLOOR) / self.suppression.clamp_min(FLOOR))

    @property
    def kind(self) -> Tensor:
        """SUPPRESSION (ratio < −1), PROMOTION (> 1), BALANCED, or INACTIVE (both effects at the floor); int64."""
        ratio = self.ratio
        kind = torch.full(ratio.shape, BALANCED, device=ratio.device)
        kind[ratio < -1] = SUPPRESSION
        kind[ratio > 1] = PROMOTION
        kind[(self.promotion <= FLOOR) & (self.suppression <= FLOOR)] = INACTIVE
        return kind

    @property
    def gap(self) -> Tensor:
        """Σ margin − the true change of the margin, (N,) logits: interaction of regions, or incompleteness of units."""
        return self.margin.flatten(1).sum(1) - (self.total_promotion + self.total_suppression)

    @property
    def relative_gap(self) -> float:
        """Mean |gap| over the mean |change of the margin|: how far the parts are from complete, over the batch."""
        change = (self.total_promotion + self.total_suppression).abs().mean()
        return float(self.gap.abs().mean() / change.clamp_min(FLOOR))


def grid_regions(height: int, width: int, grid: tuple[int, int]) -> Tensor:
    """Region index of each pixel, (H, W) int64, for a grid of ``rows × columns`` cells as equal as can be.

    Raises:
        ValueError: a grid finer than the image, or empty.
    """
    rows, columns = grid
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise ValueError(f"grid: expected 1..{height} rows and 1..{width} columns, found {rows}x{columns}")
    down = torch.arange(height) * rows // height
    right = torch.arange(width) * columns // width
    return down[:, None] * columns + right


def region_index(regions: tuple[int, int] | Tensor, height: int, width: int) -> Tensor:
    """Region index of each pixel, (H, W) int64, from a grid or from indices that are already given.

    Raises:
        ValueError: regions that fit the image in no way.
    """
    labels = grid_regions(height, width, regions) if isinstance(regions, tuple) else regions
    if labels.shape != (height, width):
        raise ValueError(f"regions: expected indices of shape ({height}, {width}), found {tuple(labels.shape)}")
    if int(labels.max()) < 0:
        raise ValueError("regions: no pixel belongs to a region")
    return labels


@torch.no_grad()
def region_effects(
    net: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    target: Tensor | None = None,
    regions: tuple[int, int] | Tensor = (8, 8),
    chunk: int | None = None,
) -> PromotionSuppression:
    """Effect of the perturbation on each region of the image: what is lost when it is taken back there (ours).

    With δ⁽⁻ⁱ⁾ the perturbation zeroed on region i: s_i = Z_t0(x + δ⁽⁻ⁱ⁾) − Z_t0(x'), p_i = Z_t(x') − Z_t(x + δ⁽⁻ⁱ⁾).
    Both labels come from the same samples, at most (G + 2)·N, in eval mode.

    Args:
        x, x_adv: (N, C, H, W) in [0,1].
        y, target: true and promoted labels, (N,); the default target is the strongest wrong class at x'.
        regions: a grid (rows, columns), or region indices (H, W) int64; a negative index belongs to no region.
        chunk: samples a forward; by default :mod:`glassarmor.interpret.network.chunks` chooses.

    Returns:
        effects of shape (N, G).

    Raises:
        ValueError: regions that fit the image in no way.
    """
    n, _, height, width = x.shape
    labels = region_index(regions, height, width).to(x.device)
    count = int(labels.max()) + 1
    inside = labels == torch.arange(count, device=x.device)[:, None, None]  # (G, H, W)
    # Where nothing was perturbed nothing is lost, and nothing need be run: sparse attacks cost less.
    perturbed = (x != x_adv).any(1).flatten(1).float() @ inside.flatten(1).float().T > 0
    sample, region = perturbed.nonzero(as_tuple=True)
    with evaluating(net):
        with measuring(net) as largest:
            ends = net(torch.cat([x, x_adv])).float()
        chunk = chunk or largest.chunk(x.device)
        if target is None:
            target = strongest_wrong(ends[n:], y)
        pair = torch.stack([y, target], 1)
        clean, adv = ends[:n].gather(1, pair), ends[n:].gather(1, pair)
        taken_back = adv[:, None].repeat(1, count, 1)  # (N, G, 2)
        for i, g in zip(sample.split(chunk), region.split(chunk), strict=True):
            images = torch.where(inside[g][:, None], x[i], x_adv[i])
            taken_back[i, g] = net(images).float().gather(1, pair[i])
    return PromotionSuppression(
        promotion=adv[:, None, 1] - taken_back[..., 1],
        suppression=taken_back[..., 0] - adv[:, None, 0],
        total_promotion=adv[:, 1] - clean[:, 1],
        total_suppression=clean[:, 0] - adv[:, 0],
    )


def contribution(obs: Observation, layer: str, label: Label) -> Tensor:
    """Contribution of every activation to the change of a logit from x to x': the layer's shape (ours).

    ½(∂Z_c/∂A at x + ∂Z_c/∂A at x') · ΔA: the trapezoid with the two ends that the observation holds.  Exact wherever the
    logit is linear in the layer, as below global average pooling and a linear head: there it costs no further pass, and
    the contributions sum to the logit change.
    """
    return mean_slope(obs, layer, label) * obs.delta(layer)


def mean_slope(obs: Observation, layer: str, label: Label) -> Tensor:
    """½(∂Z_c/∂A at x + ∂Z_c/∂A at x'), the layer's shape."""
    return 0.5 * (obs.layer_gradient(layer, "clean", label) + obs.layer_gradient(layer, "adv", label))


def sum_positions(values: Tensor) -> Tensor:
    """Sum over positions: (N, C, …) → (N, C)."""
    return values.flatten(2).sum(2) if values.dim() > 2 else values


def unit_effects(obs: Observation, layer: str) -> PromotionSuppression:
    """Promotion and suppression by unit (channel) of a layer, (N, C)."""
    return _effects(obs, sum_positions(contribution(obs, layer, "target")), sum_positions(contribution(obs, layer, "true")))


def position_effects(obs: Observation, layer: str) -> PromotionSuppression:
    """Promotion and suppression by position of a layer, (N, positions…), e.g. (N, H, W): the image-level view.

    Of tokens all are there, a class token among them; ``obs.maps(layer, values, lead=1)`` folds out the grid.  Below
    pooling and a linear head this is the signed difference of the class activation maps of x' and x.

    Raises:
        ValueError: the layer has no positions.
    """
    if obs.adv.acts[layer].dim() < 3:
        raise ValueError(f"layers: {layer!r} has no positions; position effects need an activation (N, C, H, W)")
    return _effects(obs, contribution(obs, layer, "target").sum(1), contribution(obs, layer, "true").sum(1))


def _effects(obs: Observation, gain: Tensor, change_of_true: Tensor) -> PromotionSuppression:
    return PromotionSuppression(
        promotion=gain,
        suppression=-change_of_true,
        total_promotion=obs.logit("target", "adv") - obs.logit("target", "clean"),
        total_suppression=obs.logit("true", "clean") - obs.logit("true", "adv"),
    )


def margin_evidence(obs: Observation, layer: str) -> Tensor:
    """Clean evidence of every activation for the margin Z_t − Z_t0, gradient × activation at x; the layer's shape.

    Below pooling and a linear head its sum over positions is (w_t − w_t0)_k · mean A_k(x): the scale against which moved
    evidence is judged.
    """
    slope = obs.layer_gradient(layer, "clean", "target") - obs.layer_gradient(layer, "clean", "true")
    return slope * obs.clean.acts[layer].float()
