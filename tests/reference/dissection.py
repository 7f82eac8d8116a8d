"""Network dissection as the paper tells it (Bau et al. 2017, section 2): loops, float64, one unit and image at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Counts:
    thresholds: np.ndarray
    intersection: np.ndarray
    unit: np.ndarray
    concept: np.ndarray
    unit_carried: np.ndarray
    unit_met: np.ndarray
    top_image: np.ndarray

    def iou(self, union: str, category_of: list[int]) -> np.ndarray:
        iou = np.zeros(self.intersection.shape)
        for k in range(len(self.unit)):
            for c in range(len(self.concept)):
                group = category_of[c]
                area = {"global": self.unit[k], "category": self.unit_carried[k, group], "met": self.unit_met[k, group]}[
                    union
                ]
                whole = area + self.concept[c] - self.intersection[k, c]
                iou[k, c] = self.intersection[k, c] / whole if whole else 0.0
        return iou


def threshold(values: np.ndarray, quantile: float) -> float:
    """The smallest of the values that at most a share ``quantile`` of them exceeds."""
    for candidate in np.unique(values):
        if np.count_nonzero(values > candidate) <= quantile * values.size + 1e-9:
            return float(candidate)
    raise AssertionError("nothing exceeds the largest value")


def enlarge(a: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear interpolation between the centres of the cells; beyond the outermost centres their value."""
    out = np.empty((height, width))
    for row in range(height):
        y = min(max((row + 0.5) * a.shape[0] / height - 0.5, 0), a.shape[0] - 1)
        y0 = math.floor(y)
        y1 = min(y0 + 1, a.shape[0] - 1)
        for column in range(width):
            x = min(max((column + 0.5) * a.shape[1] / width - 0.5, 0), a.shape[1] - 1)
            x0 = math.floor(x)
            x1 = min(x0 + 1, a.shape[1] - 1)
            above = (1 - (x - x0)) * a[y0, x0] + (x - x0) * a[y0, x1]
            below = (1 - (x - x0)) * a[y1, x0] + (x - x0) * a[y1, x1]
            out[row, column] = (1 - (y - y0)) * above + (y - y0) * below
    return out


def dissect(acts: np.ndarray, masks: np.ndarray, category_of: list[int], quantile: float) -> Counts:
    """``acts`` (N, C, h, w); ``masks`` (N, K, H, W) bool; ``category_of`` (K,)."""
    acts = acts.astype(np.float64)
    images, units = acts.shape[:2]
    concepts, groups = masks.shape[1], max(category_of) + 1
    thresholds = np.array([threshold(acts[:, k].ravel(), quantile) for k in range(units)])
    intersection, unit = np.zeros((units, concepts), int), np.zeros(units, int)
    carried, met = np.zeros((units, groups), int), np.zeros((units, groups), int)
    for k in range(units):
        for i in range(images):
            mask = enlarge(acts[i, k], *masks.shape[2:]) > thresholds[k]
            unit[k] += mask.sum()
            for c in range(concepts):
                intersection[k, c] += (mask & masks[i, c]).sum()
            for group in range(groups):
                members = [c for c in range(concepts) if category_of[c] == group]
                if any(masks[i, c].any() for c in members):
                    carried[k, group] += mask.sum()
                if any((mask & masks[i, c]).any() for c in members):
                    met[k, group] += mask.sum()
    return Counts(
        thresholds=thresholds,
        intersection=intersection,
        unit=unit,
        concept=masks.sum((0, 2, 3)),
        unit_carried=carried,
        unit_met=met,
        top_image=acts.max((2, 3)).argmax(0),
    )
