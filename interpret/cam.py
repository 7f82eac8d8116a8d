"""Class activation maps, signed and in logits, so that the maps of x and of x' compare (Zhou 2016; Selvaraju 2017)."""

from __future__ import annotations

from torch import Tensor

from interpret.observation import Label, Observation, Side


def class_activation_map(obs: Observation, layer: str, label: Label = "true", side: Side = "adv") -> Tensor:
    """Map of a class over the positions of a layer, (N, h, w), signed, differentiable.

    Σ_k α_k A_k with α_k the mean over positions of ∂Z_c/∂A_k: Grad-CAM before its ReLU, times the number of positions.
    So scaled, below global average pooling and a linear head it is Zhou's CAM, Σ_k w_ck A_k, and its mean plus the bias
    is the logit.  Nothing is rescaled per map: clean and adversarial share one scale.

    Raises:
        ValueError: the layer has no spatial positions.
    """
    act = obs.side(side).acts[layer].float()
    if act.dim() != 4:
        raise ValueError(f"layers: {layer!r} gives {act.dim()} dimensions; a CAM needs a feature map (N, C, H, W)")
    alpha = obs.layer_gradient(layer, side, label).sum((2, 3), keepdim=True)
    return (alpha * act).sum(1)


def cam_change(obs: Observation, layer: str, label: Label = "true") -> Tensor:
    """Signed difference CAM_c(x') − CAM_c(x), (N, h, w)."""
    return class_activation_map(obs, layer, label, "adv") - class_activation_map(obs, layer, label, "clean")
