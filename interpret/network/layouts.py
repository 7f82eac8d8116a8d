"""Which axis of a layer's output is what: images, units, positions.  Learned from how the net uses it (ours).

Every axis of every value of one forward is followed from operation to operation: a permutation moves it, a reshape joins
or splits it, an addition says that two are the same.  What meets an axis tells what it is: a convolution, a normalisation
or attention takes its channels as units; a linear layer does so too, with less weight, because networks that mix tokens
put tokens there.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from glassarmor.interpret.modes import logits_in, replaying, rng_state, undisturbed
from glassarmor.interpret.network.axes import AxisTrace

ATTRIBUTE = "_glassarmor_layout"  # on a module: what somebody declared


@dataclass(frozen=True)
class Layout:
    """How the output of one layer is read as (N, C, positions).

    Args:
        axes: a letter for each axis of the output.  N: images; C: units (two C: heads and what each holds, one after the
            other); H and W: rows and columns; any other letter: a position, e.g. T for tokens or time steps.
        fold: where the first axis holds ``fold`` entries of each image, one after the other (windows): how many.
        prefix: tokens before the grid that stand for no place in the image: class token, registers.
        grid: rows and columns of the positions; empty where they form no map.
        entry: of several tensors that the layer returns, which: the first that the network reads.
        calls: how often the layer runs in a forward.
        recurrent: whether each call reads what the one before gave: a cell, whose calls are time steps.
        overwritten: whether the net writes into the output afterwards, so that a copy must go on.
    """

    axes: str
    fold: int = 1
    prefix: int = 0
    grid: tuple[int, ...] = ()
    entry: int = 0
    calls: int = 1
    recurrent: bool = False
    overwritten: bool = False

    @property
    def plain(self) -> bool:
        """Whether the output is read as it is: images first, units second."""
        return self.fold == 1 and self.axes.startswith("NC") and self.axes.count("C") == 1

    def _order(self) -> tuple[str, list[int]]:
        axes = ("NP" + self.axes[1:]) if self.fold > 1 else self.axes
        first = [axes.index("N")] + [i for i, axis in enumerate(axes) if axis == "C"]
        return axes, first + [i for i in range(len(axes)) if i not in first]

    def view(self, output: Tensor) -> Tensor:
        """(N, C, positions…) of an output, in graph; a view unless units are spread over two axes."""
        if self.plain:
            return output
        if output.dim() != len(self.axes):
            raise ValueError(
                f"layouts: {self.axes!r} names {len(self.axes)} axes, but the layer gives shape {tuple(output.shape)}"
            )
        _, order = self._order()
        if self.fold > 1:
            output = output.unflatten(0, (-1, self.fold))
        units = self.axes.count("C")
        return output.permute(order).flatten(1, units)

    def restore(self, values: Tensor, like: Sequence[int]) -> Tensor:
        """Turn :meth:`view` back: (N, C, positions…) → the layer's own axes.

        Args:
            like: the shape of the output.  Another number of images is allowed.
        """
        if self.plain:
            return values
        _, order = self._order()
        shape = [-1, self.fold, *like[1:]] if self.fold > 1 else list(like)
        if self.axes.count("C") > 1:
            values = values.unflatten(1, [shape[i] for i in order[1 : 1 + self.axes.count("C")]])
        values = values.permute([order.index(i) for i in range(len(order))])
        return values.flatten(0, 1) if self.fold > 1 else values

    @property
    def spatial(self) -> bool:
        """Whether the positions form a map over the image."""
        return len(self.grid) == 2

    def maps(self, values: Tensor, lead: int = 2) -> Tensor:
        """Values by position as maps (…, h, w): a token grid folded out, tokens that stand for no place left out.

        Args:
            values: (…, positions…), as :meth:`view` orders them.
            lead: axes before the positions.

        Raises:
            ValueError: the positions form no map.
        """
        if not self.spatial:
            raise ValueError("the positions form no map over the image")
        return values.flatten(lead)[..., self.prefix :].unflatten(lead, self.grid)


PLAIN = {2: Layout("NC"), 3: Layout("NCT"), 4: Layout("NCHW"), 5: Layout("NCDHW")}


def plain_layout(act: Tensor) -> Layout:
    """Of an activation that comes without one: images first, units second."""
    known = PLAIN.get(act.dim()) or Layout("NC" + "T" * (act.dim() - 2))
    return replace(known, grid=tuple(act.shape[2:])) if act.dim() == 4 else known


class UnknownLayout(ValueError):
    """The axes of a layer cannot be told apart; says what to declare."""


def declare_layouts(net: nn.Module, layouts: Mapping[str, str]) -> None:
    """Say what the axes of layers are, where it cannot be learned or is learned wrongly; copies of the net keep it.

    Args:
        layouts: name of a layer → a letter for each axis of its output, e.g. ``{"blocks.3": "NTC"}``; see :class:`Layout`.

    Raises:
        ValueError: an unknown layer; letters without exactly one N, or without C.
    """
    modules = dict(net.named_modules())
    for key, axes in layouts.items():
        name = str(key)  # in YAML 0 is a number
        if name not in modules or not name:
            close = ", ".join(difflib.get_close_matches(name, modules, n=5, cutoff=0.3) or list(modules)[1:8])
            raise ValueError(f"layouts: the network has no layer {name!r}; close names: {close}")
        letters = isinstance(axes, str) and axes.isalpha() and axes.isupper()
        if not letters or axes.count("N") != 1 or "C" not in axes:
            raise ValueError(
                f"layouts.{name}: expected a letter for each axis, N for images and C for units, e.g. NTC; found {axes!r}"
            )
        setattr(modules[name], ATTRIBUTE, axes)
    _LEARNED.clear()  # of nets around this one too


_LEARNED: WeakKeyDictionary[nn.Module, dict[Any, dict[str, Layout | str]]] = WeakKeyDictionary()


def layouts_of(net: nn.Module, x: Tensor, layers: Sequence[str] | None = None) -> dict[str, Layout]:
    """The layout of each named layer for images like ``x``; learned once a net and image size, by one small forward.

    Args:
        x: images, (N, …); one is used.
        layers: names as in ``net.named_modules()``; by default every layer whose axes are known.

    Raises:
        UnknownLayout: a layer whose axes cannot be told apart, with what to declare.
    """
    key = (tuple(x.shape[1:]), x.device)
    of_net = _LEARNED.setdefault(net, {})
    if key not in of_net or any(name not in of_net[key] for name in layers or ()):
        of_net[key] = _learn(net, x)
    known = of_net[key]
    if layers is None:
        return {name: layout for name, layout in known.items() if isinstance(layout, Layout)}
    found = {}
    for name in layers:
        layout = known.get(name, "it did not run")
        if isinstance(layout, Layout):
            found[name] = layout
        elif name in known:
            raise UnknownLayout(f"layers: which axes of {name!r} are units and which positions cannot be told: {layout}")
    return found


@torch.no_grad()
def _learn(net: nn.Module, x: Tensor) -> dict[str, Layout | str]:
    images = x[:1].detach().clone().repeat(3, *[1] * (x.dim() - 1))
    try:
        trace = _traced(net, images)
    except (RuntimeError, ValueError):  # some nets take nothing but the batch they were made for
        trace = _traced(net, x.detach().clone())
    found: dict[str, Layout | str] = {}
    modules = dict(net.named_modules())
    for name in trace.outputs:  # in the order in which they end
        declared = getattr(modules[name], ATTRIBUTE, None)
        learned = trace.axes_of(name)
        layout: Layout | str = Layout(**learned) if isinstance(learned, dict) else learned
        if declared is not None and (isinstance(layout, str) or layout.axes != declared):
            layout = _declared(declared, trace, name, tuple(x.shape))
        if isinstance(layout, Layout):
            calls = len(trace.outputs[name])
            cell = calls > 1 and layout.axes == "NC" and name not in trace.repeated
            written = trace.overwritten(name, layout.entry)
            layout = replace(layout, calls=calls, recurrent=cell, overwritten=written)
        found[name] = layout
    return found


def _traced(net: nn.Module, images: Tensor) -> AxisTrace:
    drawing = nullcontext() if images.is_meta else replaying(rng_state(images.device), images.device)
    with undisturbed(net), torch.no_grad(), drawing:
        trace = AxisTrace(net, images)
        with trace:
            trace.logits = logits_in(net(images))
    return trace


def _declared(axes: str, trace: AxisTrace, name: str, images: tuple[int, ...]) -> Layout | str:
    entry = trace.entry(name)
    if entry is None:
        return "nothing that it returns is read"
    shape = tuple(trace.outputs[name][0][entry].shape)
    if len(axes) != len(shape):
        return f"the layouts say {axes}, {len(axes)} axes, but its shape is {shape}"
    if shape[axes.index("N")] != trace.images:
        return f"the layouts say {axes}, but in its shape {shape} for {trace.images} images that axis N does not count them"
    places = [size for axis, size in zip(axes, shape, strict=True) if axis not in "NC"]
    if "H" in axes and "W" in axes and len(places) == 2:
        grid = tuple(places) if axes.index("H") < axes.index("W") else ()
        return Layout(axes, grid=grid, entry=entry)
    side = math.isqrt(places[0]) if len(places) == 1 else 0
    if side > 1 and images[-1] == images[-2]:
        for prefix in (0, 1, 2):  # a class token, and DeiT's for distillation
            root = math.isqrt(places[0] - prefix)
            if root**2 == places[0] - prefix:
                return Layout(axes, prefix=prefix, grid=(root, root), entry=entry)
    return Layout(axes, entry=entry)
