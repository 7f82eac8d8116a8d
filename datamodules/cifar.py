"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), through torchvision; fetched only when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision

from glassarmor.datamodules.downloads import open_dataset
from glassarmor.datamodules.fingerprint import SourceFile
from glassarmor.datamodules.images import ImageDataModule, Images

_Source = type[torchvision.datasets.CIFAR10]  # CIFAR100 derives from it


def _load(
    source: _Source, root: str, download: bool, files: dict[str, list[SourceFile]]
) -> tuple[Images, Images, tuple[str, ...]]:
    """Training and test images and the names of the classes; the files that they were read from go into ``files``."""

    def part(train: bool) -> tuple[Images, tuple[str, ...]]:
        data = open_dataset(lambda: source(root, train=train, download=download), source.__name__, root, download)
        folder, listed = Path(root) / source.base_folder, source.train_list if train else source.test_list
        files["training" if train else "test"] = [SourceFile(name, folder / name) for name, _ in listed]
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return Images(images, torch.tensor(data.targets)), tuple(data.classes)

    train, names = part(train=True)
    return train, part(train=False)[0], names


@dataclass(kw_only=True, eq=False, repr=False)
class CIFAR10(ImageDataModule):
    """50,000 training and 10,000 test images, 32×32 RGB, 10 classes.

    Args:
        root: folder that holds torchvision's files, relative to the working directory.
        download: fetch what is missing (170 MB).
    """

    root: str = "data"
    download: bool = False

    def load(self) -> tuple[Images, Images, tuple[str, ...]]:
        return _load(torchvision.datasets.CIFAR10, self.root, self.download, self.files)


@dataclass(kw_only=True, eq=False, repr=False)
class CIFAR100(ImageDataModule):
    """The same format with 100 classes; arguments as for ``CIFAR10``."""

    root: str = "data"
    download: bool = False

    def load(self) -> tuple[Images, Images, tuple[str, ...]]:
        return _load(torchvision.datasets.CIFAR100, self.root, self.download, self.files)
