"""Street View House Numbers (Netzer et al. 2011), cropped digits, through torchvision; fetched only when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.datasets import SVHN as TorchvisionSVHN

from glassarmor.datamodules.downloads import open_dataset
from glassarmor.datamodules.fingerprint import SourceFile
from glassarmor.datamodules.images import ImageDataModule, Images


@dataclass(kw_only=True, eq=False, repr=False)
class SVHN(ImageDataModule):
    """73,257 training and 26,032 test images, 32×32 RGB, digits 0..9.

    Args:
        root: folder that holds train_32x32.mat and test_32x32.mat, relative to the working directory.
        download: fetch what is missing (250 MB).
    """

    root: str = "data"
    download: bool = False

    def load(self) -> tuple[Images, Images, tuple[str, ...]]:
        return self._part("train"), self._part("test"), tuple(str(digit) for digit in range(10))

    def _part(self, split: str) -> Images:
        part = open_dataset(
            lambda: TorchvisionSVHN(self.root, split=split, download=self.download), "SVHN", self.root, self.download
        )
        name = part.filename
        self.files["training" if split == "train" else "test"] = [SourceFile(name, Path(self.root) / name)]
        return Images(torch.from_numpy(part.data).contiguous(), torch.from_numpy(part.labels).long())
