"""Restoration curve: does undoing the attack where its effects are largest bring the true label back first?  (ours)

The proof that a map of regional effects is faithful: its order must beat a random one, and the order by ‖δ_i‖.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glassarmor.interpret.modes import evaluating
from glassarmor.interpret.network.chunks import measuring
from glassarmor.interpret.signals.pse import PromotionSuppression, region_index


@dataclass(frozen=True)
class RestorationCurve:
    """Share of samples whose true label has returned, against the share of regions set back to clean.

    Only samples that the attack flipped count: those the net answers rightly at x and wrongly at x'.  With none, the
    curves are NaN.
    """

    share: Tensor  # (G + 1,) share of regions set back, 0 … 1
    by_effect: Tensor  # (G + 1,) in order of p_i + s_i, largest first
    by_norm: Tensor  # (G + 1,) in order of ‖δ_i‖₂, largest first
    by_chance: Tensor  # (draws, G + 1) in random orders
    needed: Tensor  # (N,) regions that had to be set back in order of effect; −1 for samples that don't count

    @property
    def samples(self) -> int:
        """How many samples count."""
        return int((self.needed >= 0).sum())

    @property
    def areas(self) -> dict[str, float]:
        """Area under each curve in [0,1], more is better; for chance the mean over draws and their standard deviation."""
        chance = torch.trapezoid(self.by_chance, self.share)
        return {
            "effect": float(torch.trapezoid(self.by_effect, self.share)),
            "norm": float(torch.trapezoid(self.by_norm, self.share)),
            "chance": float(chance.mean()),
            "chance_std": float(chance.std(correction=0)),
        }


@torch.no_grad()
def restoration_curve(
    net: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    effects: PromotionSuppression,
    regions: tuple[int, int] | Tensor = (8, 8),
    *,
    draws: int = 5,
    seed: int = 0,
    chunk: int | None = None,
) -> RestorationCurve:
    """Set regions of x' back to clean one after the other, in three orders, until the net answers y.

    Args:
        net: run in eval mode; left as it was.
        x, x_adv: (N, C, H, W) in [0,1].
        effects: of the same regions, (N, G), from :func:`.region_effects`.
        regions: a grid (rows, columns), or region indices (H, W) int64; pixels of no region stay adversarial.
        draws: random orders, each its own for every sample.
        chunk: samples a forward, by default as :mod:`glassarmor.interpret.network.chunks` chooses.  At
            most (G + 1)·N·(2 + draws) samples run; a sample drops out once its label is back.

    Raises:
        ValueError: regions that fit the image in no way, or whose number differs from that of the effects.
    """
    n, _, height, width = x.shape
    labels = region_index(regions, height, width).to(x.device)
    count = int(labels.max()) + 1
    if effects.margin.shape != (n, count):
        raise ValueError(f"effects: expected shape ({n}, {count}), found {tuple(effects.margin.shape)}")
    inside = (labels.flatten() == torch.arange(count, device=x.device)[:, None]).float()  # (G, H·W)
    norm = (x_adv - x).square().sum(1).flatten(1) @ inside.T
    chance = torch.rand(draws, n, count, generator=torch.Generator().manual_seed(seed)).to(x.device)
    scores = torch.cat([torch.stack([effects.margin.float(), norm]), chance])  # (orders, N, G)
    # Place of each region in its order; pixels of no region are never reached.
    place = torch.nn.functional.pad(scores.argsort(dim=2, descending=True, stable=True).argsort(dim=2), (0, 1), value=count)
    with evaluating(net):
        if chunk is None:
            with measuring(net) as largest:
                net(x[:1])
            chunk = largest.chunk(x.device)
        flipped = (_answers(net, x, chunk) == y) & (_answers(net, x_adv, chunk) != y)
        samples = flipped.nonzero()[:, 0].repeat(len(scores))
        orders = place[:, flipped].flatten(0, 1)  # (rows, G + 1)
        needed = _steps_until_right(net, x, x_adv, y, samples, orders, labels, chunk).view(len(scores), -1)
    reached = needed[..., None] <= torch.arange(count + 1, device=x.device)
    curves = reached.float().mean(1)  # no flipped sample: NaN
    first = torch.full((n,), -1, device=x.device)
    first[flipped] = needed[0]
    return RestorationCurve(
        share=torch.linspace(0, 1, count + 1, device=x.device),
        by_effect=curves[0],
        by_norm=curves[1],
        by_chance=curves[2:],
        needed=first,
    )


def _answers(net: nn.Module, images: Tensor, chunk: int) -> Tensor:
    return torch.cat([net(part).argmax(1) for part in images.split(chunk)])


def _steps_until_right(
    net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, samples: Tensor, orders: Tensor, labels: Tensor, chunk: int
) -> Tensor:
    """For each row (a sample and an order), how many regions are clean when the net first answers y; G + 1 if never."""
    count = orders.shape[1] - 1
    needed = torch.full((len(samples),), count + 1, device=x.device)
    step = 1  # at step 0 every flipped sample is wrong
    while step <= count:
        rows = (needed > count).nonzero()[:, 0]
        if not len(rows):
            break
        # Few rows left: look several steps ahead at once, so that the batches stay full.
        steps = torch.arange(step, min(step + max(1, chunk // len(rows)), count + 1), device=x.device)
        pairs = torch.cartesian_prod(steps, rows)
        right = []
        for at, row in (part.unbind(1) for part in pairs.split(chunk)):
            clean = orders[row][:, labels] < at[:, None, None]  # (rows, H, W); index −1 is the padding
            image = torch.where(clean[:, None], x[samples[row]], x_adv[samples[row]])
            right.append(net(image).argmax(1) == y[samples[row]])
        hits = torch.cat(right).view(len(steps), len(rows))
        first = torch.where(hits, steps[:, None], count + 1).amin(0)
        needed[rows] = first
        step += len(steps)
    return needed
