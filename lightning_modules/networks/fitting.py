"""Which tensor of a file belongs to which of a network: by name, whatever wrappers put in front of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from glassarmor.lightning_modules.networks.normalize import Normalize
from glassarmor.lightning_modules.networks.weight_files import WeightSet

WRAPPED: Final = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PREFIXES: Final = re.compile(r"(?:(?:module|model|net|network|backbone|_orig_mod)\.)*")  # that wrappers put in front
COUNTERS: Final = ("num_batches_tracked", "total_ops", "total_params", "n_averaged")  # of profilers and averages, too
MEAN, DEVIATION = ("mean", "mu", "image_mean", "pixel_mean"), ("std", "sigma", "image_std", "pixel_std")
OTHER_NAMES: Final = tuple(  # what a network calls a tensor, and what files of other versions of torch or DenseNet call it
    (re.compile(own), theirs)
    for own, theirs in (
        (r"\.parametrizations\.weight\.original0$", ".weight_g"),
        (r"\.parametrizations\.weight\.original1$", ".weight_v"),
        (r"\.weight_g$", ".parametrizations.weight.original0"),
        (r"\.weight_v$", ".parametrizations.weight.original1"),
        (r"\.parametrizations\.weight\.original$", ".weight_orig"),
        (r"\.parametrizations\.weight\.0\._(u|v)$", r".weight_\1"),
        (r"\.weight_orig$", ".parametrizations.weight.original"),
        (r"\.weight_(u|v)$", r".parametrizations.weight.0._\1"),
        (r"\.weight$", ".gamma"),
        (r"\.bias$", ".beta"),
        (r"(denselayer\d+\.(?:norm|conv))(\d)\.", r"\1.\2."),
    )
)


@dataclass
class Fit:
    """How a set of tensors lies on a network."""

    taken: WeightSet
    state: dict[str, Tensor] = field(default_factory=dict)  # by the network's names
    new: list[str] = field(default_factory=list)  # of a head for other classes, which stays as it is
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not self.problems


def fit(net: nn.Module, given: WeightSet, new_head: bool, ignored: tuple[str, ...] = ()) -> Fit:
    """Lay a set of tensors on a network, which is left as it is.

    Args:
        new_head: a last layer for another number of classes is left out.
        ignored: beginnings of names that may be left over, e.g. of auxiliary heads.
    """
    wanted = net.state_dict()
    if not given.names:
        return _by_order(wanted, given)
    found = Fit(given)
    tensors = {WRAPPED.sub("", name): value for name, value in given.tensors.items()}
    theirs, ours, rivals = _prefixes(tensors, wanted)
    if rivals:
        found.problems.append(
            f"{' and '.join(repr(each) for each in rivals)} hold it alike: keep one of them in a file of its own"
        )
    normalisation, used = _normalisation(tensors, wanted), set[str]()
    for name, own in wanted.items():
        key = next((key for key in _names(name, theirs, ours) if key in tensors), None)
        if key is None:
            _missing(found, net, name, normalisation)
            continue
        used.add(key)
        _take(found, name, own, tensors[key], new_head)
    # What is not below the one module that all came from, e.g. the metrics of a Lightning module, is no part of the net.
    tops = {key.partition(".")[0] + "." for key in used if "." in key}
    inside = theirs or (tops.pop() if len(tops) == 1 and all("." in key for key in used) else "")
    rest = {key: value for key, value in tensors.items() if key not in used}
    _left_over(found, rest, inside, normalisation, ignored)
    if found.new and not _is_head(found.new, wanted):
        found.problems += [f"{name} has another size than the network's" for name in found.new]
    return found


def _is_head(names: list[str], wanted: Mapping[str, Tensor]) -> bool:
    """Whether these are whole layers: weights and biases of heads."""
    layers = {name.rpartition(".")[0] for name in names}
    return {name for name in wanted if name.rpartition(".")[0] in layers} == set(names)


def _by_order(wanted: Mapping[str, Tensor], given: WeightSet) -> Fit:
    """A list of tensors, in the order of the network's own."""
    found = Fit(given)
    values = list(given.tensors.values())
    own, counters = ("normalize.mean", "normalize.std"), ("num_batches_tracked",)
    for left_out in (("\0",), own, counters, (*own, *counters)):
        names = [name for name in wanted if not name.endswith(left_out)]
        if [wanted[name].shape for name in names] == [value.shape for value in values]:
            found.state = dict(zip(names, values, strict=True))
            found.notes.append("its tensors have no names: they were taken in the network's order")
            return found
    found.problems.append(
        f"a list of {len(values)} tensors without names, whose shapes are not in order those of the network's {len(wanted)}"
    )
    return found


def _prefixes(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[str, str, list[str]]:
    """What stands before the names in the file, and in the network, for most of them to agree; and rivals to that."""
    candidates = {("", "")}
    anchors = [name for name in wanted if not name.endswith(COUNTERS)]
    for name in (*anchors[:4], *anchors[-2:]):
        for key in tensors:
            common = _common_end(name, key)
            if common:
                candidates.add((key[: len(key) - len(common)], name[: len(name) - len(common)]))
    scores = {each: _score(tensors, wanted, *each) for each in candidates}
    best = max(scores.values())
    first = sorted(
        (each for each, score in scores.items() if score == best),
        key=lambda each: (each != ("", ""), len(each[0]) + len(each[1]), each),
    )
    first = [each for each in first if PREFIXES.fullmatch(each[0])] or first
    theirs, ours = first[0]
    alike = [each[0] for each in first[1:] if best and each[1] == ours and not _same(tensors, theirs, each[0], wanted, ours)]
    return theirs, ours, sorted([theirs, *alike]) if alike else []


def _same(tensors: Mapping[str, Tensor], one: str, other: str, wanted: Mapping[str, Tensor], ours: str) -> bool:
    names = [name.removeprefix(ours) for name in wanted]
    return all(
        torch.equal(tensors[one + n], tensors[other + n]) for n in names if one + n in tensors and other + n in tensors
    )


def _score(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], theirs: str, ours: str) -> int:
    keys = ((theirs + name[len(ours) :], own) for name, own in wanted.items() if name.startswith(ours))
    return sum(2 if tensors[key].shape == own.shape else 1 for key, own in keys if key in tensors)


def _common_end(one: str, other: str) -> str:
    """The last parts of two dotted names that are equal."""
    parts = 0
    for a, b in zip(reversed(one.split(".")), reversed(other.split(".")), strict=False):
        if a != b:
            break
        parts += 1
    return ".".join(one.split(".")[-parts:]) if parts else ""


def _names(name: str, theirs: str, ours: str) -> Iterator[str]:
    """What a file may call a tensor of the network: the likeliest first."""
    bare = [theirs + name[len(ours) :]] if name.startswith(ours) else []
    for key in (*bare, name):
        yield key
        yield from (other for own, theirs_too in OTHER_NAMES if (other := own.sub(theirs_too, key)) != key)


def _take(found: Fit, name: str, own: Tensor, value: Tensor, new_head: bool) -> None:
    """Take a tensor for one of the network, or say why not."""
    squeezed = [[side for side in each.shape if side != 1] for each in (value, own)]
    if value.is_quantized or value.is_complex() or (own.is_floating_point() != value.is_floating_point()):
        found.problems.append(f"{name} is {value.dtype} instead of {own.dtype}")
    elif squeezed[0] == squeezed[1]:  # e.g. a head that is a 1×1 convolution
        found.state[name] = value.reshape(own.shape)
    elif new_head and value.dim() == own.dim() and value.dim() > 0 and value.shape[1:] == own.shape[1:]:
        found.new.append(name)
    else:
        found.problems.append(f"{name} {tuple(value.shape)} instead of {tuple(own.shape)}")


def _normalisation(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Mean and deviation of the images that a file brings along: "mean" and "std" → its name for it, and the values."""
    found: dict[str, tuple[str, Tensor]] = {}
    for what, names in (("mean", MEAN), ("std", DEVIATION)):
        for key, value in tensors.items():
            if key.rpartition(".")[2] in names and key not in wanted and value.numel() in (1, 3, 4):
                found.setdefault(what, (key, value))
    return found if len(found) == 2 else {}


def _missing(found: Fit, net: nn.Module, name: str, normalisation: Mapping[str, tuple[str, Tensor]]) -> None:
    """What becomes of a tensor that the file has not."""
    if name.endswith(COUNTERS):
        return
    place, _, last = name.rpartition(".")
    module = net.get_submodule(place)
    if not isinstance(module, Normalize):
        found.problems.append(f"{name} is missing")
    elif not normalisation and last == "mean":
        found.notes.append("the file brings no normalisation: the network keeps its own")
    elif normalisation:
        values = normalisation[last][1]
        own = net.state_dict()[name]
        if float(values.max()) > 2:
            found.problems.append(f"{normalisation[last][0]} is for images in 0..255: {_listed(values)}")
        else:
            found.state[name] = values.expand(own.shape) if values.numel() == 1 else values.reshape(own.shape)
            found.notes.append(f"the file's own {last} {_listed(values)} normalises the images")


def _left_over(
    found: Fit,
    tensors: Mapping[str, Tensor],
    theirs: str,
    normalisation: Mapping[str, tuple[str, Tensor]],
    ignored: tuple[str, ...],
) -> None:
    """What becomes of the tensors that the network has no place for."""
    brought = {key for key, _ in normalisation.values()}
    taken = any(name.endswith(("normalize.mean", "normalize.std")) for name in found.state)
    if brought & tensors.keys() and not taken:
        told = ", ".join(f"{what}={_listed(value)}" for what, (_, value) in normalisation.items())
        found.problems.append(f"the file brings a normalisation, which the network has no place for: add {told}")
    rest = sorted(
        key
        for key in tensors.keys() - brought
        if not key.endswith(COUNTERS) and not key.removeprefix(theirs).startswith(ignored or ("\0",))
    )
    unknown = [key for key in rest if key.startswith(theirs)]
    found.problems += [f"{key} is not in the network" for key in unknown]
    # Of what lies elsewhere, vectors are sums of metrics and estimates of losses; anything larger may be a layer.
    if outside := [key for key in rest if not key.startswith(theirs) and tensors[key].dim() > 1]:
        more = f" and {len(outside) - 2} more" if len(outside) > 2 else ""
        found.notes.append(f"left out, for they lie outside {theirs!r}: {', '.join(outside[:2])}{more}")


def _listed(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.flatten().tolist()]
