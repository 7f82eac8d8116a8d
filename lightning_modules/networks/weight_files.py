"""What a file of weights holds: every set of named tensors in it, however it was wrapped; nothing else is unpickled."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

DEEPEST: Final = 3  # dicts within dicts that are looked into
# Where several sets fit a network, the one that stands first here; what is averaged comes after what was trained.
USUAL: Final = ("", "state_dict", "model_state_dict", "model", "net", "network", "params", "weights")
AVERAGED: Final = re.compile(r"ema|swa|averag|shadow|teacher", re.IGNORECASE)
# How a file of another kind begins, what it is, and the way out.
FOREIGN: Final = (
    (b"\x89HDF", "an HDF5 file, as Keras writes them", "export the weights to torch where it was made"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch it with: git lfs pull"),
    (b"<!DOCTYPE", "a web page, not the file that it offers", "download the file itself"),
    (b"<html", "a web page, not the file that it offers", "download the file itself"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"\xfd7zXZ", "an xz archive", "unpack it"),
)
STATE_DICT: Final = "save its state_dict() where it was made: torch.save(net.state_dict(), FILE)"


@dataclass(frozen=True)
class WeightSet:
    """Tensors of a file, by name; without ``names`` in an order.  ``place``: the keys that led there."""

    place: str
    tensors: Mapping[str, Tensor]
    names: bool = True

    @property
    def rank(self) -> tuple[bool, int, str]:
        """Sorts sets: what was trained before averages of it, the usual names before others."""
        usual = USUAL.index(self.place) if self.place in USUAL else len(USUAL)
        return bool(AVERAGED.search(self.place)), usual, self.place


def sha256_of(path: str | Path) -> str:
    """Of the file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weight_sets(path: str | Path, key: str = "weights") -> list[WeightSet]:
    """Every set of tensors in a file of torch, safetensors or NumPy, in the order in which they are to be tried.

    Torch's restricted unpickler reads it (``weights_only``), which also knows numpy's scalars and arrays here, and
    ``argparse.Namespace``: values that run nothing.

    Raises:
        ValueError: begins with ``key``; no such file, one of another kind (says the way out), or one without tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{key}: expected a file of weights, found none at {path}; nothing is downloaded")
    found = _read(path, key)
    sets = sorted(_sets(found), key=lambda each: each.rank)
    if not sets:
        keys = f"a dict with keys {', '.join(map(str, list(found)[:5]))}" if isinstance(found, Mapping) else _kind(found)
        raise ValueError(f"{key}: {path} holds no state dict of tensors, parameter names to tensors; found {keys}")
    return sets


def _kind(found: object) -> str:
    return type(found).__name__ + (f" of {type(found[0]).__name__}" if isinstance(found, list | tuple) and found else "")


def _read(path: Path, key: str) -> Any:
    with path.open("rb") as file:
        head = file.read(64)
    kind = _other_kind(path, head)
    if kind is not None:
        raise ValueError(f"{key}: {path} is {kind[0]}, expected a file of weights; {kind[1]}")
    try:
        if head[8:9] == b"{":
            return load_file(path)
        if _is_numpy(path):
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(f"{key}: {path} {_refused(path, error)}") from error
    except Exception as error:  # torch's own words recommend to unpickle anything
        raise ValueError(f"{key}: {path} is no file of weights ({type(error).__name__}), or a damaged one") from error


def _other_kind(path: Path, head: bytes) -> tuple[str, str] | None:
    """What a file is that is known not to be one of ours, and the way out."""
    if not head:
        return "an empty file", "it may not have been written to its end"
    for start, what, way in FOREIGN:
        if head.lower().startswith(start.lower()):
            return what, way
    if path.suffix.lower() == ".onnx" or (head[:1] == b"\x08" and head[2:3] == b"\x12"):
        return (
            "a graph in ONNX",
            f"{STATE_DICT}; or make a torch net of it by your own code, and name that: model=module:callable",
        )
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as parts:
        names = parts.namelist()
    if any("/code/" in name for name in names):
        return "a TorchScript program", "write its weights by themselves: torch.save(torch.jit.load(FILE).state_dict(), NEW)"
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        return "a program of torch.export", STATE_DICT
    if not any(name.endswith(("data.pkl", ".npy")) for name in names):
        return "a zip archive of something else", "unpack it, and name the file of weights in it"
    return None


def _is_numpy(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as parts:
        return all(name.endswith(".npy") for name in parts.namelist())


def _refused(path: Path, error: Exception) -> str:
    """Why the restricted unpickler stopped: which class or function the file wanted to have called."""
    names: list[str] = []
    if zipfile.is_zipfile(path):
        try:
            with torch.serialization.safe_globals(_harmless()):
                names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except Exception:  # its pickle is damaged, too
            names = []
    names = names or re.findall(r"GLOBAL ([\w.]+)", str(error))
    if not names:
        return f"is no file of weights ({type(error).__name__}), or a damaged one"
    told = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    whole = [name for name in names if name.startswith("torch.nn.") or _is_module(name)]
    if whole or any(name.startswith("__main__.") for name in names):
        return f"is a pickled module or holds one (it asks for {told}), which is code and is not loaded; {STATE_DICT}"
    return f"holds more than weights: it asks for {told}, which is not loaded, for it could run anything; {STATE_DICT}"


def _is_module(name: str) -> bool:
    """Whether a dotted name is that of a class of networks that is imported already; nothing is imported for it."""
    module, _, last = name.rpartition(".")
    found = getattr(sys.modules.get(module), last, None)
    return isinstance(found, type) and issubclass(found, nn.Module)


@cache
def _harmless() -> list[Any]:
    """What files of weights hold beside tensors: numbers of numpy and options, under the names of old and new versions."""
    scalar, rebuild = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    both = [
        (each, f"{place}.multiarray.{name}")
        for each, name in ((scalar, "scalar"), (rebuild, "_reconstruct"))
        for place in ("numpy.core", "numpy._core")
    ]
    dtypes = [getattr(np.dtypes, name) for name in np.dtypes.__all__ if name != "ObjectDType"]
    return [*both, np.ndarray, np.dtype, *dtypes, argparse.Namespace, defaultdict]


def _sets(found: object, place: str = "", depth: int = 0) -> Iterator[WeightSet]:
    """All sets of tensors in nested dicts and lists."""
    if isinstance(found, argparse.Namespace):
        found = vars(found)
    if isinstance(found, list | tuple) and found:
        if all(isinstance(each, tuple | list) and len(each) == 2 and isinstance(each[0], str) for each in found):
            found = dict(found)
        elif all(isinstance(each, Tensor | np.ndarray) for each in found):
            yield WeightSet(place, {str(i): _tensor(each) for i, each in enumerate(found)}, names=False)
            return
        else:
            found = {str(i): each for i, each in enumerate(found) if isinstance(each, Mapping | list | tuple)}
    if not isinstance(found, Mapping) or depth > DEEPEST:
        return
    tensors = {str(name): _tensor(each) for name, each in found.items() if isinstance(each, Tensor | np.ndarray)}
    if tensors:
        yield WeightSet(place, tensors)
    for name, inner in found.items():
        yield from _sets(inner, f"{place}.{name}" if place else str(name), depth + 1)


def _tensor(value: Tensor | np.ndarray) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    return torch.from_numpy(np.ascontiguousarray(value)) if value.dtype.kind in "biufc" else torch.empty(0)
