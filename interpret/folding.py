"""BatchNorm folded into the convolution before it, for the passes that only ask for gradients of the images."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from interpret.modes import replaying, rng_state

Pair = tuple[nn.Module, nn.Module]  # a convolution, and the BatchNorm that alone reads its output
Change = tuple[nn.Module, str, object]  # a module, an attribute's name, what it is for the time being

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CAST = (*_CONVOLUTIONS, nn.Linear)  # what autocast runs in low precision
_LOOKED_AT = (*_CONVOLUTIONS, *_NORMS, nn.ReLU)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ABSENT = object()


@dataclass(frozen=True)
class Foldable:
    """What can be saved: pairs of a convolution and its BatchNorm, and ReLUs whose input nobody else reads."""

    pairs: tuple[Pair, ...] = ()
    relus: tuple[nn.Module, ...] = ()


# By net: its submodules that may take part and its settings when it was looked at, and what was found.  Others are looked
# at anew.
_known: WeakKeyDictionary[nn.Module, tuple[list[nn.Module], list[object], Foldable]] = WeakKeyDictionary()


@contextmanager
def folded(net: nn.Module, x: Tensor) -> Iterator[nn.Module]:
    """The same function of the images in fewer operations: the weights, scaled by the BatchNorms behind them, made once.

    For a net in eval mode whose parameters are frozen: inside, no gradient reaches them.  Exact up to rounding.  ReLUs
    overwrite what they read, where nothing else reads it.  Under autocast the weights of all convolutions and linear layers
    are also cast once, instead of in each pass (autocast itself at best remembers casts of weights that ask for a gradient).
    Nothing is written: attributes of the modules hide the parameters, and are taken away in any case.

    What a folded convolution returns is overwritten by what its BatchNorm returned, and that by its ReLU.  So a module that
    has a hook, or a ``forward`` that somebody replaced, stays as it is; who hooks layers inside must not fold.

    Args:
        net: in eval mode.
        x: images (N, C, H, W); the first two are run when the net is seen for the first time (:func:`foldable`).
    """
    own = getattr(net, "_orig_mod", net)  # inside torch.compile's wrapper
    kind = x.device.type
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    with torch.no_grad():
        changes = list(_changes(own, foldable(own, x), low))
    with _replaced(changes):
        yield net


def foldable(net: nn.Module, x: Tensor) -> Foldable:
    """What of a net in eval mode can be folded, found by running two images and kept until modules or settings change.

    A pair is a convolution and a BatchNorm, each of torch's own class and run once, the one's output read by the other
    and by nothing else on the way to the logits.  The net with everything folded must give the same logits for these
    images and let their gradient through, else nothing is: so a net that reads what autograd does not see, or draws random
    numbers, is left alone.  The path that a net takes may depend on attributes that are plain values, such as a flag, but
    not on the images, nor on how many there are.

    Only the net's ``forward`` runs, not the hooks on the net itself: this is none of the passes that they count.
    """
    inside = [module for module in net.modules() if module is not net and _takes_part(module)]
    settings = _settings(net)
    if net in _known:
        before, then, found = _known[net]
        if len(before) == len(inside) and all(a is b for a, b in zip(before, inside, strict=True)) and then == settings:
            return found
    found = Foldable()
    if any(type(module) in _NORMS for module in inside):
        with replaying(rng_state(x.device), x.device), torch.autocast(x.device.type, enabled=False), torch.enable_grad():
            try:
                found = _found(net, inside, x[:2].detach().clone().requires_grad_())
            except (RuntimeError, ValueError):  # e.g. a net that wants its whole batch
                found = Foldable()
    _known[net] = (inside, settings, found)
    return found


def _settings(net: nn.Module) -> list[object]:
    """Attributes of all modules that are plain values: what may switch a path on or off."""
    plain = (bool, int, float, str, type(None))
    return [(name, value) for module in net.modules() for name, value in vars(module).items() if type(value) in plain]


def _found(net: nn.Module, inside: list[nn.Module], x: Tensor) -> Foldable:
    runs: Counter[nn.Module] = Counter()
    read: dict[nn.Module, Tensor] = {}
    made: dict[int, list[nn.Module]] = defaultdict(list)  # by identity of an output: who returned it, innermost first
    kept: list[Tensor] = []  # so that identities stay what they are

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        runs[module] += 1
        made[id(output)].append(module)
        kept.append(output)
        if type(module) in _LOOKED_AT:
            read[module] = inputs[0]

    handles = [module.register_forward_hook(note) for module in net.modules() if module is not net]
    try:
        logits = net.forward(x)
    finally:
        for handle in handles:
            handle.remove()
    readers, free = _readers(logits), {module for module in inside if type(module) in _LOOKED_AT}
    pairs: list[Pair] = []
    relus: list[nn.Module] = []
    for module in free & read.keys():
        tensor, makers = read[module], made[id(read[module])]
        if runs[module] > 1 or tensor.grad_fn is None or readers[tensor.grad_fn] > 1 or not free.issuperset(makers):
            continue
        if type(module) in _NORMS and len(makers) == 1 and type(makers[0]) in _CONVOLUTIONS and runs[makers[0]] == 1:
            pairs.append((makers[0], module))
        elif type(module) is nn.ReLU:
            relus.append(module)
    found = Foldable(tuple(pairs), tuple(relus))
    with _replaced(list(_changes(net, found, None))):
        again = net.forward(x)
        torch.autograd.grad(again.sum(), x)  # fails where something that was overwritten is needed
    same = (again - logits).abs().max() <= torch.finfo(logits.dtype).eps ** 0.5 * logits.abs().max()
    return found if bool(same) else Foldable()


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
    """False for a module that would change and has a hook or another ``forward``, or normalises by the batch."""
    if type(module) not in _LOOKED_AT:
        return True
    hooked = any(getattr(module, hooks) for hooks in _HOOKS) or "forward" in module.__dict__
    return not hooked and not (type(module) in _NORMS and (module.training or module.running_mean is None))


@torch.no_grad()
def _changes(net: nn.Module, found: Foldable, low: torch.dtype | None) -> Iterator[Change]:
    done: set[nn.Module] = set()
    for relu in found.relus:
        yield relu, "forward", torch.relu_
    for conv, norm in found.pairs:
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
