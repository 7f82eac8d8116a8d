"""The network as a graph of layers, traced from one real forward: branches, additions and reused modules included (ours).

A module that calls no other module is one node; what a block does outside its modules (an addition, a concatenation, a
functional ReLU) is a node of its own.  Operations that only rename values, such as a reshape or a slice, are wires.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from glassarmor.interpret.inputs import floats_of
from glassarmor.interpret.modes import replaying, rng_state, undisturbed
from glassarmor.interpret.network.axes import tensors_in

MOVES = frozenset({"clone", "contiguous", "double", "float", "half", "reshape", "to", "type_as"})
PERMUTATIONS = frozenset({"movedim", "moveaxis", "permute", "swapaxes", "swapdims", "transpose"})
KINDS = {"add": "add", "sub": "add", "cat": "concat", "concat": "concat", "mul": "multiply", "mean": "pooling"}
ACTIVATIONS = ("relu", "gelu", "silu", "sigmoid", "tanh", "softmax", "softplus", "elu", "mish", "hardswish")


@dataclass(frozen=True)
class Node:
    """One layer, or one operation between layers.

    ``name`` is unique; ``layer`` is the name in ``net.named_modules()``, "" for an operation.  ``shape``: one image's
    output, (C, H, W), or the whole shape where the first dimension is no longer the batch.  ``parameters``: how many it
    is the first to use.  ``parent``: name of the block around it, "" for the net; ``depth``: how many blocks there are.
    ``observable``: ``record(net, [layer])`` can record it.
    """

    name: str
    layer: str
    type: str
    kind: str  # conv, linear, norm, activation, pooling, attention, add, concat, …; "block" when collapsed, "input"
    shape: tuple[int, ...]
    parameters: int
    parent: str
    depth: int
    observable: bool


@dataclass(frozen=True)
class Block(Node):
    """A module around others; its inside are ``nodes[start:stop]`` of the structure."""

    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Structure:
    """``nodes`` in execution order, the input first; ``edges`` (from, to) indices of nodes, sorted, from < to.

    ``blocks``: outer before inner, in the order in which they begin.  ``unused``: parameters that the forward left out.
    """

    nodes: tuple[Node, ...]
    edges: tuple[tuple[int, int], ...]
    blocks: tuple[Block, ...]
    unused: int

    def layers(self) -> tuple[str, ...]:
        """All observable layers, blocks included, in the order in which their outputs are ready."""
        ends = [(i + 1, 1, node) for i, node in enumerate(self.nodes)]
        # Where several end with one node, the inner is ready first: blocks are outer before inner.
        ends += [(block.stop, 2 + place, block) for place, block in enumerate(reversed(self.blocks))]
        return tuple(node.layer for _, _, node in sorted(ends, key=lambda end: end[:2]) if node.observable)


def structure(net: nn.Module, x: Tensor) -> Structure:
    """Trace one forward in eval mode; the net is left bit for bit as it was.

    Args:
        x: a few images, (N, C, H, W); two are enough.
    """
    with undisturbed(net), replaying(rng_state(x.device), x.device):
        x = x.detach().to(floats_of(net, x), copy=True)
        trace = _Trace(net, x)
        with trace:
            net(x)
    return trace.structure()


def collapse(full: Structure, opened: Collection[str]) -> Structure:
    """The drawing in which only the blocks named are open; each of the other outermost ones is one node.

    A block is open only if those around it are.  ``opened=()`` shows the net's outermost modules; see :func:`open_to`.

    Raises:
        ValueError: a name that is no block.
    """
    if unknown := set(opened) - {block.name for block in full.blocks}:
        names = ", ".join(block.name for block in full.blocks)
        raise ValueError(f"opened: expected names of blocks ({names}), found {', '.join(sorted(unknown))}")
    closed: list[Block] = []
    kept: list[Block] = []
    for block in full.blocks:
        if not closed or block.start >= closed[-1].stop:
            (kept if block.name in opened else closed).append(block)
    inside = {i: block for block in closed for i in range(block.start, block.stop)}
    place: dict[int, int] = {}
    nodes: list[Node] = []
    for i, node in enumerate(full.nodes):
        around = inside.get(i)
        if around is None:
            nodes.append(node)
        elif i == around.start:
            nodes.append(Node(*(getattr(around, name) for name in Node.__dataclass_fields__)))
        place[i] = len(nodes) - 1
    edges = {(place[a], place[b]) for a, b in full.edges if place[a] != place[b]}
    blocks = tuple(replace(block, start=place[block.start], stop=place[block.stop - 1] + 1) for block in kept)
    return Structure(tuple(nodes), tuple(sorted(edges)), blocks, full.unused)


def open_to(full: Structure, level: int) -> tuple[str, ...]:
    """Blocks to open so that blocks within blocks show to a depth: 1 gives stem, layer1, …; 2 stem, layer1.0, ….

    A block that holds no other block stays closed, so that a stem of convolution, norm and ReLU remains one node.
    """
    holds_blocks = {block.parent for block in full.blocks}
    return tuple(block.name for block in full.blocks if block.depth + 1 < level and block.name in holds_blocks)


def overview(full: Structure, most: int = 32) -> Structure:
    """The deepest of the drawings of :func:`open_to` with at most ``most`` nodes."""
    drawing = collapse(full, ())
    for level in range(2, 2 + max((block.depth for block in full.blocks), default=0) + 1):
        deeper = collapse(full, open_to(full, level))
        if len(deeper.nodes) > most:
            break
        drawing = deeper
    return drawing


def layout(drawing: Structure) -> tuple[tuple[int, int], ...]:
    """A place (x, lane) for every node: x = length of the longest path to it; no two nodes share a place.

    Lane 0 holds the longest way through the net; a node keeps the lane of what it reads where it can.
    """
    before: dict[int, list[int]] = {i: [] for i in range(len(drawing.nodes))}
    after: dict[int, list[int]] = {i: [] for i in range(len(drawing.nodes))}
    for a, b in drawing.edges:
        before[b].append(a)
        after[a].append(b)
    x: dict[int, int] = {}
    for i in before:
        x[i] = 1 + max((x[a] for a in before[i]), default=-1)
    height: dict[int, int] = {}
    for i in reversed(before):
        height[i] = 1 + max((height[b] for b in after[i]), default=-1)
    lane: dict[int, int] = {}
    taken: set[tuple[int, int]] = set()
    for i in sorted(before, key=lambda i: (x[i], -height[i], i)):
        free = min((lane[a] for a in before[i]), default=0)
        while (x[i], free) in taken:
            free += 1
        lane[i] = free
        taken.add((x[i], free))
    return tuple((x[i], lane[i]) for i in before)


@dataclass
class _Event:
    """One operation that changed values: in which call, reading which events (and with how many dimensions)."""

    name: str
    frame: int
    reads: Mapping[int, int]
    parameters: frozenset[int]
    shape: tuple[int, ...]


@dataclass
class _Frame:
    """One call of a module; its events are ``events[start:stop]``."""

    layer: str
    module: nn.Module
    parent: int
    start: int
    stop: int = -1
    calls: int = 0  # of modules inside
    reads: Mapping[int, int] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    output: Tensor | None = None  # the first of several
    version: int = 0
    event: int = -1  # that made the output


class _Trace(TorchFunctionMode):
    """Where every value of one forward comes from.  Holds all tensors, so that none's identity is used twice.

    Six operations, of a net with the modules ``conv`` and ``fc``, and what is kept of them::

        operation                            event                             made by
        x (given)                            0  input                          the caller
        h = self.conv(x)                     1  conv2d  reads 0, 2 weights     frame 1, conv
        r = torch.relu(h)                    2  relu    reads 1                frame 0, the net
        a = r + x                            3  add     reads 2 and 0          frame 0
        m = a.mean((2, 3), keepdim=True)     4  mean    reads 3                frame 0
        v = m.flatten(1)                     –  a wire: v is still event 4
        y = self.fc(v)                       5  linear  reads 4, 2 weights     frame 2, fc

    A frame is a call of a module, with the events that began and ended in it: 1:6 for the net, 1:2 for ``conv``, 5:6 for
    ``fc``.  A module that calls no other is one node, an event outside such a module is a node of its own, and what an event
    reads are the edges: input → conv → relu → add → mean → fc, and input → add.
    """

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.net, self.batch = net, len(x)
        self.events = [_Event("input", -1, {}, frozenset(), tuple(x.shape))]
        self.frames: list[_Frame] = []
        self.open: list[int] = []
        self.made: dict[int, tuple[Tensor, int]] = {id(x): (x, 0)}
        self.weights: dict[int, tuple[Tensor, frozenset[int]]] = {
            id(parameter): (parameter, frozenset({id(parameter)})) for parameter in net.parameters()
        }
        self.handles: list[Any] = []

    def __enter__(self) -> _Trace:
        for name, module in self.net.named_modules():
            self.handles.append(module.register_forward_pre_hook(partial(self._begin, name), with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._end))
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def _begin(self, name: str, module: nn.Module, args: object, kwargs: object) -> None:
        parent = self.open[-1] if self.open else -1
        self.open.append(len(self.frames))
        self.frames.append(_Frame(name, module, parent, len(self.events), reads=self._reads(tensors_in((args, kwargs)))))

    def _end(self, module: nn.Module, _args: object, output: object) -> object:
        index = self.open.pop()
        frame = self.frames[index]
        tensors = list(tensors_in(output))
        if len(self.events) == frame.start and frame.reads:  # it passed its input on, or works out of sight (TorchScript)
            weights = frozenset(id(parameter) for parameter in module.parameters())
            self.events.append(_Event("", index, frame.reads, weights, ()))
            if isinstance(output, Tensor) and id(output) in self.made:
                output = output.view_as(output)  # its input may be used again, as itself: tell the two apart
                tensors = [output]
            for tensor in tensors:
                self.made[id(tensor)] = (tensor, frame.start)
        frame.stop = len(self.events)
        if frame.stop > frame.start:
            if frame.parent >= 0:
                self.frames[frame.parent].calls += 1
            frame.shape = tuple(tensors[0].shape) if tensors else ()
            if tensors:
                frame.event = self.made.get(id(tensors[0]), (output, -1))[1]
                frame.output, frame.version = tensors[0], tensors[0]._version
            if self.events[-1].name == "":
                self.events[-1].shape = frame.shape
        return output

    def _reads(self, tensors: Iterator[Tensor] | list[Tensor]) -> dict[int, int]:
        return {self.made[id(tensor)][1]: tensor.dim() for tensor in tensors if id(tensor) in self.made}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = list(tensors_in((args, kwargs)))
        versions = [tensor._version for tensor in inputs]
        result = func(*args, **(kwargs or {}))
        written = [tensor for tensor, version in zip(inputs, versions, strict=True) if tensor._version != version]
        known = {id(tensor) for tensor in inputs}
        made = [tensor for tensor in tensors_in(result) if id(tensor) not in known]
        name = str(getattr(func, "__name__", "operation")).strip("_")
        if not (made or written) or not inputs or name.startswith("new_") or name.endswith("_like"):
            return result
        reads = self._reads(inputs)
        weights = frozenset[int]().union(*(self.weights[id(t)][1] for t in inputs if id(t) in self.weights))
        moved = name in MOVES or (made and all(_same_storage(tensor, inputs[0]) for tensor in made))
        if moved and not written and name not in PERMUTATIONS:
            reads = self._reads(inputs[:1])
            event = next(iter(reads), -1)
        elif reads:
            event = len(self.events)
            shape = tuple((made or written)[0].shape)
            self.events.append(_Event(name, self.open[-1] if self.open else -1, reads, weights, shape))
        else:
            event = -1
        for tensor in (*made, *written, *(tensor._base for tensor in written if tensor._base is not None)):
            if event >= 0:
                self.made[id(tensor)] = (tensor, event)
            elif weights:
                self.weights[id(tensor)] = (tensor, weights)  # still made of weights alone
        return result

    def structure(self) -> Structure:
        leaf = [frame.stop > frame.start and frame.calls == 0 for frame in self.frames]
        runs = Counter(frame.layer for frame in self.frames)
        names = _names(self.frames)
        size = {id(parameter): parameter.numel() for parameter in self.net.parameters()}
        counted: set[int] = set()
        nodes: list[Node] = []
        place: list[int] = []  # node of each event
        frame_node: dict[int, int] = {}
        used = set(names)

        def around(frame: int) -> tuple[str, int]:
            depth, parent = 0, frame
            while parent > 0:  # frame 0 is the net itself
                depth, parent = depth + 1, self.frames[parent].parent
            return (names[frame] if frame > 0 else ""), depth

        def module(index: int, kind: str) -> Node:
            frame = self.frames[index]
            unwritten = frame.output is not None and frame.output._version == frame.version
            once = runs[frame.layer] == 1 and frame.layer != ""
            return Node(
                names[index] or type(frame.module).__name__,
                frame.layer,
                type(frame.module).__name__,
                kind,
                self._shape(frame.shape),
                0,
                *around(frame.parent),
                unwritten and once,
            )

        for i, event in enumerate(self.events):
            weights = event.parameters - counted
            counted |= weights
            parameters = sum(size[weight] for weight in weights)
            if event.frame >= 0 and leaf[event.frame]:
                if event.frame not in frame_node:
                    frame_node[event.frame] = len(nodes)
                    nodes.append(module(event.frame, _module_kind(self.frames[event.frame].module)))
                at = frame_node[event.frame]
                nodes[at] = replace(nodes[at], parameters=nodes[at].parameters + parameters)
            else:
                at = len(nodes)
                parent, depth = around(event.frame)
                name = _unique(f"{parent}.{event.name}" if parent else event.name, used)
                kind = "input" if i == 0 else _function_kind(event.name)
                shape = self._shape(event.shape)
                nodes.append(Node(name, "", event.name, kind, shape, parameters, parent, depth, False))
            place.append(at)
        edges = {(place[a], place[i]) for i, event in enumerate(self.events) for a in event.reads if place[a] != place[i]}
        blocks = []
        for index, frame in enumerate(self.frames):
            if index > 0 and frame.calls:
                start, stop = place[frame.start], place[frame.stop - 1] + 1
                whole = replace(module(index, "block"), parameters=sum(node.parameters for node in nodes[start:stop]))
                blocks.append(Block(**vars(whole), start=start, stop=stop))
        unused = sum(size.values()) - sum(node.parameters for node in nodes)
        return Structure(tuple(nodes), tuple(sorted(edges)), tuple(blocks), unused)

    def _shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[1:] if shape[:1] == (self.batch,) else shape


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.layout == b.layout == torch.strided and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _names(frames: list[_Frame]) -> list[str]:
    """The layer's name, with ":2" for the second call and so on."""
    calls: Counter[str] = Counter()
    names = []
    for frame in frames:
        calls[frame.layer] += 1
        names.append(frame.layer if calls[frame.layer] == 1 else f"{frame.layer}:{calls[frame.layer]}")
    return names


def _unique(name: str, used: set[str]) -> str:
    found, count = name, 1
    while found in used:
        count += 1
        found = f"{name}:{count}"
    used.add(found)
    return found


def _module_kind(module: nn.Module) -> str:
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    for cls in type(module).__mro__[:-2]:
        if cls.__module__.startswith("torch.nn.modules."):
            place = cls.__module__.rsplit(".", 1)[1]
            return "norm" if "norm" in place else place
    return "other"


def _function_kind(name: str) -> str:
    if "pool" in name:
        return "pooling"
    if any(word in name for word in ACTIVATIONS):
        return "activation"
    if name in PERMUTATIONS:
        return "permute"
    return KINDS.get(name, "operation")
