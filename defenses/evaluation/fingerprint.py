"""What a result belongs to: a hash of a net, of tensors, and the settings of an attack as plain data."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn


def tensors_hash(*tensors: Tensor) -> str:
    """First 16 hex digits of the SHA-256 of types, shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def net_hash(net: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 of the net's printed structure and of every weight and buffer, by name."""
    structure = re.sub(r"0x[0-9a-f]+", "", repr(net))  # addresses of functions change from process to process
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}  # buffers outside the state dict too
    names = json.dumps([structure, *tensors])
    return hashlib.sha256((names + tensors_hash(*tensors.values())).encode()).hexdigest()[:16]


def settings_hash(attacks: Sequence[Mapping[str, Any]], ball: str, eps: float, batch_size: int) -> str:
    """First 16 hex digits of the SHA-256 of what a suite did: :func:`described` attacks, their ball, images a batch."""
    asked = json.dumps([list(attacks), ball, eps, batch_size], sort_keys=True)
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def described(value: object) -> Any:
    """An object as plain JSON: its class and public attributes; nets and tensors by their hash.  For settings, not for data.

    What is counted while attacking (``calls``) is left out.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    if isinstance(value, Mapping):
        return {str(key): described(entry) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return [described(entry) for entry in value]
    if isinstance(value, Tensor):
        return tensors_hash(value)
    if isinstance(value, Set):
        return sorted(map(repr, value))
    attributes = {name: entry for name, entry in vars(value).items() if not name.startswith("_") and name != "calls"}
    if isinstance(value, nn.Module):
        attributes = {"hash": net_hash(value)} | {k: v for k, v in attributes.items() if k != "training"}
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return {"class": type(value).__name__} | {name: described(entry) for name, entry in attributes.items()}
