"""Robust losses of one sample, float64, written from the papers; slow and obvious."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def softmax(z: Sequence[float]) -> list[float]:
    top = max(z)
    powers = [math.exp(v - top) for v in z]
    return [v / sum(powers) for v in powers]


def cross_entropy(z: Sequence[float], y: int, smoothing: float = 0.0) -> float:
    """−Σ_c q_c log p_c with q = (1 − s)·onehot + s/K."""
    p, k = softmax(z), len(z)
    return -sum(((1 - smoothing) * (c == y) + smoothing / k) * math.log(p[c]) for c in range(k))


def kl(z: Sequence[float], z_adv: Sequence[float]) -> float:
    """TRADES (1901.08573): KL(p(x) ‖ p(x')) = Σ_c p_c(x) · log(p_c(x) / p_c(x'))."""
    return sum(p * math.log(p / q) for p, q in zip(softmax(z), softmax(z_adv), strict=True))


def mart_bce(z: Sequence[float], y: int) -> float:
    """MART (ICLR 2020), eq. 7: −log p_y − log(1 − max_{c≠y} p_c)."""
    p = softmax(z)
    return -math.log(p[y]) - math.log(1 - max(p[c] for c in range(len(z)) if c != y))


def mart_kl(z: Sequence[float], z_adv: Sequence[float], y: int) -> float:
    """MART, eq. 9: KL(p(x) ‖ p(x')) · (1 − p_y(x))."""
    return kl(z, z_adv) * (1 - softmax(z)[y])


def logit_pairing(z: Sequence[float], z_adv: Sequence[float]) -> float:
    """ALP (1803.06373): squared distance of the logits."""
    return sum((a - b) ** 2 for a, b in zip(z, z_adv, strict=True))


def margin(z: Sequence[float], y: int) -> float:
    return max(z[c] for c in range(len(z)) if c != y) - z[y]


def nuclear_norm(z: np.ndarray, z_adv: np.ndarray) -> float:
    """NuAT (NeurIPS 2021): sum of the singular values of the N × K difference, divided by N as in the released code.

    As the trace of the root of DᵀD, from its eigenvalues.
    """
    d = z_adv.astype(np.float64) - z.astype(np.float64)
    return float(np.sqrt(np.clip(np.linalg.eigvalsh(d.T @ d), 0, None)).sum() / len(d))


def linear_gradient(w: np.ndarray, b: np.ndarray, x: np.ndarray, y: int) -> tuple[float, np.ndarray]:
    """Cross-entropy of Z = Wx + b and its input gradient Wᵀ(p − onehot)."""
    z = (w @ x + b).tolist()
    p = np.array(softmax(z))
    return cross_entropy(z, y), w.T @ (p - np.eye(len(p))[y])


def grad_align(w: np.ndarray, b: np.ndarray, x: np.ndarray, eta: np.ndarray, y: int) -> float:
    """2007.02617: 1 − cos(∇ℓ(x), ∇ℓ(x + η))."""
    (_, g), (_, h) = linear_gradient(w, b, x, y), linear_gradient(w, b, x + eta, y)
    return float(1 - (g @ h) / np.sqrt((g @ g) * (h @ h)))


def local_linearity(w: np.ndarray, b: np.ndarray, x: np.ndarray, delta: np.ndarray, y: int) -> tuple[float, float]:
    """1907.02610: g(δ; x) = |ℓ(x+δ) − ℓ(x) − δᵀ∇ℓ(x)|, and |δᵀ∇ℓ(x)|."""
    (value, g), (moved, _) = linear_gradient(w, b, x, y), linear_gradient(w, b, x + delta, y)
    return abs(moved - value - delta @ g), abs(float(delta @ g))
