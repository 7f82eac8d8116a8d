"""What evaluations ask of a network and of images, and how they run it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glassarmor.defenses.threat import Threat
from glassarmor.interpret.inputs import answer, checked
from glassarmor.interpret.modes import undisturbed


def check_images(net: nn.Module, images: Tensor, labels: Tensor, threat: Threat) -> int:
    """The number of classes, after everything that can be wrong with these arguments was looked for.

    Raises:
        ValueError: images that are no float (N, C, H, W) in [0,1], labels of another length or type or outside the classes,
            a ball that holds everything, weights that are not fp32, or a net that cannot run on these images or returns no
            scores, one a class.
    """
    kinds = {tensor.dtype for tensor in net.parameters() if tensor.is_floating_point()} - {torch.float32}
    if kinds:
        raise ValueError(
            f"net: an evaluation runs in fp32, found weights in {sorted(map(str, kinds))}; net.float() casts them"
        )
    images, labels, classes = checked(net, images, labels)
    threat.check(tuple(images.shape[1:]))
    return predict(net, images[:2].to(device_of(net)), classes).shape[1]


class _Rows(nn.Module):
    """A net of rows of features (N, D), for images of one row, (N, 1, 1, D)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x.flatten(1))
        return logits


def as_images(net: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Rows of features (N, D) as images of one row, and a net that takes them; images and their net as they are."""
    if isinstance(x, Tensor) and x.dim() == 2:
        return _Rows(net).train(net.training), x[:, None, None]
    return net, x


def answered(logits: Tensor, y: Tensor) -> Tensor:
    """Rightly, and with numbers alone: (N,) bool; argmax takes what is not a number for the largest."""
    return (logits.argmax(1) == y) & logits.isfinite().all(1)


def device_of(net: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*net.parameters(), *net.buffers())), torch.device("cpu"))


def predict(net: nn.Module, x: Tensor, labels: range = range(1)) -> Tensor:
    """Logits (N, K) in eval mode, which these labels fit; the net is left as it was.

    Raises:
        ValueError: see :func:`.answer`.
    """
    with undisturbed(net), torch.no_grad():
        return answer(net, x, labels)


@dataclass
class _Passes:
    forwards: int = 0
    backwards: int = 0


@contextmanager
def counted(net: nn.Module) -> Iterator[_Passes]:
    """Inside, images through ``net`` are counted, forward and backward (as often as a gradient is asked of its output)."""
    passes = _Passes()

    def backward(gradient: Tensor) -> None:
        passes.backwards += len(gradient)

    def forward(_net: nn.Module, _inputs: object, output: Tensor) -> None:
        passes.forwards += len(output)
        if output.requires_grad:
            output.register_hook(backward)

    handle = net.register_forward_hook(forward)
    try:
        yield passes
    finally:
        handle.remove()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, and no shortened mantissas (TF32) on a GPU."""
    convolution, product = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolution, product


def fooled(net: nn.Module, threat: Threat, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Who fell, (N,) bool: misclassified inside the ball and [0,1] (to rounding); what lies outside does not count.

    And of those, who fell for logits that are not finite, (N,) bool.
    """
    allowed = threat.distance(x, x_adv) <= threat.eps * (1 + 1e-5) + 1e-6
    allowed &= ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
    logits = predict(net, x_adv)
    fell = allowed & ~answered(logits, y)
    return fell, fell & ~logits.isfinite().all(1)
