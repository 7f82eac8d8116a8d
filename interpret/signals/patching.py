"""Exact unit patching: set one unit of x' back to its clean activation, and rerun only what lies above it (ours).

The causal check of every gradient-based unit effect.  What lies below the layer is run once: in each rerun the modules
that had finished before the layer answer with what they returned then, whatever the shape of the network's graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from glassarmor.interpret.modes import evaluating
from glassarmor.interpret.network.chunks import measuring
from glassarmor.interpret.network.layouts import Layout, layouts_of
from glassarmor.interpret.observation import find_layers, strongest_wrong
from glassarmor.interpret.signals.pse import PromotionSuppression


@dataclass(frozen=True)
class Cut:
    """One pass, cut at the output of a layer.

    ``activation``: (N, C, positions…), read as ``layout`` says.  ``shape``: of the layer's output.

    ``below``: the outermost calls that had finished by then and what they returned, in order.  They cannot depend on the
    layer, so they need not run again (None: this one must); calls under way at the cut, such as the block around the
    layer, are not among them.
    """

    x: Tensor
    logits: Tensor
    layer: nn.Module
    activation: Tensor
    layout: Layout
    shape: torch.Size
    below: tuple[tuple[nn.Module, Tensor | None], ...]


@torch.no_grad()
def cut(net: nn.Module, layer: str, x: Tensor) -> Cut:
    """Run ``net`` on x (N, C, H, W) in its present mode and remember what lies below ``layer``.

    Batch first: a module whose output is not one tensor with a row an image runs again in every rerun (its own modules
    answer), and so does one that also runs on weights, such as a norm shared with a position embedding.

    Raises:
        ValueError: unknown layer; a layer that did not run, ran twice, or returned no tensor of N rows.
    """
    module = find_layers(net, [layer])[layer]
    layout = layouts_of(net, x, [layer]).get(layer)
    modules = dict(net.named_modules())
    by_image = {modules[name] for name, known in layouts_of(net, x).items() if known.axes[0] == "N" and known.fold == 1}
    finished: list[tuple[nn.Module, Tensor | None]] = []
    starts: list[int] = []  # for each call under way, how many had finished when it began
    found: list[Tensor] = []

    def enter(_module: nn.Module, _inputs: object) -> None:
        if not found:
            starts.append(len(finished))

    def leave(called: nn.Module, _inputs: object, output: object) -> None:
        if found:
            if called is module:
                raise ValueError(f"layers: {layer!r} ran twice in one forward; name a layer that runs once")
            return
        start = starts.pop()
        if called in by_image and isinstance(output, Tensor) and len(output) == len(x):
            del finished[start:]  # what ran inside this call is no longer called when the call itself answers
            kept = output.clone()  # an in-place operation above may write into the output
            if called is module:
                found.append(kept)
            else:
                finished.append((called, kept))
        elif called is module:
            # Units of windows, or of sequences that come first, are patched all the same; others of its kind run again.
            if not isinstance(output, Tensor) or layout is None or layout.plain:
                raise ValueError(f"layers: {layer!r} must return one tensor of {len(x)} rows, found {_describe(output)}")
            del finished[start:]
            found.append(output.clone())
        else:
            finished.append((called, None))  # so that a later call of the same module is not taken for this one

    handles = [m.register_forward_pre_hook(enter) for m in net.modules()]
    handles += [m.register_forward_hook(leave) for m in net.modules()]
    try:
        logits = net(x).float()
    finally:
        for handle in handles:
            handle.remove()
    if not found or layout is None:
        raise ValueError(f"layers: {layer!r} recorded nothing in this forward; was it skipped?")
    return Cut(x, logits, module, layout.view(found[0]), layout, found[0].shape, tuple(finished))


def _describe(output: object) -> str:
    return f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__


@torch.no_grad()
def rerun(net: nn.Module, at: Cut, activation: Tensor) -> Tensor:
    """Logits (k·N, K) of k passes at once whose layer gives ``activation`` (k·N, C, …): only what lies above it runs."""
    times = len(activation) // len(at.x)

    def repeated(value: Tensor) -> Tensor:
        return value.repeat(times, *[1] * (value.dim() - 1))

    queues: dict[nn.Module, deque[Callable[[], Tensor] | None]] = {}
    for module, output in at.below:
        queues.setdefault(module, deque()).append(None if output is None else partial(repeated, output))
    queues.setdefault(at.layer, deque()).append(lambda: at.layout.restore(activation, at.shape))
    with _answering(queues):
        return net(repeated(at.x)).float()


@contextmanager
def _answering(queues: Mapping[nn.Module, deque[Callable[[], Tensor] | None]]) -> Iterator[None]:
    """Inside, each module answers its first calls from its queue; later calls run (a ReLU may be used again above).

    What was kept is the output after the module's hooks; an answer must not go through them again.
    """
    for module, queue in queues.items():

        def answer(*args: object, queue=queue, run=module._call_impl, **kwargs: object) -> object:  # type: ignore[no-untyped-def]
            kept = queue.popleft() if queue else None
            return run(*args, **kwargs) if kept is None else kept()

        object.__setattr__(module, "_call_impl", answer)  # an instance attribute shadows the class's: forward and hooks
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it would compute whole layers without asking the modules inside
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in queues:
            object.__delattr__(module, "_call_impl")


@torch.no_grad()
def unit_patching(
    net: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    target: Tensor | None = None,
    *,
    layer: str,
    chunk: int | None = None,
) -> PromotionSuppression:
    """Causal effect of each unit of a layer on both logits: what is lost when it alone is set back to clean, (N, C).

    p_k = Z_t(x') − Z_t(x' with A_k(x)), s_k = Z_t0(x' with A_k(x)) − Z_t0(x'); the image-level counterpart is
    :func:`.region_effects`.  Units interact, so the effects need not add up: see ``gap``.

    Args:
        net: run in eval mode; left as it was.
        x, x_adv: (N, C, H, W) in [0,1].
        y, target: true and promoted labels, (N,); the default target is the strongest wrong class at x'.
        layer: a name as in ``net.named_modules()``; its output is (N, C, …).
        chunk: samples a rerun, by default as :mod:`glassarmor.interpret.network.chunks` chooses; there
            are ⌈C / max(1, chunk // N)⌉ of them beside two whole passes.

    Raises:
        ValueError: see :func:`cut`.
    """
    n = len(x)
    with evaluating(net):
        with measuring(net) as largest:
            clean, adv = cut(net, layer, x), cut(net, layer, x_adv)
        chunk = chunk or largest.chunk(x.device)
        if target is None:
            target = strongest_wrong(adv.logits, y)
        pair = torch.stack([y, target], 1)
        without = []
        for units in torch.arange(adv.activation.shape[1], device=x.device).split(max(1, chunk // n)):
            patched = adv.activation.expand(len(units), *adv.activation.shape).clone()  # (k, N, C, …)
            patched[torch.arange(len(units), device=x.device), :, units] = clean.activation[:, units].transpose(0, 1)
            z = rerun(net, adv, patched.flatten(0, 1)).view(len(units), n, -1)
            without.append(z.gather(2, pair.expand(len(units), n, 2)))
    patched_back = torch.cat(without).transpose(0, 1)  # (N, C, 2)
    before, after = clean.logits.gather(1, pair), adv.logits.gather(1, pair)
    return PromotionSuppression(
        promotion=after[:, None, 1] - patched_back[..., 1],
        suppression=patched_back[..., 0] - after[:, None, 0],
        total_promotion=after[:, 1] - before[:, 1],
        total_suppression=before[:, 0] - after[:, 0],
    )
