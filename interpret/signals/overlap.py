"""Where do suppression-, promotion-dominated and balanced regions lie relative to the class activation maps?  (ours)

arXiv 1904.02057 ties the effect of a perturbation to class-discriminative regions in pictures; these are the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glassarmor.interpret.signals.cam import class_region, upsampled
from glassarmor.interpret.signals.pse import KIND_NAMES, PromotionSuppression, region_index


@dataclass(frozen=True)
class Overlap:
    """Overlap of each kind of region with the two maps, each (4, 2): kinds as in ``KIND_NAMES``, then (true, target).

    ``percentile``: mean place of the kind's regions among the regions of their image ordered by CAM, 0 … 1; ½ if they lie
    anywhere.  ``iou``: of the kind's pixels with B_c = [CAM_c ≥ its quantile], over all images together.
    ``…_shuffled``: mean of the same when the kinds change places at random within each image.  ``…_p``: two-sided
    permutation p-values.  Kinds that no region has are NaN.
    """

    count: Tensor  # (4,) regions of each kind
    percentile: Tensor
    percentile_shuffled: Tensor
    percentile_p: Tensor
    iou: Tensor
    iou_shuffled: Tensor
    iou_p: Tensor


@torch.no_grad()
def region_overlap(
    effects: PromotionSuppression,
    cam_true: Tensor,
    cam_target: Tensor,
    size: tuple[int, int],
    regions: tuple[int, int] | Tensor = (8, 8),
    *,
    quantile: float = 0.8,
    draws: int = 200,
    seed: int = 0,
) -> Overlap:
    """Compare the kinds of regions with where the net sees the true label and the target.

    Args:
        effects: (N, G), from :func:`.region_effects` with the same regions.
        cam_true, cam_target: maps (N, h, w); the paper's question asks for C(x, t0) and C(x', t).
        size: height and width of the images.
        regions: a grid (rows, columns), or region indices (H, W) int64; pixels of no region are left out.
        draws: random rearrangements behind the controls and p-values, from a generator of their own.

    Raises:
        ValueError: regions that fit the image in no way, or whose number differs from that of the effects.
    """
    labels = region_index(regions, *size).to(cam_true.device)
    count = int(labels.max()) + 1
    kind = effects.kind.to(cam_true.device)
    if kind.dim() != 2 or kind.shape[1] != count:
        raise ValueError(f"effects: expected shape (N, {count}), found {tuple(kind.shape)}")
    member = (labels.flatten() == torch.arange(count, device=labels.device)[:, None]).float()  # (G, H·W)
    pixels = member.sum(1)
    cams = (cam_true, cam_target)
    cam = torch.stack([upsampled(c, size).flatten(1) @ member.T / pixels for c in cams])  # (2, N, G) mean of each region
    inside = torch.stack([class_region(c, size, quantile).flatten(1).float() @ member.T for c in cams])  # pixels of B_c
    # Middle rank: ties share their place, so that the mean over an image's regions is ½ exactly.
    below = (cam[..., None, :] < cam[..., None]).sum(-1) + 0.5 * (cam[..., None, :] == cam[..., None]).sum(-1)
    percentile = below / count

    def statistics(arranged: Tensor) -> Tensor:
        """Percentile and IoU of one arrangement of the kinds (N, G): (2, 4, 2)."""
        one_hot = torch.nn.functional.one_hot(arranged, len(KIND_NAMES)).float()  # (N, G, 4)
        mean = torch.einsum("ngk,cng->kc", one_hot, percentile) / one_hot.sum((0, 1))[:, None]
        both = torch.einsum("ngk,cng->kc", one_hot, inside)
        covered = torch.einsum("ngk,g->k", one_hot, pixels)[:, None]
        iou = both / (covered + inside.sum((1, 2)) - both)
        return torch.stack([mean, torch.where(covered > 0, iou, torch.nan)])

    generator = torch.Generator().manual_seed(seed)
    found = statistics(kind)
    shuffled = torch.stack(
        [
            statistics(kind.gather(1, torch.rand(kind.shape, generator=generator).argsort(1).to(kind.device)))
            for _ in range(draws)
        ]
    )
    centre = shuffled.mean(0)
    # As far from the centre as what was found, up to rounding; the found arrangement is one of the possible ones.
    extreme = ((shuffled - centre).abs() >= (found - centre).abs() - 1e-6).sum(0)
    p = torch.where(found.isnan(), torch.nan, (1 + extreme) / (1 + draws))
    return Overlap(
        count=torch.bincount(kind.flatten(), minlength=len(KIND_NAMES)),
        percentile=found[0],
        percentile_shuffled=centre[0],
        percentile_p=p[0],
        iou=found[1],
        iou_shuffled=centre[1],
        iou_p=p[1],
    )
