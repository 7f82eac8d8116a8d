"""Peers that change the architecture: a gate behind one layer of any network, after three published modules.

These are our own readings of the papers' ideas, made to be judged fairly beside defenses that leave the network alone: the
forward pass takes images and nothing else, the same in training and in evaluation but for BatchNorm and FSR's noise; it is
deterministic in eval mode, and differentiable from the logits through the gate to the image.  Where an option brings back a
published shortcut that hides gradients, it says so.

Each gate has auxiliary heads, whose logits pass through a submodule of their own (:class:`Logits`): a loss observes them as
it observes any layer (``regularizers=[auxiliary]``), and the gate itself knows no labels.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassarmor.lightning_modules.networks.layers import conv3x3

Select = Literal["soft", "argmax", "none"]


def gated(
    *,
    num_classes: int,
    in_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    base: Callable[..., nn.Module],
    gate: Callable[..., nn.Module],
    layer: str | None = None,
    image_size: int = 32,
) -> nn.Module:
    """The network of the factory ``base`` with ``layer`` replaced by :class:`Gated`, under its old name.

    Whoever observes ``layer`` sees gated features, so that class activation maps still add up to the logits; "layer.layer"
    are the features before the gate, "layer.gate...." its parts.

    Args:
        base: called with the other arguments, as any network factory.
        gate: called with ``channels`` and ``num_classes``: one of the gates below.
        layer: gives a feature map (N, C, H, W); null takes the last stage of our own networks.
        image_size: pixels a side of the blank image that tells how many channels the layer has.

    Raises:
        ValueError: no such layer, one that runs not exactly once or gives no feature map, or no name for a foreign network.
    """
    net = base(num_classes=num_classes, in_channels=in_channels, mean=mean, std=std)
    name = _chosen(net, layer)
    channels = _channels(net, name, (1, in_channels, image_size, image_size))
    net.set_submodule(name, Gated(net.get_submodule(name), gate(channels=channels, num_classes=num_classes)))
    return net


class Gated(nn.Module):
    """``gate(layer(...))``: feature maps (N, C, H, W) of the same shape as those of ``layer``."""

    def __init__(self, layer: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.gate = gate

    def forward(self, *inputs: Tensor) -> Tensor:
        features: Tensor = self.gate(self.layer(*inputs))
        return features


class Logits(nn.Identity):
    """Logits (N, K) of an auxiliary head, passed on; ``predicts`` says which class its training loss is about.

    "true" is the label, "wrong" the strongest wrong class at x'.
    """

    def __init__(self, predicts: Literal["true", "wrong"] = "true") -> None:
        super().__init__()
        self.predicts = predicts


class CASGate(nn.Module):
    """CAS-like, after Bai et al. 2021 (channel-wise activation suppressing): channels times auxiliary weights of classes.

    A linear classifier M (K, C) reads the pooled features f; channel k is multiplied by Σ_c p_c M_ck, p = softmax(M f).  The
    publication takes M of the true class in training and of the predicted class at test: that forward needs the label, and
    its choice of a class has no gradient, so an attacker does not see that moving the auxiliary prediction moves the gate.
    Ours weights by the prediction in both modes.  M starts around 1, which predicts the same and lets features pass.

    Args:
        channels, num_classes: C and K.
        select: "soft" as above; "argmax" takes the predicted class alone, as the publication does at test (in training
            too, for there are no labels): its hidden gradient is for checks that should find it; "none" weights nothing, so
            that the auxiliary head is all that is left, the control of the gate.

    Raises:
        ValueError: another ``select``.
    """

    def __init__(self, *, channels: int, num_classes: int, select: Select = "soft") -> None:
        super().__init__()
        if select not in get_args(Select):
            raise ValueError(f"network.gate.select: expected {', '.join(get_args(Select))}; found {select!r}")
        self.select = select
        self.classifier = nn.Linear(channels, num_classes, bias=False)
        with torch.no_grad():
            self.classifier.weight.add_(1)
        self.logits = Logits("true")

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        logits = self.logits(self.classifier(features.mean((2, 3))))
        if self.select == "none":
            return features
        share = logits.softmax(1)
        if self.select == "argmax":
            share = F.one_hot(share.argmax(1), share.shape[1]).to(share.dtype)
        return features * (share @ self.classifier.weight)[:, :, None, None]


class CIFSGate(nn.Module):
    """CIFS-like, after Yan et al. 2021: channels masked by how much they raise the logits of a probe head.

    Importance g = ∂ log Σ_c exp(Z_c) / ∂f of a probe Z = W₂ softplus(W₁ f + b₁) + b₂ on the pooled features f, in closed
    form: no autograd in the forward.  The mask is 2·sigmoid(sharpness · g / rms(g)), monotone in g, 1 for a channel of no
    importance.  The publication adds the logits of the highest classes, for which a soft maximum stands here, and takes the
    mask of detached features, so that attack gradients miss it.

    Args:
        channels, num_classes: C and K.
        sharpness: how far importance opens and closes channels.
        detach: the publication's mask: the same outputs, but gradients pass the mask by.  For checks that should find it.

    Raises:
        ValueError: a sharpness that is no positive number, or ``detach`` no truth value.
    """

    def __init__(self, *, channels: int, num_classes: int, sharpness: float = 2.0, detach: bool = False) -> None:
        super().__init__()
        self.sharpness = _positive("sharpness", sharpness)
        if not isinstance(detach, bool):
            raise ValueError(f"network.gate.detach: expected true or false, found {detach!r}")
        self.detach = detach
        self.hidden = nn.Linear(channels, channels)
        self.classifier = nn.Linear(channels, num_classes)
        self.logits = Logits("true")

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        pooled = features.mean((2, 3))
        self.logits(self.classifier(F.softplus(self.hidden(pooled))))
        importance = self.importance(pooled.detach() if self.detach else pooled)
        relative = importance * (importance.square().mean(1, keepdim=True) + 1e-12).rsqrt()
        return features * (2 * torch.sigmoid(self.sharpness * relative))[:, :, None, None]

    def importance(self, pooled: Tensor) -> Tensor:
        """Gradient of the soft maximum of the probe's logits, (N, C), of pooled features (N, C)."""
        hidden = self.hidden(pooled)
        shares = self.classifier(F.softplus(hidden)).softmax(1)
        gradient: Tensor = ((shares @ self.classifier.weight) * hidden.sigmoid()) @ self.hidden.weight
        return gradient


class FSRGate(nn.Module):
    """FSR-like, after Kim et al. 2023 (feature separation and recalibration): non-robust features are repaired, not dropped.

    A small net scores every feature; the gate m = sigmoid(score / temperature), with Gumbel noise in training and without
    in eval mode, separates robust m·A and non-robust (1 − m)·A features; a second small net adds (1 − m)·R((1 − m)·A) to the
    latter, and the sum goes on.  One auxiliary head reads all three, pooled: robust and recalibrated features are to
    predict the true class, non-robust ones the strongest wrong class.

    Args:
        channels, num_classes: C and K.
        temperature: of the gate, 0.1 as published; the lower, the nearer to 0 and 1, and the flatter there.

    Raises:
        ValueError: a temperature that is no positive number.
    """

    def __init__(self, *, channels: int, num_classes: int, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = _positive("temperature", temperature)
        self.separation = _two_convolutions(channels)
        self.recalibration = _two_convolutions(channels)
        self.classifier = nn.Linear(channels, num_classes)
        self.robust, self.nonrobust, self.recalibrated = Logits("true"), Logits("wrong"), Logits("true")

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        score = self.separation(features)
        if self.training:
            # The difference of two Gumbel variables is logistic.
            score = score + torch.rand_like(score).clamp(1e-6, 1 - 1e-6).logit()
        gate = torch.sigmoid(score / self.temperature)
        robust, nonrobust = gate * features, (1 - gate) * features
        recalibrated = nonrobust + (1 - gate) * self.recalibration(nonrobust)
        for head, part in ((self.robust, robust), (self.nonrobust, nonrobust), (self.recalibrated, recalibrated)):
            head(self.classifier(part.mean((2, 3))))
        return robust + recalibrated


def _two_convolutions(channels: int) -> nn.Sequential:
    return nn.Sequential(
        conv3x3(channels, channels),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


def _positive(key: str, value: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"network.gate.{key}: expected a finite number > 0, found {value!r}")
    return float(value)


def _chosen(net: nn.Module, layer: str | None) -> str:
    """The name of the layer to gate, which exists."""
    names = [name for name, _ in net.named_modules() if name]
    if layer is None:
        stages = getattr(net, "feature_layers", None)
        if not stages:
            raise ValueError(
                f"network.layer: expected a name, for {type(net).__name__} does not say which layer is its last stage; "
                f"it has {', '.join(names[:12])}; found null"
            )
        return str(stages[-1])
    if not isinstance(layer, str) or layer not in names:
        close = difflib.get_close_matches(str(layer), names, n=5, cutoff=0.3) or names[:12]
        raise ValueError(f"network.layer: the network has no layer {layer!r}; close names: {', '.join(close)}")
    return layer


def _channels(net: nn.Module, name: str, shape: tuple[int, ...]) -> int:
    """C of the feature map (N, C, H, W) of a layer, from one pass in eval mode."""
    outputs: list[object] = []
    handle = net.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    modes = [(module, module.training) for module in net.modules()]
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(shape))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"network.image_size: expected a size that the network takes, found {shape[-1]} ({error})"
        ) from error
    finally:
        handle.remove()
        for module, training in modes:
            module.training = training
    if len(outputs) != 1:
        raise ValueError(
            f"network.layer: expected a layer that runs once in a forward, found {name!r}: {len(outputs)} times"
        )
    output = outputs[0]
    if not isinstance(output, Tensor) or output.dim() != 4:
        found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"network.layer: expected a layer with a feature map (N, C, H, W), found {name!r} with {found}")
    return output.shape[1]
