"""A network for a data set, fresh or with weights from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from glassarmor.lightning_modules.networks.check import check_network


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


def load_weights(net: nn.Module, path: str | Path) -> None:
    """Fill ``net`` from a checkpoint of a run, or from a state dict of the network itself; nothing else is unpickled.

    Raises:
        ValueError: no such file, no weights in it, or weights of another network.
    """
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch's own words recommend to unpickle anything
        raise ValueError(f"checkpoint: {path} is no file of weights ({type(error).__name__})") from error
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else {}
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"checkpoint: {path} holds no state dict of tensors")
    wanted = net.state_dict()
    if state.keys() != wanted.keys() and any(name.startswith("net.") for name in state):
        state = {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
    missing, foreign = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape
    ]
    if missing or foreign or shapes:
        found = [f"missing {sorted(missing)[:3]}"] * bool(missing) + [f"unknown {sorted(foreign)[:3]}"] * bool(foreign)
        raise ValueError(
            f"checkpoint: {path} does not fit the network: {'; '.join(found + sorted(shapes)[:3])}; "
            "choose network=... (or model=...) and data=... as in training"
        )
    net.load_state_dict(state)
