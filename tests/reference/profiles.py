"""Activation Profiles in float64 numpy, image by image, from METHODS.md §6 and the docstrings' formulas.

Features are (M, D) of the background and (D,) of one image; a missing class gives NaN.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy import ndarray


def mean_of(features: ndarray, labels: ndarray, label: int) -> ndarray:
    members = [row for row, own in zip(features, labels, strict=True) if own == label]
    return np.mean(members, axis=0) if members else np.full(features.shape[1], np.nan)


def position(phi: ndarray, start: ndarray, end: ndarray) -> float:
    return float(np.dot(phi - start, end - start) / np.dot(end - start, end - start))


def nearest_share(phi: ndarray, features: ndarray, labels: ndarray, label: int, neighbours: int) -> float:
    distances = [np.linalg.norm(phi - row) for row in features]
    nearest = sorted(range(len(features)), key=lambda i: distances[i])[:neighbours]
    return float(np.mean([labels[i] == label for i in nearest]))


def relative_distance(phi: ndarray, features: ndarray, labels: ndarray, label: int) -> float:
    members = [row for row, own in zip(features, labels, strict=True) if own == label]
    if len(members) < 2:
        return float("inf")
    own = [min(np.linalg.norm(a - b) for j, b in enumerate(members) if j != i) for i, a in enumerate(members)]
    return float(min(np.linalg.norm(phi - row) for row in members) / np.quantile(own, 0.95))


def second_axis(features: ndarray, axis: ndarray) -> ndarray:
    """First principal component of what the axis leaves of the centred features; largest component positive."""
    unit = axis / np.linalg.norm(axis)
    rest = features - features.mean(0)
    rest = rest - np.outer(rest @ unit, unit)
    main = np.linalg.eigh(rest.T @ rest)[1][:, -1]
    return main * np.sign(main[np.abs(main).argmax()])


def second_position(phi: ndarray, features: ndarray, axis: ndarray) -> float:
    main = second_axis(features, axis)
    along = (features - features.mean(0)) @ main
    return float((phi - features.mean(0)) @ main / along.std())


def turning(clean: ndarray, adv: ndarray) -> int:
    """Lines (L,) of one image."""
    for layer in range(len(adv)):
        if all(adv[layer:] > 0.5) and clean[layer] < 0.5:
            return layer
    return -1


def divergence(clean: ndarray, adv: ndarray) -> float:
    return float(np.linalg.norm(adv - clean) / np.linalg.norm(clean))


def unit_divergence(clean: ndarray, adv: ndarray, axis: int) -> ndarray:
    """Root of units × mean over images of the unit's part of ‖ΔA‖² / ‖A‖²; images first, units at ``axis``."""
    count = clean.shape[axis]
    found = np.zeros(count)
    for k in range(count):
        parts = [
            np.sum((b.take(k, axis - 1) - a.take(k, axis - 1)) ** 2) / np.sum(a**2) for a, b in zip(clean, adv, strict=True)
        ]
        found[k] = np.sqrt(count * np.mean(parts))
    return found


def best_radius(points: ndarray, count: int) -> float:
    """The smallest radius of any ``count`` of the points: all subsets tried."""
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    return float(min(distances[list(centres)].min(0).max() for centres in itertools.combinations(range(len(points)), count)))
