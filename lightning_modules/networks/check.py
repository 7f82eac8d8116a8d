"""What every network must do before training starts: take the images, return logits, pass gradients to the image."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def without_inplace(net: Network) -> Network:
    """Turn off the ``inplace`` flag of every submodule of ``net`` (changed and returned); its outputs stay the same.

    An in-place activation overwrites the output of the layer before it, which may be the one that is observed.
    In-place functions inside a ``forward`` (``F.relu(x, inplace=True)``, ``x += y``) have no flag to turn off.
    """
    for module in _inplace_modules(net).values():
        vars(module)["inplace"] = False  # nn.Module declares only tensors and modules as attributes
    return net


def check_network(net: nn.Module, image_shape: tuple[int, int, int], num_classes: int, differentiable: bool = True) -> None:
    """Raise unless ``net`` maps images (N, C, H, W) in [0,1] to logits (N, num_classes) that gradients can pass.

    ``differentiable=False`` asks only for finite scores (N, num_classes): enough for a net that is judged, not trained.
    Two random images of ``image_shape`` = (C, H, W) run in eval mode; modes, buffers, gradients and the global random
    generators are left as found.

    Raises:
        ValueError: if a module is in place, the images cannot run, or the output is not one finite floating-point
            tensor (2, num_classes), looks like probabilities, or depends on the images in no differentiable way.
    """
    if inplace := _inplace_modules(net):
        raise ValueError(
            "network: in-place modules overwrite the activations that are observed; without_inplace(net) turns them off"
            f"  Got: inplace=True in {', '.join(inplace)}"
        )
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, *image_shape, generator=generator).to(_device(net)).requires_grad_(differentiable)
    modes = [(module, module.training) for module in net.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in net.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with torch.set_grad_enabled(differentiable), torch.random.fork_rng():
            net.eval()
            _check_logits(_run(net, images), images, num_classes, differentiable)
            for module, mode in modes:
                module.training = mode
            if net.training and differentiable:  # some return more in training
                _check_shape(_run(net, images), images, num_classes, " in training mode too")
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer.copy_(value)


def _run(net: nn.Module, images: Tensor) -> object:
    try:
        return net(images)
    except Exception as error:  # whatever a net raises here, it raises because these images do not fit it
        raise ValueError(
            f"network: it must run on images of shape (N, {', '.join(map(str, images.shape[1:]))}) in [0,1]; if it needs "
            f"larger ones, a torchvision net resizes them to network.image_size  Got: {type(error).__name__}: {error}"
        ) from error


def _check_shape(logits: object, images: Tensor, num_classes: int, when: str = "", floating: bool = True) -> Tensor:
    expected = f"network: it must return logits, one floating-point tensor (N, num_classes) = ({len(images)}, {num_classes})"
    if not isinstance(logits, Tensor):
        keys = f" with {', '.join(map(str, logits))}; output=NAME says which" if isinstance(logits, Mapping) else ""
        raise ValueError(f"{expected}{when}  Got: {type(logits).__name__}{keys}")
    if logits.shape != (len(images), num_classes) or (floating and not logits.is_floating_point()):
        raise ValueError(f"{expected}{when}  Got: {logits.dtype} of shape {tuple(logits.shape)}")
    return logits


def _check_logits(found: object, images: Tensor, num_classes: int, differentiable: bool) -> None:
    logits = _check_shape(found, images, num_classes, floating=differentiable)
    expected = f"network: it must return logits, one floating-point tensor (N, num_classes) = ({len(images)}, {num_classes})"
    values = logits.detach().double()
    if not values.isfinite().all():
        raise ValueError(f"{expected}, all finite  Got: NaN or infinite values")
    if not differentiable:
        return
    # Log-probabilities pass: they are logits, shifted by a constant that no loss or margin sees.
    if (values >= 0).all() and (values.sum(dim=1) - 1).abs().max() < 1e-3:
        raise ValueError(
            "network: it expects logits, but rows that are non-negative and sum to 1 are probabilities: leave out the "
            f"final softmax  Got: first row {[round(value, 4) for value in values[0].tolist()[:5]]}"
        )
    gradient = None
    if logits.requires_grad:
        (gradient,) = torch.autograd.grad(logits.sum(), images, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "network: gradients must pass from the logits to the images, or no attack works"
            "  Got: no path (a no_grad, detach or numpy step inside the network?)"
        )


def _inplace_modules(net: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in net.named_modules() if getattr(module, "inplace", False) is True}


def _device(net: nn.Module) -> torch.device:
    return next((tensor.device for tensor in chain(net.parameters(), net.buffers())), torch.device("cpu"))
