"""How sure an accuracy on so many images is, and which images to take where not all are judged."""

from __future__ import annotations

import torch
from scipy.stats import binom, binomtest
from torch import Tensor


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927): the p for which the observed share is not unusual, both ends in [0,1].

    It holds for images drawn independently.  For a subset with the classes' shares kept it is a little too wide.

    Raises:
        ValueError: no image, more successes than images, or a confidence outside (0, 1).
    """
    if not (n >= 1 and 0 <= successes <= n):
        raise ValueError(f"interval: expected 0..n successes among n >= 1, found {successes} among {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"interval.confidence: expected a number in (0, 1), found {confidence!r}")
    found = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def luck(answers: Tensor, y: Tensor, classes: int) -> float:
    """Probability that a guesser has as many right as these answers (N,) to images with labels y (N,).

    The guesser does not look at the images: it gives answers as frequent as these, be they one constant answer, or
    draws one of the ``classes``, whichever is right more often.
    """
    labels, given = (torch.bincount(values.cpu(), minlength=classes).double() for values in (y, answers))
    chance = max(float(labels @ given) / len(y) ** 2, 1 / classes)
    return float(binom.sf(int((answers == y).sum()) - 1, len(y), chance))


def stratified_rows(labels: Tensor, n: int, seed: int = 0) -> Tensor:
    """``n`` increasing int64 indices, drawn at random with the classes in their shares (to within one image of each).

    Raises:
        ValueError: n outside 1..N.
    """
    if not isinstance(n, int) or not 1 <= n <= len(labels):
        raise ValueError(f"subset: expected 1 to {len(labels)} images, found {n!r}")
    labels = labels.cpu()
    counts = torch.bincount(labels)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    grouped = shuffled[labels[shuffled].argsort(stable=True)]  # class after class, random within each
    rank = torch.empty_like(labels)
    rank[grouped] = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    quota = n * counts / len(labels)
    whole = quota.floor().long()
    # What rounding left over goes to the largest remainders.
    whole[(quota - whole).argsort(descending=True, stable=True)[: n - int(whole.sum())]] += 1
    return (rank < whole[labels]).nonzero().flatten()
