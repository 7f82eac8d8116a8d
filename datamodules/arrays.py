"""Anyone's own arrays: .npz files with ``images`` and ``labels``, in one or several shards."""

from __future__ import annotations

import glob
import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy

from glassarmor.datamodules.fingerprint import SourceFile
from glassarmor.datamodules.images import ImageDataModule, Images


@dataclass(kw_only=True, eq=False, repr=False)
class Arrays(ImageDataModule):
    """Reads .npz files with these keys; pickled objects are never loaded.

    images: (N, H, W, C) with C = 1 or 3, or (N, H, W) for grey; uint8.
    labels: (N,), any integer type, 0..classes−1.
    class_names: optional, an array of strings in the order of the labels; the same in every file that has it.

    Args:
        path: a folder with train*.npz and test*.npz; or one training file; or a glob pattern of training files.
        test_path: test file, pattern, or folder with test*.npz; may be left out if ``path`` is a folder.
        names: class names, instead of those in the files.
    """

    path: str
    test_path: str | None = None
    names: Sequence[str] | None = None

    def load(self) -> tuple[Images, Images, tuple[str, ...]]:
        train_files = _files("data.path", self.path, "train*.npz")
        if self.test_path is None and not Path(self.path).expanduser().is_dir():
            raise ValueError(
                f"data.test_path must name the test .npz, data.path={self.path!r} being no folder with test*.npz"
            )
        key = "data.path" if self.test_path is None else "data.test_path"
        test_files = _files(key, self.path if self.test_path is None else self.test_path, "test*.npz")
        if shared := set(train_files) & set(test_files):
            raise ValueError(f"data.path and data.test_path must not share files, both hold {str(min(shared))!r}")
        files = {"training": train_files, "test": test_files}
        self.files = {source: [SourceFile(file.name, file) for file in each] for source, each in files.items()}
        with_names = self.names is None
        shards = [_read("data.path", file, with_names) for file in train_files]
        test_shards = [_read(key, file, with_names) for file in test_files]
        train, test = _join("data.path", train_files, shards), _join(key, test_files, test_shards)
        return train, test, self._names(train.labels, [names for *_, names in shards + test_shards])

    def _names(self, labels: torch.Tensor, found: list[tuple[str, ...] | None]) -> tuple[str, ...]:
        if self.names is not None:
            return tuple(str(name) for name in self.names)
        given = {names for names in found if names is not None}
        if len(given) > 1:
            raise ValueError(f"class_names must be the same in every .npz of data.path, found {sorted(given)!r}")
        if given:
            return given.pop()
        present = labels.unique().tolist()
        if present != list(range(len(present))):
            raise ValueError(
                "labels must be 0..classes−1 without gaps where neither the .npz (class_names) nor data.names names the"
                f" classes, found {len(present)} different labels in {present[0]}..{present[-1]}"
            )
        return tuple(str(label) for label in present)


def _files(key: str, path: str, pattern: str) -> list[Path]:
    where = Path(path).expanduser()
    if where.is_dir():
        found, wanted = sorted(where.glob(pattern)), f"{pattern} in that folder"
    else:
        # A file that exists is meant literally, even if its name looks like a pattern.
        found = [where] if where.is_file() else sorted(Path(match) for match in glob.glob(str(where)))
        wanted = "a folder, an .npz file or a glob pattern of .npz files"
    if not found:
        raise FileNotFoundError(f"{key}={path!r} matches nothing; expected {wanted}")
    return found


def _read(key: str, file: Path, with_names: bool) -> tuple[np.ndarray, np.ndarray, tuple[str, ...] | None]:
    """Images (N, H, W, C) uint8, labels (N,) int64, and class names or None."""
    where = f"{key}: {str(file)!r}"
    arrays: dict[str, np.ndarray] = {}
    try:
        _check_sizes(file)
        with np.load(file, allow_pickle=False) as archive:
            keys = list(archive.files)
            for name in ("images", "labels", "class_names")[: 3 if with_names else 2]:
                if name in keys:
                    arrays[name] = archive[name]
    except Exception as error:  # a damaged archive fails in a dozen ways: zip, zlib, header, pickle, memory
        raise ValueError(
            f"{where} is no readable .npz of plain arrays, names saved as strings ({type(error).__name__}: {error})"
        ) from error
    for name in ("images", "labels"):
        if name not in arrays:
            raise ValueError(f"{where} must have the keys images and labels, found {keys!r}")
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8:
        raise ValueError(f"{where}: images must be uint8 in 0..255, got {images.dtype}")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"{where}: images must be (N, H, W) or (N, H, W, C) with C = 1 or 3, nothing empty, got {arrays['images'].shape}"
        )
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(f"{where}: labels must be whole numbers of shape (N,), got {labels.dtype} {labels.shape}")
    if len(labels) != len(images):
        raise ValueError(f"{where} must have one label per image, found {len(images)} images and {len(labels)} labels")
    names = _strings(where, arrays["class_names"]) if "class_names" in arrays else None
    lowest, highest = int(labels.min()), int(labels.max())
    largest = np.iinfo(np.int32).max if names is None else len(names) - 1
    if lowest < 0 or highest > largest:
        raise ValueError(f"{where}: labels must lie in 0..{largest}, found {lowest}..{highest}")
    return images, labels.astype(np.int64), names


def _memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_sizes(file: Path) -> None:
    """Raises ValueError for an archive whose arrays would not fit: a small file can unpack to more than memory holds."""
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > (room := _memory() // 2):
            raise ValueError(f"it unpacks to {unpacked >> 20} MiB, more than half of the memory here, {room >> 20} MiB")
        for entry in archive.infolist():
            with archive.open(entry) as part:  # a header alone can ask for any amount
                read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
                header = read.get(npy.read_magic(part))
                if header is None:
                    continue
                shape, _, dtype = header(part)
            if math.prod(shape) * dtype.itemsize > entry.file_size:
                raise ValueError(f"{entry.filename} says that it holds {shape} {dtype}, and is smaller")


def _strings(where: str, names: np.ndarray) -> tuple[str, ...]:
    if names.dtype.kind not in "US" or names.ndim != 1:
        raise ValueError(f"{where}: class_names must be strings of shape (classes,), got {names.dtype} {names.shape}")
    return tuple(name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names.tolist())


def _join(key: str, files: list[Path], shards: list[tuple[np.ndarray, np.ndarray, tuple[str, ...] | None]]) -> Images:
    first = shards[0][0].shape[1:]
    for file, (images, *_) in zip(files, shards, strict=True):
        if images.shape[1:] != first:
            raise ValueError(
                f"{key}: all shards must hold images of one (H, W, C), got {first} in {str(files[0])!r}"
                f" and {images.shape[1:]} in {str(file)!r}"
            )
    pixels = torch.from_numpy(np.concatenate([images for images, *_ in shards]))
    labels = torch.from_numpy(np.concatenate([labels for _, labels, _ in shards]))
    return Images(pixels.permute(0, 3, 1, 2).contiguous(), labels)
