"""A network for a data set, fresh or with weights from a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from glassarmor.lightning_modules.networks.check import check_network
from glassarmor.lightning_modules.networks.fitting import fit
from glassarmor.lightning_modules.networks.weight_files import read_weight_sets, sha256_of


class ImageData(Protocol):
    """What a network must know of its images."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...


def make_network(
    factory: Callable[..., nn.Module], data: ImageData, channels_last: bool = False, differentiable: bool = True
) -> nn.Module:
    """The network for the classes, channels and statistics of ``data``, checked; as one to train, if ``differentiable``.

    Raises:
        ValueError: see :func:`.check_network`.
    """
    net = factory(num_classes=data.num_classes, in_channels=data.image_shape[0], mean=data.mean, std=data.std)
    check_network(net, data.image_shape, data.num_classes, differentiable)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


@dataclass(frozen=True)
class Filled:
    """What a network was filled with.

    place: the keys of the file that lead to its weights, e.g. "model_state_dict"; empty for a plain state dict.
    new: names of a head for other classes, which stays as it was.  notes: what a reader should know.
    """

    path: Path
    sha256: str
    place: str
    new: tuple[str, ...]
    notes: tuple[str, ...]


def load_weights(
    net: nn.Module, path: str | Path, key: str = "checkpoint", *, new_head: bool = False, ignored: tuple[str, ...] = ()
) -> Filled:
    """Fill ``net`` from a checkpoint of a run, or from what others publish; nothing but tensors is unpickled.

    Args:
        key: what errors begin with.
        new_head: a last layer for another number of classes stays as it is, which the result says.
        ignored: beginnings of names that the file may hold too much, e.g. of auxiliary heads.

    Raises:
        ValueError: no such file, no weights in it, or weights of another network; says what was found, and what expected.
    """
    path = Path(path)
    fits = [fit(net, each, new_head, ignored) for each in read_weight_sets(path, key)]
    found = next((each for each in fits if each.fits), None)
    if found is None:
        closest = max(fits, key=lambda each: len(each.state))
        names, wanted = list(closest.taken.tensors), list(net.state_dict())
        more = f" and {len(closest.problems) - 3} more" if len(closest.problems) > 3 else ""
        raise ValueError(
            f"{key}: {path} does not fit the network: {'; '.join(closest.problems[:3])}{more}. It holds {len(names)} "
            f"tensors, e.g. {', '.join(names[:3])}; expected {len(wanted)}, e.g. {', '.join(wanted[:3])}. "
            "Choose network=... (or model=...) and data=... as in training"
        )
    others = [each.taken.place for each in fits if each.fits and each is not found]
    if others:
        found.notes.append(f"{found.taken.place or 'its first set'} was taken; {', '.join(others)} would fit too")
    net.load_state_dict(found.state, strict=False)
    return Filled(path, sha256_of(path), found.taken.place, tuple(found.new), tuple(found.notes))
