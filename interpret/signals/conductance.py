"""Layer conductance from x to x' for every named layer and both labels, in one streamed pass along the straight path.

Conductance: Dhamdhere et al. 2018 (1805.12233).  The trapezoid over the change of the layer and the reading as promotion
and suppression are ours: no code we know of gives more than one layer and one label a pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glassarmor.interpret.modes import undisturbed
from glassarmor.interpret.network.layouts import layouts_of
from glassarmor.interpret.observation import record, strongest_wrong
from glassarmor.interpret.signals.pse import PromotionSuppression, sum_positions


@dataclass(frozen=True)
class Conductance:
    """Promotion and suppression inside the network, in logits, by layer name in execution order.

    ``units``: (N, C) each.  ``positions``: (N, positions…) each, for the layers that have positions.  ``target`` (N,).
    """

    target: Tensor
    units: Mapping[str, PromotionSuppression]
    positions: Mapping[str, PromotionSuppression]

    @property
    def relative_gaps(self) -> dict[str, float]:
        """How far each layer is from complete: see :attr:`PromotionSuppression.relative_gap`."""
        return {name: effects.relative_gap for name, effects in self.units.items()}


def conductance(
    net: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    target: Tensor | None = None,
    *,
    layers: Sequence[str],
    steps: int = 10,
    chunk: int = 64,
) -> Conductance:
    """Promotion and suppression of every unit and position of all named layers (ours).

    Complete, up to the quadrature, for a layer that everything passes through.  A layer inside a residual block carries
    only its own branch; its gap then holds what went around it.

    Args:
        net: run in eval mode, without in-place operations on the named layers; left as it was.
        x, x_adv: (N, C, H, W) in [0,1].
        y, target: true and promoted labels, (N,); the default target is the strongest wrong class at x'.
        layers: names as in ``net.named_modules()``, each run once in a forward.
        steps: intervals of the path; ⌈(steps + 1)·N / chunk⌉ forwards with one backward a label serve all layers.
        chunk: samples a forward.

    Raises:
        ValueError: no layer, an unknown one, one that ran twice or was overwritten; fewer than one step.
    """
    if not layers:
        raise ValueError("layers: expected at least one layer name, found none")
    if target is None:
        with undisturbed(net), torch.no_grad():
            target = strongest_wrong(net(x_adv), y)
    parts, change = path_contributions(net, x, x_adv, torch.stack([y, target], 1), layers, steps, chunk)

    def effects(true: Tensor, promoted: Tensor) -> PromotionSuppression:
        return PromotionSuppression(promoted, -true, change[:, 1], -change[:, 0])

    return Conductance(
        target,
        units={name: effects(*map(sum_positions, part)) for name, part in parts.items()},
        positions={name: effects(*part.sum(2)) for name, part in parts.items() if part.dim() > 3},
    )


def path_contributions(
    net: nn.Module, x: Tensor, x_adv: Tensor, labels: Tensor, layers: Sequence[str], steps: int, chunk: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Contribution of every activation to the change of each label's logit from x to x'.

    Σ_i ½(g_i + g_{i+1})·(A_{i+1} − A_i) over the points of the path, g = ∂Z_c/∂A: the trapezoid in the layer's own space.
    It keeps the ends of the path, which quadratures of Gauss miss, and is exact where the logit is linear in the layer.

    Args:
        labels: (N, L), any number of labels.

    Returns:
        layer name → (L, N, C, positions…); change of the logits from x to x', (N, L).
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, found {steps}")
    n, count = labels.shape
    layouts = layouts_of(net, x, layers)
    totals: dict[str, Tensor] = {}
    ends: dict[str, tuple[Tensor, Tensor]] = {}  # activation and gradients at the last point so far
    logits = []
    with undisturbed(net):
        labels = labels.clone()  # autograd saves them, and refuses tensors made under inference mode
        for alphas in torch.linspace(0, 1, steps + 1, device=x.device).split(max(1, chunk // n)):
            points = torch.lerp(x, x_adv, alphas.view(-1, 1, 1, 1, 1).to(x.dtype))  # (points, N, C, H, W)
            with record(net, layers, layouts) as acts:
                z = net(points.flatten(0, 1)).float().gather(1, labels.repeat(len(alphas), 1))
            logits.append(z.detach())
            gradients = [
                torch.autograd.grad(z[:, i].sum(), acts.differentiable(list(acts)), retain_graph=i + 1 < count)
                for i in range(count)
            ]
            for name, act, *slopes in zip(acts, acts.values(), *gradients, strict=True):
                a = act.detach().float().unflatten(0, (-1, n))
                g = [slope.float().unflatten(0, (-1, n)) for slope in slopes]
                # The trapezoid summed by parts: each gradient is read once, times half the change on both its sides.
                half = 0.5 * (a[1:] - a[:-1])
                weight = torch.zeros_like(a)
                weight[:-1] += half
                weight[1:] += half
                part = torch.stack([(slope * weight).sum(0) for slope in g])
                if name in ends:  # the interval from the chunk before
                    before, slope_before = ends[name]
                    part += 0.5 * (a[0] - before) * (slope_before + torch.stack([slope[0] for slope in g]))
                totals[name] = totals[name] + part if name in totals else part
                # Copies: a slice would keep the whole chunk alive.
                ends[name] = a[-1].clone(), torch.stack([slope[-1] for slope in g])
    return totals, logits[-1][-n:] - logits[0][:n]
