"""Statistics of an ablation in float64: the seed is the unit, examples vary within it, candidates are many.

Pure functions of accuracies and correctness; nothing here knows of runs or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

EXACT_SEEDS = 20  # up to here every sign flip is counted: 2^20 sums take a second


@dataclass(frozen=True)
class Paired:
    """Mean difference over seeds in the unit of what was compared, its confidence interval and p-values (two-sided).

    ``p`` is Student's, ``p_flip`` the exact sign-flip permutation's, which needs no normal differences but cannot fall
    below 2^(1 − n); it stands in for ``p`` where all differences are alike.  With one seed nothing but the mean is known:
    the rest is NaN.
    """

    mean: float
    std: float
    low: float
    high: float
    p: float
    p_flip: float
    seeds: int


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n − 1) over seeds; the latter is NaN for one seed, both for none."""
    found = np.asarray(values, np.float64)
    return (
        float(found.mean()) if found.size else float("nan"),
        float(found.std(ddof=1)) if found.size > 1 else float("nan"),
    )


def paired(candidate: Sequence[float], baseline: Sequence[float], level: float = 0.95) -> Paired:
    """Candidate − baseline, seed by seed: Student's t on the n differences (Student 1908), n − 1 degrees of freedom.

    Args:
        candidate, baseline: (n,) results of the same seeds, in the same order.
        level: of the confidence interval, in (0, 1).

    Raises:
        ValueError: lengths that differ, nothing to compare, or another level.
    """
    if len(candidate) != len(baseline) or not len(candidate):
        raise ValueError(f"paired: expected as many results on both sides, found {len(candidate)} and {len(baseline)}")
    if not 0 < level < 1:
        raise ValueError(f"paired: expected a level in (0, 1), found {level!r}")
    differences = np.asarray(candidate, np.float64) - np.asarray(baseline, np.float64)
    n, (mean, std) = len(differences), mean_std(list(differences))
    if n == 1:
        unknown = float("nan")
        return Paired(mean, unknown, unknown, unknown, unknown, unknown, 1)
    p_flip = sign_flip_p(differences) if n <= EXACT_SEEDS else float("nan")  # as precise as Student's by then
    if std / np.sqrt(n) <= 1e-12 * max(1.0, abs(mean)):
        # Small test sets make all differences alike by chance; an infinite t would then claim p = 0.
        return Paired(mean, std, mean, mean, p_flip, p_flip, n)
    student = stats.ttest_1samp(differences, 0.0)
    low, high = student.confidence_interval(level)
    return Paired(mean, std, float(low), float(high), float(student.pvalue), p_flip, n)


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of "each difference is symmetric about 0" (Fisher 1935): share of the 2^n flips whose sum is as large.

    ``scipy.stats.permutation_test`` gives the same, but refuses one difference and takes 13 s for 20 of them (0.02 s here).

    Raises:
        ValueError: no difference, or more than ``EXACT_SEEDS``.
    """
    found = np.asarray(differences, np.float64)
    if not 1 <= found.size <= EXACT_SEEDS:
        raise ValueError(f"sign flips: expected 1 to {EXACT_SEEDS} differences, found {found.size}")
    sums = np.zeros(1)
    for value in found:  # doubling keeps this 2^n sums, not an n × 2^n table
        sums = np.concatenate([sums + value, sums - value])
    largest = np.abs(found).sum()
    return float((np.abs(sums) >= abs(found.sum()) - 1e-12 * max(1.0, largest)).mean())


def bootstrap_interval(
    candidate: Sequence[np.ndarray],
    baseline: Sequence[np.ndarray],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the mean paired difference of accuracy: seeds are drawn again, and examples within each.

    The hierarchical bootstrap (Davison & Hinkley 1997, ch. 3): it also holds the chance of which images were
    tested, which the t interval over seeds that share a test set does not.

    Args:
        candidate, baseline: by seed, correctness (N,) of the same examples in the same order.

    Raises:
        ValueError: seeds or examples that do not match.
    """
    if len(candidate) != len(baseline) or not len(candidate):
        raise ValueError(f"bootstrap: expected as many seeds on both sides, found {len(candidate)} and {len(baseline)}")
    if any(len(a) != len(b) or not len(a) for a, b in zip(candidate, baseline, strict=True)):
        raise ValueError("bootstrap: expected the same examples on both sides of every seed")
    generator = np.random.default_rng(seed)
    # Per example the difference is −1, 0 or 1, so a drawn sample is a multinomial count of these: no table of indices.
    shares = np.array(
        [
            [np.mean(difference == value) for value in (-1, 0, 1)]
            for difference in (np.asarray(a, int) - np.asarray(b, int) for a, b in zip(candidate, baseline, strict=True))
        ]
    )
    sizes = np.array([len(a) for a in candidate])
    chosen = generator.integers(0, len(sizes), (draws, len(sizes)))
    counts = generator.multinomial(sizes[chosen], shares[chosen])
    means = ((counts[..., 2] - counts[..., 0]) / sizes[chosen]).mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down adjusted p-values, in the order given; NaN counts as no test and stays NaN."""
    values = np.asarray(p, np.float64)
    adjusted = np.full(values.shape, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * values[order]))
    return [float(value) for value in adjusted]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (clean, robust) that no other dominates, by rising clean accuracy; of equal points the first."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1], i))
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] > points[kept[-1]][1]:
            kept.append(i)
    return kept[::-1]


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float] = (0.0, 0.0)) -> float:
    """Area that the points dominate above ``reference`` (Zitzler & Thiele 1999), in the product of the two units."""
    area, right = 0.0, reference[0]
    for i in front([(max(c, reference[0]), max(r, reference[1])) for c, r in points]):
        clean, robust = max(points[i][0], reference[0]), max(points[i][1], reference[1])
        area += (clean - right) * (robust - reference[1])
        right = clean
    return area


def robust_at(points: Sequence[tuple[float, float]], clean: float) -> float:
    """What a front of (clean, robust) reaches in robust accuracy without going below this clean accuracy (ours).

    Linear between neighbours of the front, as a mixture of the two nets would be; left of it the point with the most
    robust accuracy, which has clean accuracy to spare; right of it NaN: the method was never seen there.
    """
    kept = [points[i] for i in front(points)]
    if not kept or clean > kept[-1][0]:
        return float("nan")
    return float(np.interp(clean, [c for c, _ in kept], [r for _, r in kept]))
