"""Statistics of ablations against scipy, closed forms, brute force, and simulations under the null."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from glassarmor.interpret.statistics import (
    bootstrap_interval,
    front,
    holm,
    hypervolume,
    mean_std,
    paired,
    robust_at,
    sign_flip_p,
)

ACCURACY = st.floats(0, 1, allow_nan=False)
POINTS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=7)


def test_paired_equals_scipy() -> None:
    a, b = np.random.default_rng(0).normal([[1.0], [0.6]], 0.5, (2, 6))
    found, expected = paired(list(a), list(b), 0.9), stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.9)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-12)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert (found.mean, found.std) == pytest.approx(((a - b).mean(), (a - b).std(ddof=1)))
    flips = stats.permutation_test((a - b,), lambda d: d.sum(), permutation_type="samples", n_resamples=np.inf)
    assert found.p_flip == pytest.approx(flips.pvalue)


def test_paired_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, std 1, t = 2√3 on 2 degrees of freedom, where P(|T| > t) = 1 − t/√(t² + 2)."""
    found = paired([2, 4, 6], [1, 2, 3])
    t = 2 * math.sqrt(3)
    assert (found.mean, found.std, found.seeds) == (2, 1, 3)
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert found.p_flip == 2 / 8  # no flip but all of them is as large
    assert found.high - 2 == pytest.approx(2 - found.low) == pytest.approx(4.302652729911275 / math.sqrt(3))


def test_one_seed_knows_no_variance_and_equal_seeds_no_doubt() -> None:
    one = paired([0.5], [0.4])
    assert one.mean == pytest.approx(0.1)
    assert all(math.isnan(value) for value in (one.std, one.low, one.high, one.p, one.p_flip))
    assert mean_std([3.0])[0] == 3
    assert math.isnan(mean_std([3.0])[1])
    assert all(map(math.isnan, mean_std([])))
    assert paired([1, 1, 1], [1, 1, 1]).p == paired([1, 1, 1], [1, 1, 1]).p_flip == 1
    assert paired([0.3, 0.4, 0.5], [0.1, 0.2, 0.3]).p == 0.25  # alike but for rounding: no claim of p = 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: paired([1], [1, 2]), "found 1 and 2"),
        (lambda: paired([], []), "found 0 and 0"),
        (lambda: paired([1], [1], 95), r"level in \(0, 1\), found 95"),
        (lambda: sign_flip_p([]), "1 to 20 differences, found 0"),
        (lambda: sign_flip_p([1.0] * 21), "found 21"),
        (lambda: bootstrap_interval([np.ones(3)], []), "found 1 and 0"),
        (lambda: bootstrap_interval([np.ones(3)], [np.ones(2)]), "same examples"),
    ],
)
def test_what_cannot_be_compared(call, words) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.long
@pytest.mark.parametrize("seeds", [3, 5])
def test_p_values_under_the_null_are_uniform(seeds: int) -> None:
    draws = np.random.default_rng(seeds).normal(size=(4000, seeds))
    found = [paired(list(row), [0.0] * seeds) for row in draws]
    assert stats.kstest([f.p for f in found], "uniform").pvalue > 0.01
    covered = np.mean([f.low <= 0 <= f.high for f in found])
    assert covered == pytest.approx(0.95, abs=0.012)
    # The permutation p takes 2^(n−1) values, each as often: P(p ≤ k / 2^(n−1)) = k / 2^(n−1).
    levels = 2 ** (seeds - 1)
    for k in range(1, levels + 1):
        assert np.mean([f.p_flip <= k / levels + 1e-9 for f in found]) == pytest.approx(k / levels, abs=0.03)


@given(st.lists(st.floats(-5, 5, allow_nan=False), min_size=1, max_size=7))
def test_sign_flips_count_every_flip(differences: list[float]) -> None:
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    expected = sum(value >= abs(sum(differences)) - 1e-9 for value in sums) / len(sums)
    assert sign_flip_p(differences) == pytest.approx(expected)


def test_holm_by_hand_and_in_the_order_given() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1, 1]
    assert holm([]) == []
    with_gap = holm([0.02, float("nan"), 0.03])
    assert with_gap[::2] == [0.04, 0.04]
    assert math.isnan(with_gap[1])


@given(st.lists(ACCURACY, min_size=1, max_size=8))
def test_holm_never_helps_keeps_the_order_and_is_below_bonferroni(p: list[float]) -> None:
    adjusted = holm(p)
    for before, after in zip(p, adjusted, strict=True):
        assert before <= after <= min(1, len(p) * before) + 1e-12
    assert [adjusted[i] for i in np.argsort(p, kind="stable")] == sorted(adjusted)
    assert holm(p[::-1]) == pytest.approx(adjusted[::-1])


def test_holm_keeps_the_chance_of_any_false_discovery() -> None:
    """Ten true nulls: some p is below 0.05 in about 40 % of studies, and below it after Holm in 5 %."""
    p = np.random.default_rng(0).uniform(size=(4000, 10))
    assert np.mean(p.min(1) < 0.05) > 0.38
    assert np.mean([min(holm(list(row))) < 0.05 for row in p]) == pytest.approx(0.05, abs=0.01)


@given(POINTS)
def test_a_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    def dominated(i: int) -> bool:
        (c, r) = points[i]
        better = [(points[j] != (c, r) or j < i) and points[j][0] >= c and points[j][1] >= r for j in range(len(points))]
        return any(better)

    found = front(points)
    assert sorted(found) == [i for i in range(len(points)) if not dominated(i)]
    assert [points[i][0] for i in found] == sorted({points[i][0] for i in found})


@given(POINTS)
def test_hypervolume_counts_the_dominated_cells(points: list[tuple[int, int]]) -> None:
    for low in (0, 3):
        cells = sum(any(c > i and r > j for c, r in points) for i in range(low, 8) for j in range(low, 8))
        assert hypervolume(points, (low, low)) == cells


def test_robust_accuracy_at_equal_clean_accuracy() -> None:
    base = [(0.8, 0.2), (0.6, 0.4), (0.7, 0.1)]  # the last is dominated
    assert robust_at(base, 0.7) == pytest.approx(0.3)
    assert robust_at(base, 0.6) == pytest.approx(0.4)
    assert robust_at(base, 0.5) == 0.4  # the most robust point has clean accuracy to spare
    assert math.isnan(robust_at(base, 0.81))
    assert math.isnan(robust_at([], 0.5))


def correct(rate: float, examples: int, generator: np.random.Generator) -> np.ndarray:
    return generator.uniform(size=examples) < rate


def test_the_bootstrap_equals_the_slow_one() -> None:
    generator = np.random.default_rng(1)
    a, b = ([correct(rate, 60, generator) for _ in range(4)] for rate in (0.6, 0.5))
    slow = []
    for _ in range(4000):
        drawn = []
        for s in generator.integers(0, 4, 4):
            i = generator.integers(0, 60, 60)
            drawn.append(a[s][i].mean() - b[s][i].mean())
        slow.append(np.mean(drawn))
    assert bootstrap_interval(a, b, draws=8000) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.01)


def test_the_bootstrap_sees_examples_and_seeds() -> None:
    """The same seeds with a tenth of the examples have a wider interval; so have seeds that differ more."""
    generator = np.random.default_rng(2)

    def width(rates: list[float], examples: int) -> float:
        a = [correct(rate, examples, generator) for rate in rates]
        low, high = bootstrap_interval(a, [correct(0.5, examples, generator) for _ in rates])
        return high - low

    assert width([0.5] * 4, 100) > 2 * width([0.5] * 4, 1000)
    assert width([0.2, 0.4, 0.6, 0.8], 1000) > 2 * width([0.5] * 4, 1000)
    same = [correct(0.5, 50, generator)]
    assert bootstrap_interval(same, same) == (0, 0)
    assert bootstrap_interval(same, same, seed=3) == (0, 0)


def test_more_seeds_than_sign_flips_can_be_counted_keep_students_p() -> None:
    found = paired([0.5 + 0.001 * i for i in range(21)], [0.4] * 21)
    assert math.isnan(found.p_flip)
    assert found.p < 1e-6
