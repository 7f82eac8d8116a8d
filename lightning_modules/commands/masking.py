"""Which units a command masks, as its config says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from glassarmor.datamodules.concepts import procedural_concepts
from glassarmor.defenses.masking import UnitMask, choose_units, mask_of
from glassarmor.interpret.concepts.association import concept_weights
from glassarmor.interpret.concepts.dissection import dissect


def require_masking(masking: DictConfig) -> None:
    """Raises ValueError unless share and number of images can be what they are meant to be."""
    if not isinstance(masking.share, float) or not isinstance(masking.images, int):
        raise ValueError(
            "masking: expected a share in (0, 1) and a number of images, "
            f"found share={masking.share!r} images={masking.images!r}"
        )


def choose(
    masking: DictConfig, net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, observed: Sequence[str]
) -> list[UnitMask]:
    """The mask that was asked for, and one with as many units at random."""
    layers = list(masking.layers) or [observed[-1]]
    if masking.by == "hand":
        if len(layers) != 1:
            raise ValueError(f"masking.layers: masking.by=hand masks units of one layer, found {len(layers)}")
        by_hand = mask_of(net, x[:2], layers[0], list(masking.units))
        order = torch.randperm(len(by_hand.keep[layers[0]]), generator=torch.Generator().manual_seed(0)).tolist()
        return [by_hand, mask_of(net, x[:2], layers[0], order[: len(set(masking.units))], "random")]
    weights = None
    if masking.concepts is not None:
        data = procedural_concepts(count=500, size=min(x.shape[2:]), channels=x.shape[1])
        found = dissect(net, data, layers, quantile=0.02)
        weights = {layer: concept_weights(found[layer], masking.concepts) for layer in layers}
    share, fill = masking.share, masking.fill
    return [
        choose_units(net, x, x_adv, y, layers, share, masking.by, fill=fill, weights=weights),
        choose_units(net, x, x_adv, y, layers, share, "random", fill=fill),
    ]
