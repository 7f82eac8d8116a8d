"""Our suites on networks that others published with bounds; skipped where the weights are not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks.validation import PUBLISHED, Published, bounds, cnn_a, judged
from glassarmor.defenses import evaluate_robustness

DATA = Path(os.environ.get("PUBLISHED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data" / "published"))
HERE = pytest.mark.skipif(not DATA.is_dir(), reason="no published weights; PUBLISHED_DATA names their folder")


def test_bounds_are_counted_in_images() -> None:
    of = Published("x", "", "", lambda: cnn_a(1), PUBLISHED[0].threat, upper=76.5, certified=76.0)
    assert bounds(of, 153, 200) == "+1 to 152, +0 to 153"
    assert bounds(of, 151, 200) == "-1 to 152, -2 to 153: BELOW"
    for net, channels, size in ((cnn_a(1), 1, 28), (cnn_a(3), 3, 32), (PUBLISHED[2].make(), 3, 32)):
        assert net(torch.rand(2, channels, size, size)).shape == (2, 10)


@HERE
@pytest.mark.long
@pytest.mark.parametrize("of", PUBLISHED[:2], ids=lambda of: of.name)
def test_the_published_bounds_hold_for_fast_and_for_strong(of: Published) -> None:
    """Never below what is certified; fast two images above the best published attack at most, strong none."""
    certified, upper = round(2 * of.certified), round(2 * of.upper)
    fast, strong = (judged(of, DATA, suite, 200) for suite in ("fast", "strong"))
    assert certified <= int(fast.standing.sum()) <= upper + 2
    assert certified <= int(strong.standing.sum()) <= upper
    standard = round(strong.attacks[3].accuracy * 200)
    assert int(strong.standing.sum()) <= standard
    if "CIFAR" in of.name:
        assert int(strong.standing.sum()) < standard, "the margin starts fell what AutoAttack leaves"


@HERE
@pytest.mark.long
def test_the_sampled_network_lies_between_its_bounds() -> None:
    of = PUBLISHED[2]
    found = judged(of, DATA, "fast", 1000)
    assert 100 * found.interval[1] >= 26.88
    assert 100 * found.interval[0] <= 54.82
    net, x, y = of.load(DATA, 100)
    same = evaluate_robustness(net, x, y, of.threat, "probe")
    assert same.n == 100
