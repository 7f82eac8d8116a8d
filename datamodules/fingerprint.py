"""What data a number is about: the place, the classes in their order, and a fingerprint of every split, in a second (ours).

A fingerprint is plain JSON.  ``places``: where the data lies, in full.  ``classes``: names by label.  ``sources``: what was
read, before anything was split or left out: images ``n``, the names and sizes of their ``files`` (null where there are none)
and, class by class, a few images' pixels (``by_class``; null for a class without images).  ``splits``: train, val and test
as a run used them: ``n``, the labels and the pixels of a fixed ``sample``, and, where it was asked for, of the ``whole``.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from glassarmor.datamodules.images import ImageDataModule, Images

PLACES: Final = ("path", "test_path", "root")  # arguments that say where the data lies
SPLITS: Final = ("train", "val", "test")
SAMPLE: Final = 256  # images of a split, or of all classes together, whose pixels are hashed
CHUNK: Final = 1024  # images hashed at a time


@dataclass(frozen=True)
class SourceFile:
    """A file that images were read from; its name does not say where the whole data lies."""

    name: str
    path: Path

    @property
    def size(self) -> int:
        """In bytes; −1 for a file that is gone."""
        with suppress(OSError):
            return self.path.stat().st_size
        return -1


def source_print(images: Images, classes: int, files: Sequence[SourceFile]) -> dict[str, Any]:
    """Of all that was read from one source: independent of seeds, limits and splits."""
    order, counts = images.labels.argsort(stable=True), torch.bincount(images.labels, minlength=classes)
    by_class = []
    for rows in order.split(counts.tolist()):
        some = rows[_spread(len(rows), max(1, SAMPLE // classes))]
        by_class.append(_digest([str(len(rows)).encode(), *_pixels(images, some)])[:12] if len(rows) else None)
    named = sorted(f"{file.name}\0{file.size}" for file in files)
    return {"n": len(images), "files": _digest([json.dumps(named).encode()]) if named else None, "by_class": by_class}


def fingerprint(data: ImageDataModule, whole: bool = False, cache: Path | None = None) -> dict[str, Any]:
    """Of data that was set up.

    Args:
        whole: hash every pixel of every split, too; what was hashed once is looked up as long as no file is touched.
        cache: the folder that keeps such hashes; by default one in the user's cache.
    """
    named = {key: getattr(data, key, None) for key in PLACES}
    places = {key: str(Path(given).expanduser().resolve()) for key, given in named.items() if isinstance(given, str)}
    splits = {name: _split(getattr(data, name)) for name in SPLITS}
    if whole:
        for name, found in splits.items():
            found["whole"] = _looked_up(getattr(data, name), found["sample"], data.files, cache)
    return {
        "set": type(data).__name__,
        "places": places,
        "classes": list(data.class_names),
        "sources": data.sources,
        "splits": splits,
    }


def _spread(n: int, most: int) -> Tensor:
    """At most so many places among ``n``, the same each time, evenly spread from first to last."""
    return torch.linspace(0, n - 1, min(n, most), dtype=torch.float64).round().long()


def _split(images: Images) -> dict[str, Any]:
    rows = _spread(len(images), SAMPLE)
    labels = images.labels.numpy().tobytes()
    return {"n": len(images), "sample": _digest([str(tuple(images.images.shape)).encode(), labels, *_pixels(images, rows)])}


def _pixels(images: Images, rows: Tensor) -> Iterator[bytes]:
    for some in rows.split(CHUNK):
        yield images.images[some].contiguous().numpy().tobytes()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _looked_up(images: Images, sample: str, files: Mapping[str, Sequence[SourceFile]], cache: Path | None) -> str:
    """The hash of every pixel and label, from the cache where files, their times and the sample are those of before."""
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glassarmor"
    touched = [
        (str(file.path.resolve()), file.path.stat().st_size, file.path.stat().st_mtime_ns)
        for source in files.values()
        for file in source
    ]
    place = cache / f"{_digest([json.dumps([sample, sorted(touched)]).encode()])}.hash"
    if touched and place.is_file() and len(text := place.read_text(encoding="ascii", errors="replace")) == 16:
        return text
    found = _digest(chain([images.labels.numpy().tobytes()], _pixels(images, torch.arange(len(images)))))
    if not touched:
        return found
    with suppress(OSError):  # without a cache it is hashed again
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache, delete=False, encoding="ascii") as file:
            file.write(found)
        os.replace(file.name, place)
    return found
