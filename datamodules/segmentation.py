"""Concepts from real annotation: folders of images with index masks, and Broden's layout.  Decoded batch by batch."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glassarmor.datamodules.images import require_whole
from glassarmor.datamodules.loader import seeded

_CROPS = 51
_IMAGE_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the file
Decoded = tuple[np.ndarray, np.ndarray]  # (size, size, C) uint8; (maps, size, size) int16


class _Decoding(ABC):
    """Yields batches of decoded samples; a subclass knows how many there are, and decodes one."""

    batch_size: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def decode(self, index: int) -> Decoded: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, size, size) fp32 in [0,1], labels (B, maps, size, size) int16; as many maps as one image needs."""
        with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
            for start in range(0, len(self), self.batch_size):
                samples = list(pool.map(self.decode, range(start, min(start + self.batch_size, len(self)))))
                images = torch.from_numpy(np.stack([image for image, _ in samples])).permute(0, 3, 1, 2).contiguous()
                maps = max(len(labels) for _, labels in samples)
                labels = np.full((len(samples), maps, *samples[0][1].shape[1:]), -1, np.int16)
                for row, (_, found) in zip(labels, samples, strict=True):
                    row[: len(found)] = found
                yield images.float().div_(255), torch.from_numpy(labels)


@dataclass(eq=False)
class SegmentationFolder(_Decoding):
    """Images in ``<path>/<split>/images``, masks of the same name in ``<path>/<split>/masks``, names in ``classes.json``.

    A mask holds the class index of each pixel (8 or 16 bits, or a palette); the JSON names them: {"0": "sky", …}.  Images
    are enlarged or reduced bilinearly, masks by nearest neighbour.

    Args:
        path: the folder; ``split`` "" if images/ and masks/ lie in it directly.
        size: height and width of what comes out.
        crops: 0: the centre square of each image; k: k squares at random places, the same on every pass.
        crop: side of a random square as a share of the shorter side of the image, in (0, 1].
        ignore: names that are no concepts.
        category: of all classes.
        channels: 3, or 1 for nets that see grey images.
        seed: of the crops.

    Raises:
        FileNotFoundError: no such folder, no images, or an image without a mask.
        ValueError: arguments out of range; a mask in colours, with an index that has no name, or of another size than its
            image.
    """

    path: str
    split: str = "train"
    size: int = 32
    crops: int = 0
    crop: float = 0.5
    ignore: Sequence[str] = ("unlabelled",)
    category: str = "object"
    channels: int = 3
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole("concepts.size", self.size, 1)
        require_whole("concepts.crops", self.crops, 0)
        require_whole("concepts.batch_size", self.batch_size, 1)
        if self.channels not in (1, 3):
            raise ValueError(f"concepts.channels must be 1 or 3, got {self.channels!r}")
        if not 0 < self.crop <= 1:
            raise ValueError(f"concepts.crop must lie in (0, 1], got {self.crop!r}")
        root = Path(self.path).expanduser()
        names = _class_names(root / "classes.json")
        self.concepts = tuple(name for _, name in sorted(names.items()) if name not in self.ignore)
        self.categories = (self.category,) * len(self.concepts)
        self._known = np.array(sorted(names))
        self._index = np.full(max(names) + 1, -1, np.int16)
        for number, name in names.items():
            self._index[number] = -1 if name in self.ignore else self.concepts.index(name)
        folder = root / self.split
        files = sorted(file for file in _listed(folder / "images") if file.suffix.lower() in _IMAGE_FILES)
        masks = {file.stem: file for file in _listed(folder / "masks")}
        if not files:
            raise FileNotFoundError(f"concepts.path: {str(folder / 'images')!r} holds no images")
        if alone := [file.name for file in files if file.stem not in masks]:
            raise FileNotFoundError(f"concepts.path: {len(alone)} images have no mask of the same name, e.g. {alone[0]!r}")
        self._files = [(file, masks[file.stem]) for file in files]
        self._places = torch.rand(len(files), max(1, self.crops), 2, generator=seeded(_CROPS, self.seed)).tolist()

    def __len__(self) -> int:
        return len(self._files) * max(1, self.crops)

    def decode(self, index: int) -> Decoded:
        number, which = divmod(index, max(1, self.crops))
        image_file, mask_file = self._files[number]
        with Image.open(image_file) as image, Image.open(mask_file) as mask:
            if image.size != mask.size:
                raise ValueError(f"concepts.path: {str(mask_file)!r} is {mask.size}, its image {image.size} pixels")
            if mask.mode not in ("1", "L", "P", "I", "I;16"):
                raise ValueError(f"concepts.path: {str(mask_file)!r} must hold one index a pixel, found mode {mask.mode}")
            box = self._box(image.size, *self._places[number][which])
            pixels = _resized(image.convert("L" if self.channels == 1 else "RGB"), self.size, Image.Resampling.BILINEAR, box)
            indices = _resized(mask, self.size, Image.Resampling.NEAREST, box).astype(np.int64)
        if unknown := sorted(set(np.unique(indices).tolist()) - set(self._known.tolist())):
            raise ValueError(f"concepts.path: {str(mask_file)!r} holds indices without a name in classes.json: {unknown}")
        return pixels.reshape(self.size, self.size, -1), self._index[indices][None]

    def _box(self, size: tuple[int, int], across: float, down: float) -> Box:
        if self.crops == 0:
            return _centre(size)
        side = max(1.0, self.crop * min(size))
        left, top = across * (size[0] - side), down * (size[1] - side)
        return left, top, left + side, top + side


def _class_names(file: Path) -> dict[int, str]:
    if not file.is_file():
        raise FileNotFoundError(f"concepts.path: expected the names of the classes in {str(file)!r}")
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not found or not all(key.isdecimal() for key in found):
        raise ValueError(f'concepts.path: {str(file)!r} must map indices to names, such as {{"0": "sky"}}')
    return {int(key): str(name) for key, name in found.items()}


def _listed(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"concepts.path: no folder {str(folder)!r}")
    return list(folder.iterdir())


def _centre(size: tuple[int, int]) -> Box:
    side = min(size)
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    return left, top, left + side, top + side


def _resized(image: Image.Image, size: int, resampling: Image.Resampling, box: Box) -> np.ndarray:
    return np.asarray(image.resize((size, size), resampling, box=box))


@dataclass(eq=False)
class Broden(_Decoding):
    """Broden's own layout: ``index.csv``, ``label.csv``, ``category.csv``, and ``images/`` with pictures and masks.

    A cell of the index lists, separated by ";", what a category says of an image: names of masks, which code the label of
    a pixel as R + 256·G, 0 for none; or numbers of labels that hold for the whole image.  The category of a concept is the
    one that the label table counts it most often in.

    Args:
        path: the folder.
        size: images and masks become squares of this side: the centre square, resized.
        split: "train" or "val"; "" for all.
        use: names of the categories to use; all by default.
        channels: 3, or 1 for nets that see grey images.

    Raises:
        FileNotFoundError: a table is missing.
        ValueError: no image is left, a category that the tables lack, or a label number without a name.
    """

    path: str
    size: int = 112
    split: str = ""
    use: Sequence[str] = ()
    channels: int = 3
    batch_size: int = 64

    def __post_init__(self) -> None:
        require_whole("concepts.size", self.size, 1)
        require_whole("concepts.batch_size", self.batch_size, 1)
        if self.channels not in (1, 3):
            raise ValueError(f"concepts.channels must be 1 or 3, got {self.channels!r}")
        self._root = Path(self.path).expanduser()
        known = [row["name"] for row in self._table("category.csv")]
        if unknown := sorted(set(self.use) - set(known)):
            raise ValueError(f"concepts.use: expected names among {', '.join(known)}, found {unknown}")
        self._columns = [name for name in known if not self.use or name in self.use]
        labels = [(int(row["number"]), row["name"], _primary(row["category"])) for row in self._table("label.csv")]
        used = [(number, name, category) for number, name, category in labels if number > 0 and category in self._columns]
        self.concepts = tuple(name for _, name, _ in used)
        self.categories = tuple(category for _, _, category in used)
        self._known = {number for number, _, _ in labels} | {0}
        self._index = np.full(max(self._known) + 1, -1, np.int16)
        self._index[[number for number, _, _ in used]] = np.arange(len(used))
        self._rows = [
            row
            for row in self._table("index.csv")
            if self.split in ("", row["split"]) and any(row.get(name) for name in self._columns)
        ]
        if not self._rows:
            raise ValueError(f"concepts.split: no image of split {self.split!r} is annotated in {', '.join(self._columns)}")

    def _table(self, name: str) -> list[dict[str, str]]:
        file = self._root / name
        if not file.is_file():
            raise FileNotFoundError(f"concepts.path: expected Broden's {name} in {str(self._root)!r}")
        with file.open(newline="", encoding="utf-8") as lines:
            return list(csv.DictReader(lines))

    def __len__(self) -> int:
        return len(self._rows)

    def decode(self, index: int) -> Decoded:
        row = self._rows[index]
        with Image.open(self._root / "images" / row["image"]) as image:
            upright = image.convert("L" if self.channels == 1 else "RGB")
            pixels = _resized(upright, self.size, Image.Resampling.BILINEAR, _centre(image.size))
        maps = [self._map(part) for name in self._columns for part in (row.get(name) or "").split(";") if part]
        return pixels.reshape(self.size, self.size, -1), _once(np.stack(maps))

    def _map(self, part: str) -> np.ndarray:
        if part.isdecimal():
            numbers = np.full((self.size, self.size), int(part))
        else:
            with Image.open(self._root / "images" / part) as mask:
                coded = _resized(mask.convert("RGB"), self.size, Image.Resampling.NEAREST, _centre(mask.size))
            numbers = coded[..., 0].astype(np.int64) + 256 * coded[..., 1].astype(np.int64)
        if unknown := sorted(set(np.unique(numbers).tolist()) - self._known):
            raise ValueError(f"concepts.path: {part!r} holds labels that label.csv lacks: {unknown[:5]}")
        return self._index[numbers]


def _primary(categories: str) -> str:
    """ "object(12);part(3)" → "object"."""
    counts = [(int(number.rstrip(")")), name) for name, _, number in (c.partition("(") for c in categories.split(";"))]
    most = max(count for count, _ in counts)
    return next(name for count, name in counts if count == most)


def _once(maps: np.ndarray) -> np.ndarray:
    """No pixel keeps a concept in two maps: categories may repeat each other, and a pixel counts once."""
    for i in range(1, len(maps)):
        maps[i][(maps[i] == maps[:i]).any(0)] = -1
    return maps
