"""Captum as an engine: its attribution methods by name, its ablation as a second way to the region effects, and our own
signals in the shape that Captum's users call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from captum import attr
from torch import Tensor, nn

from glassarmor.interpret.modes import undisturbed
from glassarmor.interpret.network.layouts import layouts_of
from glassarmor.interpret.observation import find_layers
from glassarmor.interpret.signals.conductance import path_contributions
from glassarmor.interpret.signals.pse import region_effects, region_index


@contextmanager
def _borrowed(net: nn.Module) -> Iterator[nn.Module]:
    """:func:`undisturbed`, and what DeepLift leaves on the modules (inputs and outputs of a whole batch) is taken off."""
    own = [(module, set(module.__dict__)) for module in net.modules()]
    try:
        with undisturbed(net):
            yield net
    finally:
        for module, names in own:
            for name in set(module.__dict__) - names:
                delattr(module, name)


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
    with _borrowed(net):
        # Clones: a caller under inference mode hands tensors that autograd may not touch.
        result = _METHODS[method](net, x.clone().requires_grad_(), target.clone())
    return result.detach()


_LAYER_METHODS: dict[str, Callable[[nn.Module, nn.Module, Tensor, Tensor, Tensor], Tensor]] = {
    "conductance": lambda net, layer, x, base, t: attr.LayerConductance(net, layer).attribute(
        x, baselines=base, target=t, n_steps=50, method="riemann_trapezoid", internal_batch_size=128
    ),
    "deep_lift": lambda net, layer, x, base, t: attr.LayerDeepLift(net, layer).attribute(x, baselines=base, target=t),
    "feature_ablation": lambda net, layer, x, base, t: attr.LayerFeatureAblation(net, layer).attribute(
        x, layer_baselines=attr.LayerActivation(net, layer).attribute(base), target=t, layer_mask=_unit_mask(net, layer, x)
    ),
    "grad_cam": lambda net, layer, x, _base, t: attr.LayerGradCam(net, layer).attribute(
        x, target=t, relu_attributions=False
    ),
    "gradient_x_activation": lambda net, layer, x, _base, t: attr.LayerGradientXActivation(net, layer).attribute(
        x, target=t
    ),
    "integrated_gradients": lambda net, layer, x, base, t: attr.LayerIntegratedGradients(net, layer).attribute(
        x, baselines=base, target=t, n_steps=20, internal_batch_size=128
    ),
    "internal_influence": lambda net, layer, x, base, t: attr.InternalInfluence(net, layer).attribute(
        x, baselines=base, target=t, n_steps=20, internal_batch_size=128
    ),
}
LAYER_METHODS = tuple(_LAYER_METHODS)


def _unit_mask(net: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """One feature a unit, (1, C, 1, …) in the layer's own axes: ablating single activations would take C·H·W forwards."""
    name = next(name for name, module in net.named_modules() if module is layer)
    layout = layouts_of(net, x, [name])[name]
    act = attr.LayerActivation(net, layer).attribute(x[:1])
    units = layout.view(act)
    number = torch.arange(units.shape[1], device=x.device).view(1, -1, *[1] * (units.dim() - 2))
    return layout.restore(number.expand_as(units), act.shape)


def attribute_layer(
    net: nn.Module, layer: str, x: Tensor, target: Tensor, method: str = "conductance", baselines: Tensor | None = None
) -> Tensor:
    """Attribution of the target's logit to a layer's activations by Captum, shaped like the layer (grad_cam: one channel).

    Args:
        layer: a name as in ``net.named_modules()``.
        baselines: where paths and differences start, (N, C, H, W); black by default.  With x' and x it is the change that
            is attributed.  ``deep_lift`` is exact only for nets whose activations are modules of their own, each used
            once (``F.relu``, SiLU and GELU are silently 5–7 % off).

    The net is run in eval mode and left as it was.

    Raises:
        ValueError: unknown method or layer.
    """
    if method not in _LAYER_METHODS:
        raise ValueError(f"method: expected one of {', '.join(LAYER_METHODS)}; found {method!r}")
    module = find_layers(net, [layer])[layer]
    with _borrowed(net):
        base = torch.zeros_like(x) if baselines is None else baselines.clone()
        result = _LAYER_METHODS[method](net, module, x.clone().requires_grad_(), base, target.clone())
    return result.detach()


def grad_cam(net: nn.Module, layer: str, x: Tensor, target: Tensor) -> Tensor:
    """Captum's Grad-CAM of a layer without the ReLU, (N, h, w): the engine for one label at one side.

    Below pooling and a linear head :func:`.class_activation_map` gives the same map times the number of positions from
    passes that were made anyway (tested equal); below other heads Grad-CAM, which averages gradients over places, is
    another map.
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


class RegionEffect(attr.Attribution):
    """:func:`.region_effects` in Captum's shape: a drop-in for ``FeatureAblation`` with our engine.

    ``RegionEffect(net).attribute(x_adv, baselines=x, target=t, feature_mask=(8, 8))`` is the gain of the target's logit by
    region, each pixel bearing its region's value; with the true label it is minus the suppression.
    """

    def attribute(
        self,
        inputs: Tensor,
        baselines: Tensor | None = None,
        target: Tensor | int = 0,
        feature_mask: tuple[int, int] | Tensor = (8, 8),
    ) -> Tensor:
        """Logit(inputs) − logit(inputs with the region as in ``baselines``), shaped like ``inputs``.

        Args:
            feature_mask: a grid (rows, columns), or region indices (H, W) int64; pixels of no region get 0.
        """
        from_, label = _start(inputs, baselines), _labels(target, inputs)
        height, width = inputs.shape[-2:]
        labels = region_index(feature_mask, height, width).to(inputs.device)
        gain = region_effects(self.forward_func, from_, inputs, label, label, labels).promotion
        return torch.nn.functional.pad(gain, (0, 1))[:, None, labels].expand_as(inputs).clone()


class UnitConductance(attr.LayerAttribution):
    """Our layer conductance in Captum's shape: a drop-in for ``LayerConductance``, with the trapezoid in layer space."""

    def attribute(
        self, inputs: Tensor, baselines: Tensor | None = None, target: Tensor | int = 0, n_steps: int = 10
    ) -> Tensor:
        """Contribution of each activation to the change of the target's logit from ``baselines`` to ``inputs``."""
        label = _labels(target, inputs)[:, None]
        name = next(name for name, module in self.forward_func.named_modules() if module is self.layer)
        parts, _ = path_contributions(self.forward_func, _start(inputs, baselines), inputs, label, [name], n_steps, 64)
        layout = layouts_of(self.forward_func, inputs, [name])[name]
        act = attr.LayerActivation(self.forward_func, self.layer).attribute(inputs[:1])
        return layout.restore(parts[name][0], act.shape)


def _start(inputs: Tensor, baselines: Tensor | None) -> Tensor:
    return torch.zeros_like(inputs) if baselines is None else baselines


def _labels(target: Tensor | int, inputs: Tensor) -> Tensor:
    return torch.as_tensor(target, device=inputs.device).expand(len(inputs))
