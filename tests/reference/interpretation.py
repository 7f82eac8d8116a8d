"""Conductance, restoration, interpretability score and overlap in float64 numpy, loop by loop, from METHODS.md."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray


def conductance(point: Callable[[float], tuple[ndarray, ndarray]], steps: int) -> ndarray:
    """Σ_i ½(g_i + g_{i+1})·(A_{i+1} − A_i) of one sample and label; ``point(alpha)`` gives A and g = ∂Z_c/∂A there."""
    total = 0.0
    for i in range(steps):
        a, g = point(i / steps)
        a_next, g_next = point((i + 1) / steps)
        total = total + 0.5 * (g + g_next) * (a_next - a)
    return total


def regions_needed(
    answer: Callable[[ndarray], int], x: ndarray, x_adv: ndarray, y: int, score: ndarray, regions: ndarray
) -> int:
    """How many regions of one x' (C, H, W) must be clean, largest score first, until the answer is y; G + 1 if never."""
    image = x_adv.copy()
    for count, region in enumerate(sorted(range(len(score)), key=lambda g: (-score[g], g)), start=1):
        for row in range(regions.shape[0]):
            for column in range(regions.shape[1]):
                if regions[row, column] == region:
                    image[:, row, column] = x[:, row, column]
        if answer(image) == y:
            return count
    return len(score) + 1


def interpretability_score(cam: ndarray, delta: ndarray, quantile: float) -> float:
    """‖B ∘ δ‖₂ / ‖δ‖₂ for a map of the image's own size; B holds the values that at least q·P others lie below or equal."""
    ordered = sorted(cam.ravel())
    threshold = ordered[int(quantile * len(ordered))]
    inside = total = 0.0
    for channel in delta:
        for value, evidence in zip(channel.ravel(), cam.ravel(), strict=True):
            total += value**2
            inside += value**2 if evidence >= threshold else 0.0
    return np.sqrt(inside / total)


def mean_percentile(cam: ndarray, kind: ndarray, of: int) -> float:
    """Mean place of regions of a kind among the regions of their image ordered by their CAM (N, G)."""
    places = []
    for image, kinds in zip(cam, kind, strict=True):
        for value, k in zip(image, kinds, strict=True):
            if k == of:
                places.append((np.sum(image < value) + 0.5 * np.sum(image == value)) / len(image))
    return float(np.mean(places))


def iou(region: ndarray, evidence: ndarray) -> float:
    """Two boolean masks (N, H, W), over all images together."""
    return float(np.sum(region & evidence) / np.sum(region | evidence))
