"""APGD, one image at a time, in float64, written from Croce & Hein 2020 (2003.01690), algorithm 1; slow and obvious."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Array = np.ndarray


def marks(steps: int) -> list[int]:
    """⌈p_j N⌉ with p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j − p_{j−1} − 0.03, 0.06), in hundredths to be exact."""
    p = [0, 22]
    while p[-1] + max(p[-1] - p[-2] - 3, 6) <= 100:
        p.append(p[-1] + max(p[-1] - p[-2] - 3, 6))
    return [math.ceil(hundredths * steps / 100) for hundredths in p[1:]]


def projected(x: Array, z: Array, eps: float, p: float) -> Array:
    if p == np.inf:
        return np.clip(np.clip(z, x - eps, x + eps), 0, 1)
    delta = z - x
    length = np.sqrt((delta**2).sum())
    if length > eps * (1 - 1e-6):
        delta = delta * eps * (1 - 1e-6) / length
    return np.clip(x + delta, 0, 1)


def direction(gradient: Array, p: float) -> Array:
    if p == np.inf:
        return np.sign(gradient)
    return gradient / np.sqrt((gradient**2).sum())


def apgd(
    f: Callable[[Array], float], gradient: Callable[[Array], Array], x: Array, start: Array, eps: float, steps: int, p: float
) -> tuple[Array, float, list[float]]:
    """The best point, its value, and the step size after each iteration; no momentum where the ascent went back."""
    eta, rho, alpha = 2 * eps, 0.75, 0.75
    points, values = [start], [f(start)]
    previous = start
    best, best_value = start, values[0]
    sizes: list[float] = []
    last, rises, halved_before, best_before = 0, 0, False, values[0]
    current, value = start, values[0]
    for k in range(steps):
        z = projected(x, current + eta * direction(gradient(current), p), eps, p)
        if k > 0:
            z = projected(x, current + alpha * (z - current) + (1 - alpha) * (current - previous), eps, p)
        previous, current = current, z
        new = f(current)
        rises += new > value
        value = new
        points.append(current)
        values.append(value)
        if value > best_value:
            best, best_value = current, value
        if k + 1 in marks(steps):
            first = rises < rho * (k + 1 - last)
            second = not halved_before and best_value <= best_before
            halved_before, best_before = first or second, best_value
            if halved_before:
                eta /= 2
                current = previous = best
                value = best_value
            last, rises = k + 1, 0
        sizes.append(eta)
    return best, best_value, sizes
