"""Our training methods train as plain loops written from the papers do: see tests/reference/loops.py for those."""

from __future__ import annotations

import statistics
import warnings

import pytest
import torch

from tests.reference.loops import Budget
from tests.reference.paired import BUDGET, METHODS, SIZES, Trained, trained

TINY = ("network.width=0.25", "data.train_limit=96", "data.test_limit=20", "data.batch_size=32")


@pytest.mark.long
@pytest.mark.parametrize("name", ["Free-AT", "N-FGSM", "NuAT"])
def test_the_first_steps_are_those_of_the_plain_loop(name: str) -> None:
    """Weight by weight, over every batch of some epochs: losses, attacks, draws, optimiser and schedule are the same."""
    found = trained(name, Budget(epochs=4 if name == "Free-AT" else 2, steps=2, eps=0.06), TINY)
    names = dict(found.ours.named_parameters())
    assert [key for key, p in names.items() if torch.equal(p, found.start.get_parameter(key))] == []
    for key, parameter in names.items():
        torch.testing.assert_close(parameter, found.plain.get_parameter(key), rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_accuracies_are_those_of_the_plain_loop(name: str) -> None:
    """Within 2 points of clean and PGD-20 accuracy in the mean of 3 seeds, on nets that have learned to resist."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
        runs: list[Trained] = [trained(name, BUDGET.seeded(seed), SIZES) for seed in range(3)]
    mean = {column: statistics.mean(run.points()[column] for run in runs) for column in runs[0].points()}
    assert mean["clean, plain"] > 80
    assert mean["PGD-20, plain"] > 40
    assert mean["clean, ours"] == pytest.approx(mean["clean, plain"], abs=2)
    assert mean["PGD-20, ours"] == pytest.approx(mean["PGD-20, plain"], abs=2)
