"""Captum as an engine: its attribution methods by name, and its ablation as a second way to the region effects."""

from __future__ import annotations

from collections.abc import Callable

import torch
from captum import attr
from torch import Tensor, nn

from interpret.modes import undisturbed

# Only methods that take (inputs, target) and need no layer; parameters chosen so that 8 small images take well under 1 s.
_METHODS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "saliency": lambda net, x, t: attr.Saliency(net).attribute(x, target=t, abs=False),
    "input_x_gradient": lambda net, x, t: attr.InputXGradient(net).attribute(x, target=t),
    "integrated_gradients": lambda net, x, t: attr.IntegratedGradients(net).attribute(
        x, target=t, n_steps=20, internal_batch_size=128
    ),
    "deep_lift": lambda net, x, t: attr.DeepLift(net).attribute(x, target=t),
    "guided_backprop": lambda net, x, t: attr.GuidedBackprop(net).attribute(x, target=t),
    "deconvolution": lambda net, x, t: attr.Deconvolution(net).attribute(x, target=t),
    "occlusion": lambda net, x, t: attr.Occlusion(net).attribute(
        x,
        sliding_window_shapes=(x.shape[1], max(1, x.shape[2] // 8), max(1, x.shape[3] // 8)),
        strides=(x.shape[1], max(1, x.shape[2] // 8), max(1, x.shape[3] // 8)),
        target=t,
        perturbations_per_eval=8,
    ),
}
METHODS = tuple(_METHODS)


def attribute(net: nn.Module, x: Tensor, target: Tensor, method: str = "integrated_gradients") -> Tensor:
    """Attribution of the target's logit to the pixels by Captum, (N, C, H, W), against a black baseline.

    The net is run in eval mode and left as it was.

    Raises:
        ValueError: unknown method.
    """
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; found {method!r}")
    with undisturbed(net):
        # Clones: a caller under inference mode hands tensors that autograd may not touch.
        result = _METHODS[method](net, x.clone().requires_grad_(), target.clone())
    return result.detach()


def grad_cam(net: nn.Module, layer: str, x: Tensor, target: Tensor) -> Tensor:
    """Captum's Grad-CAM of a layer without the ReLU, (N, h, w): the engine for one label at one side.

    :func:`interpret.cam.class_activation_map` gives the same map times the number of positions from passes that were
    made anyway (tested equal).
    """
    with undisturbed(net):
        module = net.get_submodule(layer)
        maps = attr.LayerGradCam(net, module).attribute(x.clone(), target=target, relu_attributions=False)
    return maps.detach().squeeze(1)


class _TwoLogits(nn.Module):
    """The logits of two labels per sample, (N, 2)."""

    def __init__(self, net: nn.Module, pair: Tensor) -> None:
        super().__init__()
        self.net = net
        self.pair = pair  # (n, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).gather(1, self.pair.repeat(len(x) // len(self.pair), 1))


@torch.no_grad()
def region_logit_changes(
    net: nn.Module, x: Tensor, x_adv: Tensor, pair: Tensor, regions: Tensor, chunk: int = 128
) -> Tensor:
    """Captum's FeatureAblation from x' with baseline x, for two labels in one pass, (N, 2, G).

    Args:
        pair: the two labels of each sample, (N, 2).
        regions: region index of each pixel, (H, W) int64, from 0 without holes.

    Returns:
        logit(x') − logit(x' with region g clean), for both labels.
    """
    n, channels = x.shape[:2]
    mask = regions.to(x.device).expand(1, channels, *regions.shape)
    with undisturbed(net), torch.no_grad():
        maps = attr.FeatureAblation(_TwoLogits(net, pair)).attribute(
            x_adv.clone(), baselines=x.clone(), feature_mask=mask, perturbations_per_eval=max(1, chunk // n)
        )
    count = int(regions.max()) + 1
    first = torch.stack([(regions == g).flatten().nonzero()[0, 0] for g in range(count)]).to(x.device)
    return maps.view(n, 2, channels, -1)[:, :, 0, first]
