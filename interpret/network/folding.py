"""BatchNorm folded into the convolution before it, for the passes that only ask for gradients of the images.

An attack of ResNet-18 is 1.06 times as fast with it in bf16 and 1.14 times in fp32 (0.763 → 0.718 and 1.591 → 1.393 s,
``python benchmarks/throughput.py --what folding --steps 2 --batch 32 --rounds 3``).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from glassarmor.interpret.modes import replaying, rng_state

Pair = tuple[nn.Module, nn.Module]  # a convolution, and the BatchNorm that alone reads its output
Change = tuple[nn.Module, str, object]  # a module, an attribute's name, what it is for the time being

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CAST = (*_CONVOLUTIONS, nn.Linear)  # what autocast runs in low precision
_LOOKED_AT = (*_CONVOLUTIONS, *_NORMS, nn.ReLU)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ABSENT = object()
# Of a tensor: what hands its values to Python, which may then take another path.
_READS = {
    *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__"),
    *("item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "nonzero"),
}
MANY: Final = 3  # gradients from which folding was seen to pay at any batch, down to one image (benchmarks/RESULTS.md)


@dataclass(frozen=True)
class Foldable:
    """What can be saved: pairs of a convolution and its BatchNorm, and ReLUs whose input nobody else reads.

    ``weights`` are scaled to fold the pairs, each once; ``share``: values that their BatchNorms make of one of the input.
    """

    pairs: tuple[Pair, ...] = ()
    relus: tuple[nn.Module, ...] = ()
    weights: int = 0
    share: float = 0.0

    def pays(self, x: Tensor, gradients: int) -> bool:
        """Whether folding for so many gradients of ``x`` saves more than it costs: by counts, from measurements."""
        return gradients >= MANY or gradients * self.share * x.numel() >= self.weights


@dataclass
class _Look:
    """A net as it was looked at: submodules that may take part, settings, and the batches on which it was compared."""

    inside: list[nn.Module]
    settings: list[object]
    found: Foldable
    fewest: int
    most: int


_known: WeakKeyDictionary[nn.Module, _Look] = WeakKeyDictionary()


@contextmanager
def folded(net: nn.Module, x: Tensor, gradients: int = MANY) -> Iterator[nn.Module]:
    """The same function of the images in fewer operations: the weights, scaled by the BatchNorms behind them, made once.

    For a net in eval mode whose parameters are frozen: inside, no gradient reaches them.  Exact up to rounding.  ReLUs
    overwrite what they read, where nothing else reads it.  Under autocast the weights of all convolutions and linear layers
    are also cast once, instead of in each pass (autocast itself at best remembers casts of weights that ask for a gradient).
    Nothing is written: attributes of the modules hide the parameters, and are taken away in any case.

    What a folded convolution returns is overwritten by what its BatchNorm returned, and that by its ReLU.  So a module that
    has a hook, or a ``forward`` that somebody replaced, stays as it is; who hooks layers inside must not fold.

    Args:
        net: in eval mode.
        x: images (N, C, H, W), which are run when the net, or a batch so large, is seen first (:func:`foldable`).
        gradients: how many are taken inside, each over the whole batch; one or two of a few images are not worth folding.
    """
    own = getattr(net, "_orig_mod", net)  # inside torch.compile's wrapper
    kind = x.device.type
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    with torch.no_grad():
        found = foldable(own, x)
        changes = list(_changes(own, found if found.pays(x, gradients) else Foldable(), low))
    with _replaced(changes):
        yield net


def foldable(net: nn.Module, x: Tensor) -> Foldable:
    """What of a net in eval mode can be folded, found by running two images and kept until modules or settings change.

    A pair is a convolution and a BatchNorm, each of torch's own class and run once, the one's output read by the other
    and by nothing else on the way to the logits.  The net with everything folded must give the same logits for these
    images and let their gradient through, else nothing is: so a net that reads what autograd does not see, or draws random
    numbers, is left alone.

    The path that a net takes may depend on attributes that are plain values, such as a flag.  One that reads values of
    tensors, and so could depend on the images, is not folded.  Paths that depend on the number of images: the logits are
    compared again, without gradients, on every batch that is larger or smaller than those before, and nothing is folded
    once they differ.  What happens at one number between two that agree would not be seen.

    Only the net's ``forward`` runs, not the hooks on the net itself: this is none of the passes that they count.
    """
    inside = [module for module in net.modules() if module is not net and _takes_part(module)]
    settings, look = _settings(net), _known.get(net)
    same = look is not None and look.settings == settings and len(look.inside) == len(inside)
    if look is None or not same or any(a is not b for a, b in zip(look.inside, inside, strict=True)):
        few = x[:2].detach().clone().requires_grad_()
        found = Foldable()
        if any(type(module) in _NORMS for module in inside):
            found = _unless_it_fails(lambda: _found(net, inside, few), x)
        look = _known[net] = _Look(inside, settings, found, len(few), len(few))
    if look.found != Foldable() and not look.fewest <= len(x) <= look.most:
        found, images = look.found, x.detach().clone()
        look.found = _unless_it_fails(lambda: found if _agree(net, found, images) else Foldable(), x)
        look.fewest, look.most = min(look.fewest, len(x)), max(look.most, len(x))
    return look.found


def _unless_it_fails(find: Callable[[], Foldable], x: Tensor) -> Foldable:
    """In full precision, and without a trace in the random numbers; nothing, where the net refuses, e.g. part of a batch."""
    with replaying(rng_state(x.device), x.device), torch.autocast(x.device.type, enabled=False), torch.enable_grad():
        try:
            return find()
        except (RuntimeError, ValueError):
            return Foldable()


@torch.no_grad()
def _agree(net: nn.Module, found: Foldable, x: Tensor) -> bool:
    logits = net.forward(x)
    with _replaced(list(_changes(net, found, None))):
        return _close(net.forward(x), logits)


def _close(logits: Tensor, expected: Tensor) -> bool:
    return bool((logits - expected).abs().max() <= torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max())


class _Reads(TorchFunctionMode):
    """Notices where values of tensors are handed to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.any = self.any or getattr(func, "__name__", "") in _READS
        return func(*args, **(kwargs or {}))


def _settings(net: nn.Module) -> list[object]:
    """Attributes of all modules that are plain values: what may switch a path on or off."""
    plain = (bool, int, float, str, type(None))
    return [(name, value) for module in net.modules() for name, value in vars(module).items() if type(value) in plain]


def _found(net: nn.Module, inside: list[nn.Module], x: Tensor) -> Foldable:
    runs: Counter[nn.Module] = Counter()
    read: dict[nn.Module, Tensor] = {}
    made: dict[int, list[nn.Module]] = defaultdict(list)  # by identity of an output: who returned it, innermost first
    kept: list[Tensor] = []  # so that identities stay what they are
    sizes: dict[nn.Module, int] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        runs[module] += 1
        made[id(output)].append(module)
        kept.append(output)
        if type(module) in _LOOKED_AT:
            read[module], sizes[module] = inputs[0], output.numel()

    handles = [module.register_forward_hook(note) for module in net.modules() if module is not net]
    try:
        with _Reads() as values:
            logits = net.forward(x)
    finally:
        for handle in handles:
            handle.remove()
    if values.any or not isinstance(logits, Tensor):
        return Foldable()
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
    weights = sum(weight.numel() for conv, _ in pairs if isinstance(weight := conv.weight, Tensor))
    found = Foldable(tuple(pairs), tuple(relus), weights, sum(sizes[norm] for _, norm in pairs) / x.numel())
    with _replaced(list(_changes(net, found, None))):
        again = net.forward(x)
        torch.autograd.grad(again.sum(), x)  # fails where something that was overwritten is needed
    return found if _close(again, logits) else Foldable()


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
