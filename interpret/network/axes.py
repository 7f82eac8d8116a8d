"""Every axis of every value of one forward, followed from operation to operation (ours); see :mod:`.layouts`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

WEAK, STRONG = 1, 2  # how surely an axis holds units: a linear layer meets it; a convolution, norm or attention does


class Atom:
    """A piece of an axis that no reshape has cut: atoms found to be the same are joined.

    ``role``: N images, C colours of the input, H rows, W columns, or "".  ``units``: see ``WEAK`` and ``STRONG``.
    ``whole``: the atom it was cut from.  ``stands_for``: the atoms it was found to be the product of.  ``parts``: sizes and
    axes of what was concatenated.
    """

    def __init__(self, size: int, role: str = "", units: int = 0, whole: Atom | None = None) -> None:
        self.size, self.role, self.units, self.whole = size, role, units, whole
        self.same: Atom | None = None
        self.cuts: dict[int, tuple[Atom, Atom]] = {}
        self.stands_for: Axis | None = None
        self.origin: Atom | None = None  # of an axis whose entries were put elsewhere (rolled, flipped): the axis before
        self.moves: dict[object, Atom] = {}
        self.parts: list[tuple[int, Axis | None]] = []

    def root(self) -> Atom:
        atom = self
        while atom.same is not None:
            atom = atom.same
        return atom

    def join(self, other: Atom) -> None:
        a, b = self.root(), other.root()
        if a is b or a.size != b.size or (a.origin is not b.origin and (a.role or a.origin) and (b.role or b.origin)):
            return  # of two orders of one axis none is the other
        if not a.role and b.role:
            a, b = b, a
        b.same = a
        a.units = max(a.units, b.units)
        a.whole = a.whole or b.whole
        a.origin = a.origin or b.origin
        a.stands_for = a.stands_for or b.stands_for
        a.parts = a.parts or b.parts
        a.cuts = {**b.cuts, **a.cuts}

    def cut(self, first: int) -> tuple[Atom, Atom]:
        atom = self.root()
        if first not in atom.cuts:
            # Of rows cut into patches the outer part is rows of patches still.
            outer = Atom(first, atom.role if atom.role in ("H", "W") else "", whole=atom)
            atom.cuts[first] = (outer, Atom(atom.size // first, whole=atom))
        return atom.cuts[first]

    def moved(self, by: object, back: object) -> Atom:
        """The axis with its entries elsewhere; what is moved back is the axis itself again."""
        atom = self.root()
        if atom.origin is not None and atom.origin.moves.get(back) is atom:
            return atom.origin
        if by not in atom.moves:
            atom.moves[by] = Atom(atom.size, units=atom.surely_units())
            atom.moves[by].origin = atom
        return atom.moves[by]

    def surely_units(self) -> int:
        atom = self.root()
        return max(atom.units, atom.whole.surely_units() if atom.whole is not None else 0)


Axis = tuple[Atom, ...]  # a product of atoms, the outermost first; () for size 1
Axes = list[Axis]


def size_of(axis: Axis) -> int:
    return math.prod(atom.size for atom in axis)


def fresh(size: int, role: str = "", units: int = 0) -> Axis:
    return () if size == 1 else (Atom(size, role, units),)


def role_of(axis: Axis) -> str:
    return axis[0].root().role if len(axis) == 1 else ""


def resolved(axis: Axis) -> Axis:
    """Joined atoms by their representative, stand-ins by what they stand for, and cut atoms put together again."""
    atoms: list[Atom] = []
    for atom in axis:
        root = atom.root()
        atoms.extend(resolved(root.stands_for) if root.stands_for is not None else (root,))
    i = 0
    while i + 1 < len(atoms):
        whole = atoms[i].whole
        if whole is not None and any(
            (a.root(), b.root()) == (atoms[i], atoms[i + 1]) for a, b in whole.root().cuts.values()
        ):
            atoms[i : i + 2] = resolved((whole,))
            i = max(i - 1, 0)
        else:
            i += 1
    return tuple(atoms)


def equate(a: Axis, b: Axis) -> None:
    """Two axes of equal size that one operation reads as one and the same."""
    a, b = resolved(a), resolved(b)
    if size_of(a) != size_of(b) or not a or not b:
        return
    if len(a) == len(b):
        for one, other in zip(a, b, strict=True):
            one.join(other)
    elif len(a) == 1 and not a[0].role and a[0] not in b:
        a[0].stands_for = b
    elif len(b) == 1 and not b[0].role and b[0] not in a:
        b[0].stands_for = a


def mark(axis: Axis, units: int) -> None:
    if len(axis := resolved(axis)) == 1:
        axis[0].units = max(axis[0].units, units)


def regroup(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The axes after a reshape: atoms joined and cut; None where the sizes fit in no way."""
    atoms = [atom for axis in axes for atom in resolved(axis)]
    found: Axes = []
    for size in shape:
        axis: list[Atom] = []
        missing = size
        while missing > 1:
            if not atoms:
                return None
            atom = atoms.pop(0)
            if missing % atom.size == 0:
                axis.append(atom)
                missing //= atom.size
            elif atom.size % missing == 0:
                first, rest = atom.cut(missing)
                axis.append(first)
                atoms.insert(0, rest)
                missing = 1
            else:
                return None
        found.append(resolved(tuple(axis)))
    return found if not atoms else None


def tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


class AxisTrace(TorchFunctionMode):
    """One forward whose axes are followed.  Holds all tensors, so that none's identity is used twice."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.net, self.images = net, len(x)
        self.batch = Atom(len(x), "N")
        roles = {1: "", 2: "C", 3: "CT", 4: "CHW", 5: "CDHW"}[min(x.dim(), 5)]
        shape = zip(x.shape[1:], roles or "", strict=False)
        self.known: dict[int, tuple[Tensor, Axes]] = {}
        self._keep(x, [(self.batch,), *(fresh(size, role) for size, role in shape)])
        self.outputs: dict[str, list[list[Tensor]]] = {}  # by layer and call; of several tensors all
        self.logits: object = None
        self.calls: Counter[str] = Counter()
        self._reads: Counter[int] = Counter()
        self._read_before: dict[str, list[int]] = {}  # of the tensors of the first call, when it ended
        self.repeated: set[str] = set()  # layers that ran again on something else than what they had given
        self._versions: dict[str, list[list[int]]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> AxisTrace:
        for name, module in self.net.named_modules():
            self._handles.append(module.register_forward_hook(partial(self._end, name), with_kwargs=True))
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _keep(self, tensor: Tensor, axes: Axes | None) -> None:
        if axes is None or len(axes) != tensor.dim():
            axes = self._unknown(tensor)
        self.known[id(tensor)] = (tensor, axes)

    def _unknown(self, tensor: Tensor) -> Axes:
        first = tensor.shape[0] if tensor.dim() else 0
        images = [(self.batch,)] if first == self.images else [fresh(size) for size in tensor.shape[:1]]
        return [*images, *(fresh(size) for size in tensor.shape[1:])]

    def axes(self, tensor: object) -> Axes | None:
        return self.known[id(tensor)][1] if isinstance(tensor, Tensor) and id(tensor) in self.known else None

    def _end(self, name: str, _module: nn.Module, args: object, kwargs: object, output: object) -> None:
        self.calls[name] += 1
        made = list(tensors_in(output))
        read = [tensor for tensor in tensors_in((args, kwargs)) if id(tensor) in self.known]
        if not made or (not read and id(made[0]) not in self.known):
            return  # nothing, or made of weights alone, as parametrisations do
        for tensor in made:
            if id(tensor) not in self.known:  # it worked out of sight, e.g. as TorchScript
                self._keep(tensor, next((self.axes(other) for other in read if other.shape == tensor.shape), None))
        before = self.outputs.setdefault(name, [])
        if before and not any(tensor is other for tensor in read for other in before[-1]):
            self.repeated.add(name)
        before.append(made)
        self._versions.setdefault(name, []).append([tensor._version for tensor in made])
        self._read_before.setdefault(name, [self._reads[id(tensor)] for tensor in made])

    def entry(self, name: str) -> int | None:
        """Which of the tensors that the layer returns: the only one, else the first that is read; None: none is."""
        made = self.outputs[name][0]
        if len(made) == 1:
            return 0
        after = zip(made, self._read_before[name], strict=True)
        read = [self._reads[id(tensor)] > before or tensor is self.logits for tensor, before in after]
        return read.index(True) if any(read) else None

    def overwritten(self, name: str, entry: int) -> bool:
        """Whether an output of the layer was written into after the layer had returned it."""
        calls = zip(self.outputs[name], self._versions[name], strict=True)
        return any(made[entry]._version != then[entry] for made, then in calls)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = list(tensors_in(result))
        inputs = list(tensors_in((args, kwargs)))
        read = [tensor for tensor in inputs if id(tensor) in self.known]
        self._reads.update(id(tensor) for tensor in read)
        if not made or not read or all(id(tensor) in self.known for tensor in made):
            return result
        name = str(getattr(func, "__name__", "")).strip("_")
        rule = _rule(name)
        try:
            found = rule(self, func, args, kwargs, made) if rule is not None else None
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            found = None  # called in a way that the rule does not know: as good as an unknown operation
        if found is None:
            found = self._like(made, inputs)
        for tensor, axes in zip(made, found, strict=False):
            if id(tensor) not in self.known:
                self._keep(tensor, axes)
        for tensor in made[len(found) :]:
            self._keep(tensor, None)
        return result

    def _like(self, made: list[Tensor], inputs: list[Tensor]) -> list[Axes | None]:
        """Element by element, with broadcasting: axes of equal size, counted from the last, are the same."""
        return [self._broadcast(tensor, inputs) for tensor in made]

    def _broadcast(self, result: Tensor, inputs: list[Tensor]) -> Axes | None:
        dims = result.dim()
        columns: list[Axis | None] = [None] * dims
        for tensor in inputs:
            axes = self.axes(tensor)
            if tensor.dim() > dims or axes is None:
                continue
            for i, axis in enumerate(axes, start=dims - len(axes)):
                if size_of(axis) != result.shape[i] or not axis:
                    continue
                before = columns[i]
                if before is None:
                    columns[i] = axis
                else:
                    equate(before, axis)
        if all(column is None for column in columns):
            return None
        axes = [fresh(size) if axis is None else axis for axis, size in zip(columns, result.shape, strict=True)]
        for tensor in inputs:  # a weight for each entry of one axis, as scales of layers have it
            wide = [i for i, size in enumerate(tensor.shape) if size > 1]
            if id(tensor) not in self.known and len(wide) == 1 and isinstance(tensor, nn.Parameter):
                at = wide[0] + dims - tensor.dim()
                if 0 <= at < dims and tensor.shape[wide[0]] == result.shape[at]:
                    mark(axes[at], WEAK)
        return axes

    def axes_of(self, name: str) -> dict[str, Any] | str:
        """Fields of the layer's :class:`.Layout`; or, in words, why its axes cannot be told apart."""
        if self.calls[name] > len(self.outputs[name]):
            return "it runs on the images and on weights alike"
        entry = self.entry(name)
        if entry is None:
            return f"of the {len(self.outputs[name][0])} tensors that it returns the network reads none"
        output = self.outputs[name][0][entry]
        axes = [resolved(axis) for axis in self.known[id(output)][1]]
        shape = tuple(output.shape)
        with_images = [i for i, axis in enumerate(axes) if self.batch in axis]
        if len(with_images) != 1 or output.dim() < 2:
            return f"no axis of its shape {shape} for {self.images} images counts the images"
        images = with_images[0]
        if axes[images][0] is not self.batch or (len(axes[images]) > 1 and images > 0):
            return f"one axis of its shape {shape} for {self.images} images mixes images and positions"
        fold = size_of(axes[images][1:])
        others = [i for i in range(len(axes)) if i != images]
        units = _unit_axes(axes, others) if len(others) > 1 else others
        if not units:
            said = "".join("N" if i == images else "?" for i in range(len(axes)))
            return (
                f"nothing in the network tells which axis of its shape {shape} holds units; say it: "
                f'layouts={{"{name}": "{said}"}} with C for units and other letters for places in place of each ?'
            )
        letters = ["N" if i == images else "C" if i in units else _letter(axes[i]) for i in range(len(axes))]
        at = [i for i in others if i not in units]
        places = [axes[i] for i in at]
        if fold > 1:
            places.insert(0, axes[images][1:])
        prefix, grid = _grid(places)
        if (
            len(places) == 2
            and fold == 1
            and all(letters[i] == role or not axes[i] for i, role in zip(at, "HW", strict=True))
        ):
            letters[at[0]], letters[at[1]] = "H", "W"  # a map of one row or column is one still
            grid = (shape[at[0]], shape[at[1]])
        return {"axes": "".join(letters), "fold": fold, "prefix": prefix, "grid": grid, "entry": entry}


def _letter(axis: Axis) -> str:
    role = role_of(axis)
    return role if role in ("H", "W") else "T"


def _unit_axes(axes: Axes, others: Sequence[int]) -> list[int]:
    """Of the axes that are not the images, those that hold units; none if it cannot be told."""
    sure = {i: max((atom.surely_units() for atom in axes[i]), default=0) for i in others}
    most = max(sure.values())
    if most == 0:
        colours = [i for i in others if role_of(axes[i]) == "C"]
        left = [i for i in others if role_of(axes[i]) not in ("H", "W")]
        if colours or (len(left) == 1 and len(others) == 3):
            return colours or left
        return list(others[:1]) if len(others) == 3 else []  # torch's order of images, where nothing speaks against it
    found = [i for i in others if sure[i] == most]
    if len(found) > 1:
        origins = {_origin(atom) for i in found for atom in axes[i] if atom.surely_units() == most}
        return found if len(origins) == 1 else []  # heads and what each holds were cut from the same units
    return found


def _origin(atom: Atom) -> Atom:
    atom = atom.root()
    return atom if atom.whole is None else _origin(atom.whole)


def _grid(places: Axes) -> tuple[int, tuple[int, ...]]:
    """Tokens before the grid, and its rows and columns, (); both read off where the positions come from."""
    prefix = 0
    if len(places) == 1 and len(places[0]) == 1 and places[0][0].parts:
        parts = places[0][0].parts
        placed = [(i, axis) for i, (_, axis) in enumerate(parts) if axis is not None and _grid([axis])[1]]
        if len(placed) != 1 or placed[0][0] != len(parts) - 1:
            return 0, ()
        prefix = sum(size for size, _ in parts[:-1])
        places = [placed[0][1]]
    atoms = [atom for axis in places for atom in resolved(axis)]
    if len(atoms) == 1 and atoms[0].parts:
        inner, grid = _grid([(atoms[0],)])
        return prefix + inner, grid
    roles = "".join(atom.role or "?" for atom in atoms)
    sizes = [atom.size for atom in atoms]
    if roles == "HW":
        return prefix, (sizes[0], sizes[1])
    if roles in ("H", "W") and len(places) == 1:
        return prefix, (sizes[0], 1) if roles == "H" else (1, sizes[0])
    return 0, ()


# --- what each operation does to axes ---------------------------------------------------------------------------------

Rule = Callable[[AxisTrace, Any, Any, Mapping[str, Any], list[Tensor]], list[Axes | None] | None]
# fmt: off
MOVED = frozenset({
    "permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "squeeze", "unsqueeze", "getitem", "select",
    "narrow", "unbind", "chunk", "split", "split_with_sizes", "tensor_split", "get", "expand", "expand_as", "diagonal",
})
RESHAPED = frozenset({"reshape", "view", "flatten", "unflatten", "view_as", "reshape_as", "ravel"})
REDUCED = frozenset({
    "mean", "sum", "amax", "amin", "std", "var", "norm", "vector_norm", "logsumexp", "nanmean", "prod", "median",
})
# fmt: on


def _rule(name: str) -> Rule | None:
    if name in MOVED:
        return _moved
    if name in RESHAPED:
        return _reshaped
    if name in REDUCED:
        return _reduced
    for word, rule in _RULES.items():
        if name == word or (word.endswith("*") and name.startswith(word[:-1])) or (word[0] == "*" and word[1:] in name):
            return rule
    return None


def _moved(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    """Where each axis goes is read off the strides that the operation makes of strides which are all different primes."""
    axes = trace.axes(args[0])
    if axes is None:
        return None
    primes = (1000003, 1000033, 1000037, 1000039, 1000081, 1000099, 1000117)[: len(axes)]
    twin = torch.empty_strided(args[0].shape, primes, device="meta")
    moved: list[Axes | None] = []
    for result in tensors_in(func(twin, *args[1:], **kwargs)):
        if result._base is None and result is not twin:
            return [_indexed(axes, args[0].shape, args[1:], tensor) for tensor in made]
        new: Axes = []
        for size, stride in zip(result.shape, result.stride(), strict=True):
            source = next((i for i, prime in enumerate(primes) if stride and stride % prime == 0), None)
            if size == 1 or source is None:
                new.append(fresh(size))
            elif size == twin.shape[source] and stride == primes[source]:
                new.append(axes[source])
            else:
                whole = resolved(axes[source])
                # Every second row spans the image still; a stretch of rows does not.
                role = role_of(whole) if stride > primes[source] else ""
                part = fresh(size, role, max((atom.surely_units() for atom in whole), default=0))
                new.append(_without_prefix(whole, args, size) or part)
        moved.append(new)
    return moved


def _anew(axis: Axis) -> Axis:
    """The same units or images, but places that nobody knows."""
    axis = resolved(axis)
    return fresh(size_of(axis), units=max((atom.surely_units() for atom in axis), default=0))


def _indexed(axes: Axes, shape: Sequence[int], args: Any, result: Tensor) -> Axes | None:
    """One axis picked by a list or a tensor of numbers, the others whole: that one is in another order."""
    index = args[0] if len(args) == 1 and isinstance(args[0], tuple) else tuple(args)
    at = [i for i, each in enumerate(index) if not isinstance(each, slice)]
    if (
        len(at) != 1
        or result.dim() != len(axes)
        or not all(each == slice(None) for i, each in enumerate(index) if i not in at)
    ):
        return None
    return [_anew_of(axis, size) if i in at else axis for i, (axis, size) in enumerate(zip(axes, result.shape, strict=True))]


def _anew_of(axis: Axis, size: int) -> Axis:
    return fresh(size, units=max((atom.surely_units() for atom in resolved(axis)), default=0))


def _without_prefix(whole: Axis, args: Any, size: int) -> Axis | None:
    """The grid again, where a slice takes exactly the tokens that were put in front of it away."""
    if len(whole) == 1 and (parts := whole[0].parts):
        last, axis = parts[-1]
        begins = any(isinstance(each, slice) and each.start == whole[0].size - last for each in _flat(args[1:]))
        return axis if last == size and begins else None
    return None


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _reshaped(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    axes = trace.axes(args[0])
    return None if axes is None else [regroup(axes, made[0].shape)]


def _reduced(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    axes = trace.axes(args[0])
    dim = kwargs.get(
        "dim", next((a for a in args[1:] if isinstance(a, (int, list, tuple)) and not isinstance(a, bool)), None)
    )
    if axes is None or dim is None:
        return None
    gone = {d % len(axes) for d in _flat(dim)}
    if made[0].dim() == len(axes):
        return [[() if i in gone else axis for i, axis in enumerate(axes)]] * len(made)
    return [[axis for i, axis in enumerate(axes) if i not in gone]] * len(made)


def _convolved(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
    axes = trace.axes(x)
    if axes is None or x.dim() != weight.dim():
        return None
    if x.shape[1] > 1:
        mark(axes[1], STRONG)
    out = made[0].shape
    return [[axes[0], fresh(out[1], units=STRONG), *_resized(axes[2:], out[2:])]]


def _resized(axes: Axes, sizes: Sequence[int]) -> Axes:
    return [axis if size_of(axis) == size else fresh(size, role_of(axis)) for axis, size in zip(axes, sizes, strict=True)]


def _pooled(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    axes = trace.axes(args[0])
    if axes is None or made[0].dim() != len(axes):
        return None
    out = made[0].shape
    units = axes[1] if size_of(axes[1]) == out[1] else fresh(out[1], units=STRONG)
    return [[axes[0], units, *_resized(axes[2:], out[2:])]] * len(made)


def _padded(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    """With a border all around rows are rows of the image still; padding on one side alone puts the image into a corner."""
    axes = trace.axes(args[0])
    if axes is None:
        return None
    pad = list(args[1] if len(args) > 1 else kwargs["pad"])
    sides = {len(axes) - 1 - i // 2: (pad[i], pad[i + 1]) for i in range(0, len(pad), 2)}
    around = _resized(axes, made[0].shape)
    off = [abs(sides[i][0] - sides[i][1]) > 1 if i in sides else False for i in range(len(axes))]
    return [[_anew_of(axes[i], made[0].shape[i]) if off[i] else around[i] for i in range(len(axes))]]


def _rolled(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    axes = trace.axes(args[0])
    shifts = kwargs.get("shifts", args[1] if len(args) > 1 else None)
    dims = kwargs.get("dims", args[2] if len(args) > 2 else None)
    if axes is None or dims is None:
        return [None]
    by = dict(zip((d % len(axes) for d in _flat(dims)), _flat(shifts), strict=True))
    return [
        [
            _moved_by(axis, by[i] % size_of(axis), -by[i] % size_of(axis)) if by.get(i) else axis
            for i, axis in enumerate(axes)
        ]
    ]


def _flipped(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    axes = trace.axes(args[0])
    if axes is None:
        return None
    names = {"fliplr": (1,), "flipud": (0,)}
    dims = names.get(func.__name__) or kwargs.get("dims", args[1:])
    turned = {d % len(axes) for d in _flat(dims)}
    return [[_moved_by(axis, "flip", "flip") if i in turned else axis for i, axis in enumerate(axes)]]


def _moved_by(axis: Axis, by: object, back: object) -> Axis:
    axis = resolved(axis)
    return (axis[0].moved(by, back),) if len(axis) == 1 else _anew(axis)


def _sorted(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    """Another order, or other entries, of one axis; which, only the values tell."""
    axes = trace.axes(args[0])
    if axes is None:
        return None
    named = [each for each in args[1:] if isinstance(each, int) and not isinstance(each, bool)]
    dim = kwargs.get("dim", named[-1] if len(named) > (func.__name__ in ("topk", "kthvalue")) else -1) % len(axes)
    return [[_anew_of(axis, t.shape[i]) if i == dim else axis for i, axis in enumerate(axes)] for t in made]


def _second(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    """Norms over batch, groups or instances: units are the second axis."""
    axes = trace.axes(args[0])
    if axes is not None and len(axes) > 1:
        mark(axes[1], STRONG)
    return [axes]


def _last(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    """Norms over the last axis."""
    axes = trace.axes(args[0])
    shape = args[1] if len(args) > 1 else kwargs.get("normalized_shape", ())
    if axes is not None and len(tuple(shape)) == 1:
        mark(axes[-1], STRONG)
    return [axes]


def _linear(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    axes = trace.axes(args[0])
    if axes is None:
        return None
    mark(axes[-1], WEAK)
    return [[*axes[:-1], fresh(made[0].shape[-1], units=WEAK)]]


def _product(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    a, b = args[-2:] if len(args) > 2 else args[:2]
    of_a, of_b = trace.axes(a), trace.axes(b)
    if of_a is not None and of_b is None and b.dim() == 2 and len(of_a) > 1:  # a weight
        mark(of_a[-1], WEAK)
        return [[*of_a[:-1], fresh(made[0].shape[-1], units=WEAK)]]
    if of_a is None or of_b is None or a.dim() != b.dim() or a.dim() < 2:
        return None
    equate(of_a[-1], of_b[-2])
    return [[*of_a[:-1], of_b[-1]]]


def _einsum(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    equation = args[0].replace(" ", "")
    if "..." in equation or "->" not in equation:
        return None
    operands = list(tensors_in(args[1:]))
    left, right = equation.split("->")
    known: dict[str, Axis] = {}
    for letters, tensor in zip(left.split(","), operands, strict=True):
        axes = trace.axes(tensor)
        for letter, axis in zip(letters, axes or (), strict=False):
            if letter in known:
                equate(known[letter], axis)
            else:
                known[letter] = axis
    sizes = dict(zip(right, made[0].shape, strict=True))
    return [[known.get(letter) or fresh(sizes[letter], units=WEAK) for letter in right]]


def _attended(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    query, value = trace.axes(args[0]), trace.axes(args[2])
    return None if query is None or value is None else [[*query[:-1], value[-1]]]


def _attention(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    """Whole attention layers: units are the last axis of what asks and of what is answered."""
    axes = trace.axes(args[0])
    if axes is None or made[0].dim() != len(axes):
        return None
    mark(axes[-1], STRONG)
    return [[*axes[:-1], fresh(made[0].shape[-1], units=STRONG)]]


def _recurrent(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    axes = trace.axes(args[0])
    if axes is None or made[0].dim() != len(axes):
        return None
    units = fresh(made[0].shape[-1], units=STRONG)
    images = next((axis for axis in axes if resolved(axis) == (trace.batch,)), fresh(trace.images))
    states: list[Axes | None] = [[fresh(state.shape[0]), images, fresh(state.shape[-1], units=STRONG)] for state in made[1:]]
    return [[*axes[:-1], units], *states]


def _cell(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    axes = trace.axes(args[0])
    if axes is None:
        return None
    return [[*axes[:-1], fresh(each.shape[-1], units=STRONG)] for each in made]


def _joined(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    tensors = list(args[0] if args else kwargs["tensors"])
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % made[0].dim()
    columns: Axes = []
    for i, size in enumerate(made[0].shape):
        every = [None if (axes := trace.axes(tensor)) is None else axes[i] for tensor in tensors]
        here = [axis for axis in every if axis]
        if i != dim:
            for axis in here[1:]:
                equate(here[0], axis)
            columns.append(here[0] if here else fresh(size))
            continue
        sure = max((atom.surely_units() for axis in here for atom in resolved(axis)), default=0)
        roles = {role_of(resolved(axis)) for axis in here}
        new = fresh(size, roles.pop() if len(roles) == 1 and len(here) == len(tensors) else "", sure)
        if new and sure == 0:
            new[0].parts = [(t.shape[dim], None if a is None else resolved(a)) for t, a in zip(tensors, every, strict=True)]
            new[0].role = ""
        columns.append(new)
    return [columns]


def _stacked(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    tensors = list(args[0] if args else kwargs["tensors"])
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % made[0].dim()
    known = next(axes for tensor in tensors if (axes := trace.axes(tensor)) is not None)
    return [[*known[:dim], fresh(len(tensors)), *known[dim:]]]


def _repeated(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    axes = trace.axes(args[0])
    if axes is None:
        return None
    axes = [()] * (made[0].dim() - len(axes)) + axes
    return [[axis if size_of(axis) == size else fresh(size) for axis, size in zip(axes, made[0].shape, strict=True)]]


def _picked(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    """By a tensor of numbers along one axis, which is then in another order."""
    axes = trace.axes(args[0])
    if axes is None:
        return None
    dim = kwargs.get("dim", args[2] if func.__name__ == "take_along_dim" and len(args) > 2 else args[1]) % len(axes)
    return [
        [_anew_of(axis, size) if i == dim else axis for i, (axis, size) in enumerate(zip(axes, made[0].shape, strict=True))]
    ]


def _embedded(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    axes = trace.axes(args[0])
    return None if axes is None else [[*axes, fresh(made[0].shape[-1], units=STRONG)]]


def _patches(trace: AxisTrace, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes | None] | None:
    axes = trace.axes(args[0])
    return (
        None
        if axes is None or made[0].dim() != 3
        else [[axes[0], fresh(made[0].shape[1], units=STRONG), fresh(made[0].shape[2])]]
    )


_RULES: dict[str, Rule] = {
    "conv*": _convolved,
    "*pool": _pooled,
    "interpolate": _pooled,
    "upsample*": _pooled,
    "grid_sample": _pooled,
    "pixel_*": _pooled,
    "pad": _padded,
    "batch_norm": _second,
    "instance_norm": _second,
    "group_norm": _second,
    "layer_norm": _last,
    "rms_norm": _last,
    "linear": _linear,
    "matmul": _product,
    "rmatmul": _product,
    "bmm": _product,
    "mm": _product,
    "addmm": _product,
    "baddbmm": _product,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attended,
    "multi_head_attention_forward": _attention,
    "native_multi_head_attention": _attention,
    "transformer_encoder_layer_fwd": _attention,
    "lstm": _recurrent,
    "gru": _recurrent,
    "rnn_tanh": _recurrent,
    "rnn_relu": _recurrent,
    "lstm_cell": _cell,
    "gru_cell": _cell,
    "rnn_tanh_cell": _cell,
    "rnn_relu_cell": _cell,
    "cat": _joined,
    "concat*": _joined,
    "stack": _stacked,
    "repeat*": _repeated,
    "tile": _repeated,
    "index_select": _picked,
    "gather": _picked,
    "scatter*": _picked,
    "roll": _rolled,
    "flip*": _flipped,
    "rot90": lambda trace, func, args, kwargs, made: [None],
    "sort": _sorted,
    "argsort": _sorted,
    "msort": lambda trace, func, args, kwargs, made: [None],
    "topk": _sorted,
    "take_along_dim": _picked,
    "embedding": _embedded,
    "unfold": _patches,
}
