"""Context managers that borrow a network and give it back as it was: every submodule's mode, every flag, every buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm


def lend(_net: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    """A hook before the forward: the net gets a copy of the images, so that one that works in place changes nobody's."""
    return tuple(each.clone() if isinstance(each, Tensor) else each for each in inputs)


def logits_in(output: Any, key: str | int | None = None) -> Any:
    """What a net's output has for logits, of those that return more than them.  A tensor is that itself.

    Without ``key`` the first of a tuple or list, or what is named ``logits`` in a dict, a named tuple or another object; the
    only entry of a dict.  Auxiliary heads, which some nets return in training alone, are left out so.  What has no such
    entry comes back as it is.

    Args:
        key: which to take: the name of an entry, or its place in a tuple.

    Raises:
        ValueError: no entry of this key; or a tuple of tables (N, …) of different widths: the first may be features.
    """
    if isinstance(output, Tensor):
        return output
    entries = _entries(output)
    if key is not None:
        named = {str(name): value for name, value in entries.items()}
        if str(key) not in named:
            raise ValueError(f"output: expected one of {', '.join(named) or 'none'} of what the net returns, found {key!r}")
        return named[str(key)]
    if "logits" in entries:
        return entries["logits"]
    if isinstance(output, Mapping):
        return next(iter(entries.values())) if len(entries) == 1 else output
    if not isinstance(output, tuple | list) or not output:
        return output
    widths = {value.shape[1] for value in output if isinstance(value, Tensor) and value.dim() == 2}
    if len(widths) > 1:
        raise ValueError(f"output: the net returns tables of {sorted(widths)} columns; say which is the logits: output=0, …")
    return output[0] if isinstance(output[0], Tensor) else output


def _entries(output: Any) -> dict[str | int, Any]:
    """Names, else places, of what an output holds."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, tuple) and hasattr(output, "_asdict"):
        return dict(output._asdict())
    if isinstance(output, tuple | list):
        return dict(enumerate(output))
    return {"logits": output.logits} if isinstance(getattr(output, "logits", None), Tensor) else {}


def read_logits(_net: nn.Module, _inputs: object, output: object, key: str | int | None = None) -> object:
    """A hook after the forward: whoever calls the net gets its logits (:func:`logits_in`)."""
    return logits_in(output, key)


def reading(net: nn.Module, key: str | int | None = None) -> nn.Module:
    """``net`` itself, which from now on returns its logits alone, in any mode; no wrapper, so that no name changes."""
    net.register_forward_hook(partial(read_logits, key=key))
    return net


class Function(nn.Module):
    """A plain function of images (N, C, H, W) to logits (N, K), as a net without parameters."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def as_module(net: nn.Module | Callable[[Tensor], Any]) -> nn.Module:
    """The net itself; a plain function as :class:`Function`.

    Raises:
        TypeError: nothing that can be called.
    """
    if isinstance(net, nn.Module):
        return net
    if not callable(net):
        raise TypeError(f"net: expected a torch.nn.Module or a function of images, found {type(net).__name__}")
    return Function(net)


@contextmanager
def answering(net: nn.Module | Callable[[Tensor], Any]) -> Iterator[nn.Module]:
    """Inside, the net (:func:`as_module`) returns its logits alone, in any mode."""
    module = as_module(net)
    hook = None if read_logits in module._forward_hooks.values() else module.register_forward_hook(read_logits)
    try:
        yield module
    finally:
        if hook is not None:
            hook.remove()


def is_compiled(net: nn.Module) -> bool:
    """Whether ``torch.compile`` compiled the net or a part of it; hooks that come later are then not called."""
    return isinstance(net, torch._dynamo.OptimizedModule) or any(m._compiled_call_impl is not None for m in net.modules())


@contextmanager
def uncompiled(net: nn.Module) -> Iterator[None]:
    """Inside, a net that ``torch.compile`` compiled runs as it was written.

    A compiled one shows nothing to hooks that came later, and has no second derivative.
    """
    with torch.compiler.set_stance("force_eager") if is_compiled(net) else nullcontext():
        yield


@contextmanager
def evaluating(net: nn.Module, eager: bool = True) -> Iterator[nn.Module]:
    """Eval mode inside; each submodule gets back its own mode (a net may mix both, e.g. frozen BatchNorm).

    The net sees copies (:func:`lend`), returns its logits (:func:`logits_in`), and is :func:`uncompiled` if ``eager``.
    """
    modes = [(module, module.training) for module in net.modules()]
    lent = None if lend in net._forward_pre_hooks.values() else net.register_forward_pre_hook(lend)
    net.eval()
    try:
        with answering(net), uncompiled(net) if eager else nullcontext():
            yield net
    finally:
        if lent is not None:
            lent.remove()
        for module, training in modes:
            module.training = training


@contextmanager
def twice_differentiable(needed: bool = True) -> Iterator[None]:
    """Inside, attention takes a kernel whose gradient can be differentiated again; the fused ones have none."""
    if not needed:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def frozen(net: nn.Module) -> Iterator[nn.Module]:
    """No parameter asks for a gradient inside: input gradients cost no weight gradients."""
    flags = [(parameter, parameter.requires_grad) for parameter in net.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield net
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextmanager
def in_float32(net: nn.Module) -> Iterator[nn.Module]:
    """Parameters and buffers in float32 inside; afterwards they are the very tensors they were.

    For nets that train in bfloat16, float16 or float64: what is measured of them is measured in one precision.
    """
    slots: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for tensor in [*net.parameters(), *net.buffers()]:
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            slots.append((tensor, tensor.data, tensor.grad))
            tensor.grad = None
            tensor.data = tensor.data.float()
    try:
        yield net
    finally:
        for tensor, data, grad in slots:
            tensor.data = data
            tensor.grad = grad


@contextmanager
def buffers_kept(net: nn.Module) -> Iterator[nn.Module]:
    """Afterwards every buffer (BatchNorm's running statistics) is what it was, bit for bit; no mode or flag is touched."""
    buffers = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in net.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield net
    finally:
        with torch.no_grad():
            for owner, name, buffer, value in buffers:
                # Always: BatchNorm writes its statistics without raising their version.  Through .data: a graph made
                # before must not take the same value for a change.
                buffer.data.copy_(value)
                owner[name] = buffer


@contextmanager
def undisturbed(net: nn.Module, eager: bool = True) -> Iterator[nn.Module]:
    """Eval mode, frozen, gradients enabled; afterwards modes, flags, buffers and ``.grad`` are what they were, bit for bit.

    Works inside Lightning's ``validate``/``test`` loops too, which run under inference mode where gradients fail; tensors
    made outside the block under inference mode must still be cloned by the caller.
    """
    grads = [(parameter, parameter.grad) for parameter in net.parameters()]
    for parameter, _ in grads:
        parameter.grad = None  # set aside, so that nothing inside can add to it
    try:
        with buffers_kept(net), torch.inference_mode(False), torch.enable_grad(), evaluating(net, eager), frozen(net):
            yield net
    finally:
        for parameter, grad in grads:
            parameter.grad = grad


@contextmanager
def batchnorm_as_found(net: nn.Module) -> Iterator[None]:
    """Inside, a BatchNorm that trains now normalises by its batch even where the net is put in eval mode; dropout does not.

    The mode in which several published codes attack.  The running statistics are afterwards what they were.
    """
    modes: dict[nn.Module, bool] = {}

    def before(module: nn.Module, _inputs: object) -> None:
        modes[module], module.training = module.training, True

    def after(module: nn.Module, _inputs: object, _output: object) -> None:
        module.training = modes[module]

    norms = [module for module in net.modules() if isinstance(module, _BatchNorm) and module.training]
    handles = [module.register_forward_pre_hook(before) for module in norms]
    handles += [module.register_forward_hook(after, always_call=True) for module in norms]
    try:
        with buffers_kept(net):
            yield
    finally:
        for handle in handles:
            handle.remove()


def rng_state(device: torch.device) -> Tensor:
    """State of the device's global generator, which dropout draws from."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


@contextmanager
def replaying(state: Tensor, device: torch.device) -> Iterator[None]:
    """Draw from ``state`` inside (same dropout masks as the pass before); afterwards go on from where we stood."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
        yield


@contextmanager
def batch_statistics(net: nn.Module, recorded: dict[nn.Module, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Record into ``recorded`` the batch mean and biased variance, in graph, of every BatchNorm that uses them."""

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, _BatchNorm)
        if module.training or module.running_mean is None:
            if module in recorded:
                raise ValueError(
                    "a BatchNorm layer is used twice in one forward, so its batch statistics are ambiguous; "
                    "use passes=joined for this network"
                )
            recorded[module] = channel_statistics(inputs[0])

    handles = [m.register_forward_pre_hook(keep) for m in net.modules() if isinstance(m, _BatchNorm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def normalised_by(recorded: dict[nn.Module, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, the BatchNorms in ``recorded`` normalise by those statistics and update nothing.

    The statistics stay in the graph: the pass is the same function of its input and of the weights as the pass that
    recorded them, so its gradients are true ones.
    """

    def apply(module: nn.Module, mean: Tensor, variance: Tensor, x: Tensor) -> Tensor:
        assert isinstance(module, _BatchNorm)
        scale = torch.rsqrt(variance + module.eps)
        shift = -mean * scale
        if module.affine:
            scale, shift = scale * module.weight, shift * module.weight + module.bias
        normalised: Tensor = _Scaled.apply(x, scale, shift)
        return normalised

    for module, (mean, variance) in recorded.items():
        # An instance attribute shadows the class's forward; deleting it brings the original back, hooks untouched.
        object.__setattr__(
            module, "forward", lambda x, module=module, mean=mean, variance=variance: apply(module, mean, variance, x)
        )
    try:
        yield
    finally:
        for module in recorded:
            object.__delattr__(module, "forward")


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all but the channels of x (N, C, …), (C,) each, in fp32 and in graph.

    Autograd would keep a copy of x in fp32 for the backward; this keeps x itself, which others keep anyway.
    """
    mean, variance = _Statistics.apply(x)
    return mean, variance


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.device.type == "cpu":  # as BatchNorm itself does: torch.var_mean took up to fifteen times as long here
            own = torch.zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
            mean, variance = torch.batch_norm_update_stats(x, own, own, 0.0)  # what it updates is thrown away
        else:
            variance, mean = torch.var_mean(x.float(), dim=_all_but_channels(x), correction=0)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, by_mean: Tensor, by_variance: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = x.numel() / x.shape[1]
        slope = 2 * by_variance / count
        return _affine(x, slope, by_mean / count - slope * mean)


class _Scaled(torch.autograd.Function):
    """x · scale + shift by channel, computed in fp32, in x's own precision; keeps no copy of x, as above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return _affine(x, scale, shift)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        as_it_is = torch.zeros_like(scale), torch.ones_like(scale)
        by_x, by_scale, by_shift = torch.ops.aten.native_batch_norm_backward(
            gradient.contiguous(memory_format=_layout(x)), x, scale, *as_it_is, None, None, False, 0.0, [True] * 3
        )
        return by_x, by_scale, by_shift


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x · scale + shift: BatchNorm's own kernel with mean 0 and variance 1 reads and writes each map once."""
    return torch.batch_norm(x, scale, shift, torch.zeros_like(scale), torch.ones_like(scale), False, 0.0, 0.0, False)


def _layout(x: Tensor) -> torch.memory_format:
    """Of a gradient that is to fit x: kernels fall back to slow ones where the two differ."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
