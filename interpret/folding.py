"""BatchNorm folded into the convolution before it, for the passes that only ask for gradients of the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from interpret.modes import replaying, rng_state

Pair = tuple[nn.Module, nn.Module]  # a convolution, and the BatchNorm that alone reads its output
Change = tuple[nn.Module, str, object]  # a module, an attribute's name, what it is for the time being

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CAST = (*_CONVOLUTIONS, nn.Linear)  # what autocast runs in low precision
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ABSENT = object()

# By net: its submodules that may take part when the pairs were found, and the pairs.  Another set is looked at anew.
_known: WeakKeyDictionary[nn.Module, tuple[list[nn.Module], tuple[Pair, ...]]] = WeakKeyDictionary()


@contextmanager
def folded(net: nn.Module, x: Tensor) -> Iterator[nn.Module]:
    """The same function of the images in fewer operations: the weights, scaled by the BatchNorms behind them, made once.

    For a net in eval mode whose parameters are frozen: inside, no gradient reaches them.  Exact up to rounding.  Under
    autocast the weights of all convolutions and linear layers are also cast once, instead of in each pass (autocast itself
    only remembers the casts of weights that ask for a gradient).  Nothing is written: attributes of the modules hide the
    parameters, and are taken away in any case.

    What a folded convolution returns is what its BatchNorm returned.  So a pair of which one has a hook, or a ``forward``
    that somebody replaced, stays as it is; who records convolutions by hooks added inside must not fold.

    Args:
        net: in eval mode.
        x: images (N, C, H, W); the first two are run when the net is seen for the first time (:func:`foldable`).
    """
    kind = x.device.type
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    with torch.no_grad():
        changes = list(_changes(net, foldable(net, x), low))
    with _replaced(changes):
        yield net


def foldable(net: nn.Module, x: Tensor) -> tuple[Pair, ...]:
    """The pairs of a net in eval mode, found once by running two images and kept until its submodules change.

    A pair is a convolution and a BatchNorm, each of torch's own class and run once, the one's output read by the other
    and by nothing else on the way to the logits.  The net with all pairs folded must give the same logits for these
    images, else there are none: so a net that reads what autograd does not see, or draws random numbers, is left alone.
    The path that a net takes must not depend on the images.

    Only the net's ``forward`` runs, not the hooks on the net itself: this is none of the passes that they count.
    """
    inside = [module for module in net.modules() if module is not net and _takes_part(module)]
    if net in _known:
        before, pairs = _known[net]
        if len(before) == len(inside) and all(a is b for a, b in zip(before, inside, strict=True)):
            return pairs
    pairs = ()
    if any(type(module) in _NORMS for module in inside):
        with replaying(rng_state(x.device), x.device), torch.autocast(x.device.type, enabled=False):
            try:
                pairs = _found(net, inside, x[:2].detach())
            except (RuntimeError, ValueError):  # a net that wants its whole batch, e.g. one confined to its images' pixels
                pairs = ()
    _known[net] = (inside, pairs)
    return pairs


def _found(net: nn.Module, inside: list[nn.Module], x: Tensor) -> tuple[Pair, ...]:
    runs: Counter[nn.Module] = Counter()
    read: dict[nn.Module, object] = {}
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # by identity of a convolution's output, which is kept alive here

    def note(module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> None:
        runs[module] += 1
        if type(module) in _CONVOLUTIONS:
            made[id(output)] = (module, output)
        else:
            read[module] = inputs[0]

    handles = [module.register_forward_hook(note) for module in inside if type(module) in (*_CONVOLUTIONS, *_NORMS)]
    try:
        with torch.enable_grad():
            logits = net.forward(x.clone().requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    readers = _readers(logits)
    pairs = []
    for norm, tensor in read.items():
        conv, output = made.get(id(tensor), (norm, None))
        if output is not None and runs[conv] == runs[norm] == 1 and readers[output.grad_fn] == 1:
            pairs.append((conv, norm))
    with torch.no_grad(), _replaced(list(_changes(net, pairs, None))):
        again = net.forward(x)
    largest = logits.abs().max()
    same = (again - logits).abs().max() <= torch.finfo(logits.dtype).eps ** 0.5 * largest
    return tuple(pairs) if bool(same) else ()


def _readers(output: Tensor) -> Counter[object]:
    """How many operations on the way to ``output`` read the result of each."""
    counts: Counter[object] = Counter()
    seen = {output.grad_fn}
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        for below, _ in node.next_functions if node is not None else ():
            counts[below] += 1
            if below not in seen:
                seen.add(below)
                waiting.append(below)
    return counts


def _takes_part(module: nn.Module) -> bool:
    """False for a convolution or BatchNorm with a hook or another ``forward``, or with batch statistics."""
    if type(module) not in (*_CONVOLUTIONS, *_NORMS):
        return True
    hooked = any(getattr(module, hooks) for hooks in _HOOKS) or "forward" in module.__dict__
    return not hooked and not (type(module) in _NORMS and (module.training or module.running_mean is None))


def _changes(net: nn.Module, pairs: Iterable[Pair], low: torch.dtype | None) -> Iterator[Change]:
    done: set[nn.Module] = set()
    for conv, norm in pairs:
        assert isinstance(conv, _CONVOLUTIONS)
        assert isinstance(norm, _NORMS)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
        bias = -mean * scale if norm.bias is None else norm.bias - mean * scale
        weight = conv.weight * scale.view(-1, *[1] * (conv.weight.dim() - 1))
        yield conv, "weight", weight if low is None else weight.to(low)
        yield conv, "bias", bias if low is None else bias.to(low)
        yield norm, "forward", _identity
        done.add(conv)
    if low is not None:
        for module in net.modules():
            if type(module) in _CAST and module not in done:
                for name in ("weight", "bias"):
                    value = getattr(module, name)
                    if value is not None and value.dtype == torch.float32:
                        yield module, name, value.detach().to(low)


def _identity(x: Tensor) -> Tensor:
    return x


@contextmanager
def _replaced(changes: Iterable[Change]) -> Iterator[None]:
    """Inside, attributes of modules are others: an entry of ``__dict__`` hides the parameter or method of that name."""
    undo: list[tuple[dict[str, object], str, object]] = []
    try:
        for module, name, value in changes:
            undo.append((module.__dict__, name, module.__dict__.get(name, _ABSENT)))
            module.__dict__[name] = value
        yield
    finally:
        for attributes, name, value in reversed(undo):
            if value is _ABSENT:
                del attributes[name]
            else:
                attributes[name] = value
