"""The training term of networks with auxiliary heads, such as the gated peers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glassarmor.defenses import losses
from glassarmor.defenses.training.terms import Ramp, Term
from glassarmor.interpret.observation import Observation


class AuxiliaryCE(Term):
    """Cross-entropies at x' of the network's auxiliary heads, summed: they train the gates of CAS-, CIFS- and FSR-like nets.

    A head is a submodule that returns logits (N, K); its attribute ``predicts`` says of which class: "true", the label, as
    for a layer without that attribute, or "wrong", the strongest wrong class at x' (FSR's non-robust features).

    Args:
        weight: a number or a ramp; 2 as published for CAS, 1 for FSR.
        layers: the heads; default: every submodule with that attribute.
    """

    looks_inside = False

    def __init__(self, weight: float | Ramp = 2.0, layers: Sequence[str] = ()) -> None:
        super().__init__(weight, layers)
        self.predicts: dict[str, str] = {}

    def prepare(self, obs: Observation, features: tuple[str, ...]) -> None:
        """Find the heads.

        Raises:
            ValueError: a network without any, or a layer that gives no logits.
        """
        assert obs.net is not None
        found = {name: getattr(module, "predicts", None) for name, module in obs.net.named_modules()}
        heads = {name: label for name, label in found.items() if label in ("true", "wrong")}
        self.layers = self.layers or tuple(heads)
        if not self.layers:
            raise ValueError(
                "regularizers.auxiliary: the network has no auxiliary head to train; expected network=cas, cifs or fsr, or "
                "names of heads in regularizers.auxiliary.layers"
            )
        self.predicts = {layer: heads.get(layer, "true") for layer in self.layers}
        for layer in set(self.layers) & set(obs.adv.acts):
            if obs.adv.acts[layer].shape != obs.adv.logits.shape:
                raise ValueError(
                    f"regularizers.auxiliary.layers: expected a head with logits {tuple(obs.adv.logits.shape)}, found "
                    f"{layer!r} with {tuple(obs.adv.acts[layer].shape)}"
                )

    def forward(self, obs: Observation) -> Tensor:
        """(N,)."""
        return torch.stack(
            [
                losses.cross_entropy(obs.adv.acts[layer], obs.y if label == "true" else obs.target)
                for layer, label in self.predicts.items()
            ]
        ).sum(0)
