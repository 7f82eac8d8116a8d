"""Signals and interpretation-guided regularisers in float64 numpy, loop by loop, from the formulas in METHODS.md.

Activations ``a`` (clean) and ``a_adv`` are (N, C, H, W); ``w`` (K, C) is the linear head above global average pooling.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray


def region_effects(
    logits: Callable[[ndarray], ndarray], x: ndarray, x_adv: ndarray, y: ndarray, t: ndarray, regions: ndarray
) -> tuple[ndarray, ndarray]:
    """Promotion and suppression (N, G): one image with one region taken back at a time."""
    n, count = len(x), regions.max() + 1
    p, s = np.zeros((n, count)), np.zeros((n, count))
    for i in range(n):
        z_adv = logits(x_adv[i : i + 1])[0]
        for g in range(count):
            image = x_adv[i].copy()
            for row in range(regions.shape[0]):
                for column in range(regions.shape[1]):
                    if regions[row, column] == g:
                        image[:, row, column] = x[i][:, row, column]
            z = logits(image[None])[0]
            s[i, g] = z[y[i]] - z_adv[y[i]]
            p[i, g] = z_adv[t[i]] - z[t[i]]
    return p, s


def kind(promotion: float, suppression: float) -> str:
    if promotion <= 1e-3 and suppression <= 1e-3:
        return "inactive"
    ratio = np.log2(max(promotion, 1e-3) / max(suppression, 1e-3))
    return "suppression" if ratio < -1 else "promotion" if ratio > 1 else "balanced"


def contribution(a: ndarray, a_adv: ndarray, w: ndarray, c: int) -> ndarray:
    """K^c (C, H, W) of one sample: w_ck · ΔA_khw / (HW)."""
    k = np.zeros_like(a)
    units, height, width = a.shape
    for unit in range(units):
        for row in range(height):
            for column in range(width):
                k[unit, row, column] = w[c, unit] * (a_adv - a)[unit, row, column] / (height * width)
    return k


def cam(a: ndarray, w: ndarray, c: int) -> ndarray:
    """Zhou 2016: Σ_k w_ck A_k at each position (H, W) of one sample."""
    return sum(w[c, unit] * a[unit] for unit in range(len(a)))


def sensitivity(a: ndarray, a_adv: ndarray) -> ndarray:
    """σ_k: mean over samples and positions of |ΔA_k|."""
    return np.array([np.mean([np.mean(np.abs(a_adv[i, k] - a[i, k])) for i in range(len(a))]) for k in range(a.shape[1])])


def relative_sensitivity(a: ndarray, a_adv: ndarray) -> ndarray:
    return sensitivity(a, a_adv) / np.array([np.std(a[:, k]) for k in range(a.shape[1])])


def pse_regularizer(
    a: ndarray,
    a_adv: ndarray,
    w: ndarray,
    b: ndarray,
    y: ndarray,
    t: ndarray,
    over: str,
    power: int,
    top: float,
    scale: str,
    floor: float = 0.1,
    promotion: float = 1.0,
    suppression: float = 1.0,
) -> ndarray:
    """Σ relu(m)^q per sample, (N,)."""
    if over == "both":
        halves = [
            pse_regularizer(a, a_adv, w, b, y, t, part, power, top, scale, floor, promotion, suppression)
            for part in ("units", "positions")
        ]
        return sum(halves) / 2
    values = []
    for i in range(len(a)):
        p, s = contribution(a[i], a_adv[i], w, t[i]), -contribution(a[i], a_adv[i], w, y[i])
        m = promotion * p + suppression * s
        evidence = contribution(np.zeros_like(a[i]), a[i], w, t[i]) - contribution(np.zeros_like(a[i]), a[i], w, y[i])
        axes = {"units": (1, 2), "positions": (0,), "activations": ()}[over]
        gained = np.sort(np.maximum(m.sum(axes).ravel(), 0))[::-1]
        gained = gained[: max(1, round(top * len(gained)))]
        if scale == "share":
            gained = gained / (np.abs(evidence.sum(axes)).sum() + floor)
        elif scale == "margin":
            z = w @ a[i].mean((1, 2)) + b
            gained = gained / max(z[y[i]] - z[t[i]], floor)
        elif scale == "logits":
            z = w @ a[i].mean((1, 2)) + b
            gained = gained / (np.sqrt(np.sum((z - z.mean()) ** 2)) + floor)
        values.append((gained**power).sum())
    return np.array(values)


def sensitivity_regularizer(pairs: list[tuple[ndarray, ndarray]], omegas: list[ndarray]) -> ndarray:
    """Σ_l mean_k ω_k · mean|ΔA_k| / std_k per sample, (N,); one (a, a_adv) and one ω a layer."""
    total = np.zeros(len(pairs[0][0]))
    for (a, a_adv), omega in zip(pairs, omegas, strict=True):
        for i in range(len(a)):
            units = [omega[k] * np.mean(np.abs(a_adv[i, k] - a[i, k])) / np.std(a[:, k]) for k in range(a.shape[1])]
            total[i] += np.mean(units)
    return total


def omega(batches: list[tuple[ndarray, ndarray]]) -> ndarray:
    """ω after an epoch of batches: relative sensitivity over all its samples at once, scaled to mean 1."""
    v = relative_sensitivity(np.concatenate([a for a, _ in batches]), np.concatenate([b for _, b in batches]))
    return v / v.mean()


def cam_discrepancy(
    a: ndarray, a_adv: ndarray, w: ndarray, b: ndarray, y: ndarray, classes: int | None, scale: str, floor: float = 0.1
) -> ndarray:
    """‖ΔCAM_t0‖₁ + Σ_{c≠t0} q_c ‖ΔCAM_c‖₁ per sample, (N,); the sum over the most probable wrong classes only."""
    values = []
    for i in range(len(a)):
        z = w @ a_adv[i].mean((1, 2)) + b
        wrong = [c for c in range(len(z)) if c != y[i]]
        q = {c: np.exp(z[c]) / sum(np.exp(z[d]) for d in wrong) for c in wrong}
        shares = {y[i]: 1.0} | {c: q[c] for c in sorted(wrong, key=lambda c: -z[c])[:classes]}
        moved = sum(share * np.abs(cam(a_adv[i], w, c) - cam(a[i], w, c)).sum() for c, share in shares.items())
        clean = sum(share * np.abs(cam(a[i], w, c)).sum() for c, share in shares.items())
        values.append(moved if scale == "none" else moved / (clean + floor * a[i][0].size))
    return np.array(values)
