"""What every door asks of images and labels, in one place: fp32 images (N, C, H, W) in [0,1], and the class of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

from glassarmor.interpret.modes import logits_in, uncompiled, undisturbed

# What a net raises that was made for other images.
FOREIGN: Final = (RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
TOLERANCE: Final = 1e-4  # beyond 0 and 1, a fortieth of a grey level: what resizing and half floats leave by rounding


def typed(net: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Images in fp32, or in float64 for a net of float64, and labels in int64; what is so already comes back itself.

    Reads no value, so that a GPU is not waited for.

    Raises:
        ValueError: images that are no floats (N, C, H, W), at least one; or labels that are no whole numbers (N,).
    """
    if not isinstance(net, nn.Module):
        raise ValueError(f"net: expected a torch.nn.Module to look into or to train, found {type(net).__name__}")
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point() or x.numel() == 0:
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"images: expected floats (N, C, H, W) in [0,1], at least one; found {found}"
            + ("; divide by 255" if isinstance(x, Tensor) and x.dtype == torch.uint8 else "")
        )
    whole = isinstance(y, Tensor) and not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    if not whole or y.shape != x.shape[:1]:
        found = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"labels: expected int64 ({len(x)},), one an image; found {found}")
    return x.to(floats_of(net, x)), y.long()


def checked(net: nn.Module, x: Tensor, y: Tensor, numbers: bool = True) -> tuple[Tensor, Tensor, range]:
    """As :func:`typed`, with the images' values looked at too; and the labels from the smallest to the largest.

    Reads the values: one wait for a GPU, so once a batch and never once a step of an attack.  What lies beyond 0 or 1 by no
    more than rounding is cut off.

    Raises:
        ValueError: as :func:`typed`; also images outside [0,1] or not finite, or a label below 0.
    """
    x, y = typed(net, x, y)
    ends = torch.stack([*(end.double() for end in x.detach().aminmax()), *(end.double() for end in y.aminmax())])
    low, high, first, last = ends.tolist()
    # Without ``numbers`` NaN passes, as in training, where the loss shows it and monitors act.
    if low < -TOLERANCE or high > 1 + TOLERANCE or (numbers and low != low):
        raise ValueError(
            f"images: expected values in [0,1], found {low:.4g}..{high:.4g}; normalisation lives inside the net: "
            "normalised(net, mean, std), or divide by 255"
        )
    if first < 0:
        raise ValueError(f"labels: expected classes from 0 on, found {int(first)}..{int(last)}")
    return (x if low >= 0 and high <= 1 else x.clamp(0, 1)), y, range(int(first), int(last) + 1)


def known_labels(y: Tensor) -> range:
    """From the smallest label to the largest; none on a GPU, which nobody waits for in the middle of a training step.

    Raises:
        ValueError: a label below 0.
    """
    if y.device.type != "cpu":
        return range(0)
    first, last = torch.stack(y.aminmax()).tolist()
    if first < 0:
        raise ValueError(f"labels: expected classes from 0 on, found {first}..{last}")
    return range(first, last + 1)


@contextmanager
def borrowed(net: nn.Module, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The net is :func:`.undisturbed` while it is attacked; yields copies of the checked images and labels.

    Raises:
        ValueError: as :func:`checked`; also where the net returns no logits (N, K) for these labels, or no gradient.
    """
    with undisturbed(net, eager=False):  # whoever compiles a net wants its attacks fast
        x, y, labels = checked(net, x, y, numbers=False)
        ran: list[bool] = []

        def begin(_net: nn.Module, _inputs: object) -> None:
            ran[:] = ran or [False]

        def end(_net: nn.Module, inputs: tuple[Tensor, ...], logits: object) -> None:
            ran[:] = [True]
            require_logits(logits, inputs[0], labels)

        handles = net.register_forward_pre_hook(begin), net.register_forward_hook(end)
        try:
            # Copies: tensors made under inference mode refuse autograd.
            yield x.detach().clone(), y.clone()
        except Exception as error:
            if ran == [False]:
                raise _failed(net, x, error) from error
            raise
        finally:
            for handle in handles:
                handle.remove()


def answer(net: nn.Module, x: Tensor, labels: range) -> Tensor:
    """Logits (N, K) of a net in the mode it is in, which is given a copy of the images (N, C, H, W).

    Raises:
        ValueError: the net cannot run on them, or as :func:`require_logits`.
    """
    try:
        with uncompiled(net):
            logits: Tensor = logits_in(net(x.clone()))
    except Exception as error:
        raise _failed(net, x, error) from error
    require_logits(logits, x, labels)
    return logits


def _failed(net: nn.Module, x: Tensor, error: Exception) -> Exception:
    """What to say of a net that raised this: a sentence, or the error itself where that is one or is not the net's."""
    if isinstance(error, ValueError | torch.OutOfMemoryError) or not isinstance(error, FOREIGN):
        return error
    shape, mode = ", ".join(map(str, x.shape[1:])), "training" if net.training else "eval"
    said = " ".join(str(error).split())[:200]
    return ValueError(
        f"net: expected one that runs in {mode} mode on images (N, {shape}), found {type(error).__name__}: {said}"
    )


def require_logits(logits: object, x: Tensor, labels: range) -> None:
    """Raises ValueError unless these can be the logits (N, K) of images x with these labels; reads no value."""
    if not isinstance(logits, Tensor):
        keys = f" with {', '.join(map(str, list(logits)[:8]))}" if isinstance(logits, Mapping) else ""
        raise ValueError(
            f"net: expected logits (N, classes), found a {type(logits).__name__}{keys}; say which entry holds them: "
            "output=NAME on a command line, interpret.reading(net, NAME) in Python"
        )
    if logits.dim() == 1 and not logits.is_floating_point():
        raise ValueError(
            "net: expected logits (N, classes), found class numbers (N,), which tell no attack anything: return a score a "
            "class"
        )
    if logits.dim() != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        one = "; for two classes return two logits, e.g. (0, z)" if logits.dim() < 2 or logits.shape[1:] == (1,) else ""
        raise ValueError(f"net: expected logits ({len(x)}, classes), two classes at least; found {tuple(logits.shape)}{one}")
    classes, last = logits.shape[1], labels[-1]
    if classes <= last:
        found = f"{labels[0]}..{last}"
        raise ValueError(f"labels: expected 0..{classes - 1}, for the net returns {classes} logits; found {found}")
    if x.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
        raise ValueError(
            "net: expected logits that a gradient leads from to the images, found none (no_grad, detach or numpy inside?)"
        )


def floats_of(net: nn.Module, x: Tensor) -> torch.dtype:
    """The floats that images have to be for this net.

    Raises:
        ValueError: a net of half floats, in which a step of an attack would be rounded away.
    """
    kinds = {tensor.dtype for tensor in (*net.parameters(), *net.buffers()) if tensor.is_floating_point()}
    if kinds == {torch.float64} or (not kinds and x.dtype == torch.float64):
        return torch.float64
    if kinds and kinds <= {torch.float16, torch.bfloat16}:
        try:
            with undisturbed(net), torch.no_grad():
                net(x[:1].float())  # some cast by themselves
        except RuntimeError:
            raise ValueError(
                f"net: expected weights in fp32, found {', '.join(sorted(map(str, kinds)))}; net.float() casts them, and "
                "autocast computes in half floats"
            ) from None
    return torch.float32
