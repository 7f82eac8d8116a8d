"""The embedded default: scikit-learn's 1,797 handwritten digits (UCI Optical Recognition of Handwritten Digits)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from glassarmor.datamodules.images import ImageDataModule, Images, stratified_split

_TEST_FRACTION, _TEST_SEED = 0.2, 1797  # one test set for all runs, whatever their seed


@dataclass(kw_only=True, eq=False, repr=False)
class Digits(ImageDataModule):
    """8×8 grey levels 0..16, enlarged to 32×32 bilinearly; 20 % are the test set. No download."""

    val_fraction: float = 0.15

    def load(self) -> tuple[Images, Images, tuple[str, ...]]:
        digits = load_digits()
        small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
        large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False).round().to(torch.uint8)
        everything = Images(large, torch.from_numpy(digits.target).long())
        train, test = stratified_split(everything.labels, _TEST_FRACTION, _TEST_SEED)
        return everything[train], everything[test], tuple(str(name) for name in digits.target_names)
