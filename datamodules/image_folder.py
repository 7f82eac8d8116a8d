"""Anyone's own images: a folder per class."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from glassarmor.datamodules.fingerprint import SourceFile
from glassarmor.datamodules.images import ImageDataModule, Images, require_fraction, require_whole, stratified_split

_TEST_SEED = 1797  # one test set for all runs, whatever their seed


@dataclass(kw_only=True, eq=False, repr=False)
class ImageFolder(ImageDataModule):
    """Images in ``<class>/**``, scaled to cover ``size`` × ``size`` and centre-cropped; class names stay as they are.

    Either ``path`` has train/ and test/ (or, in its place, val/), each with a folder per class; or ``path`` itself has
    a folder per class, and a stratified test set is split off, the same in every run. The validation split comes from
    the training images in both cases; where there is a test/, a val/ is left alone.

    Args:
        path: the folder.
        size: height and width in pixels.
        grey: one channel instead of RGB.
        test_fraction: share of the test set where there is no folder for it, in (0, 1).

    Raises:
        FileNotFoundError: no such folder, no class folders, or a class without images.
        ValueError: files that can't be read, a test class that training lacks, arguments out of range.
    """

    path: str
    size: int = 32
    grey: bool = False
    test_fraction: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("data.size", self.size, 1)
        require_fraction("data.test_fraction", self.test_fraction)

    def load(self) -> tuple[Images, Images, tuple[str, ...]]:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"data.path={self.path!r} is no folder; expected one with a folder per class")
        # "train" may also be the name of a class: then it holds images, not folders.
        if not ((root / "train").is_dir() and _folders(root / "train")):
            names = self._classes(root)
            everything = self._read(root, names)
            self.whole = everything
            train, test = stratified_split(everything.labels, self.test_fraction, _TEST_SEED)
            return everything[train], everything[test], names
        held_out = next((root / part for part in ("test", "val") if (root / part).is_dir()), None)
        if held_out is None:
            raise FileNotFoundError(f"data.path={self.path!r} has train/, but neither test/ nor val/ beside it")
        names = self._classes(root / "train")
        if unknown := sorted(set(_folders(held_out)) - set(names)):
            raise ValueError(f"data.path: {str(held_out)!r} has classes that train/ lacks: {unknown!r}")
        return self._read(root / "train", names), self._read(held_out, names, "test"), names

    def _classes(self, folder: Path) -> tuple[str, ...]:
        names = _folders(folder)
        if not names:
            raise FileNotFoundError(f"data.path: {str(folder)!r} must have a folder per class, found none")
        return names

    def _read(self, folder: Path, names: tuple[str, ...], source: str = "training") -> Images:
        """Test folders may lack classes."""
        samples = make_dataset(folder, {name: i for i, name in enumerate(names)}, IMG_EXTENSIONS, allow_empty=True)
        labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
        empty = [name for name, count in zip(names, labels.bincount(minlength=len(names)), strict=True) if count == 0]
        if not samples or (empty and source == "training"):
            raise FileNotFoundError(
                f"data.path: {str(folder)!r} must have images of every class, found none of {empty!r}"
                f" (allowed: {' '.join(IMG_EXTENSIONS)})"
            )
        self.files[source] = [SourceFile(os.path.relpath(file, folder), Path(file)) for file, _ in samples]
        channels = 1 if self.grey else 3
        images = torch.empty(len(samples), self.size, self.size, channels, dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
            problems = list(pool.map(lambda i: self._decode(samples[i][0], images[i]), range(len(samples))))
        if bad := [problem for problem in problems if problem]:
            more = f" and {len(bad) - 10} more" * (len(bad) > 10)
            raise ValueError(f"data.path: repair or remove {len(bad)} unreadable files: {'; '.join(bad[:10])}{more}")
        return Images(images.permute(0, 3, 1, 2).contiguous(), labels)

    def _decode(self, file: str, out: torch.Tensor) -> str | None:
        """Write one image into ``out`` (size, size, C); what is wrong with the file, or None."""
        try:
            with Image.open(file) as image:
                if image.mode[0] in "IF":  # conversion would clip it silently
                    return f"{file!r} (mode {image.mode}: more than 8 bits per channel)"
                upright = ImageOps.exif_transpose(image).convert("L" if self.grey else "RGB")
            fitted = ImageOps.fit(upright, (self.size, self.size), Image.Resampling.BILINEAR)
            out.copy_(torch.from_numpy(np.array(fitted)).view(out.shape))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # all that PIL raises
            return f"{file!r} ({error})"
        return None


def _folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
