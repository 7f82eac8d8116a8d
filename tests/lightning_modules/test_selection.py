"""The best epoch: by hand, by the definition, and what is never it."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics import CatMetric, SumMetric

from glassarmor.lightning_modules.callbacks.checkpointing import Checkpoints, how_chosen
from glassarmor.lightning_modules.selection import OLD, Choice, Select, knows_nothing, standard_error

Y = torch.arange(100) % 2
CLEAN = torch.where(torch.arange(100) < 10, 1 - Y, Y)  # 90 % right, both answers given


def epoch(robust: Tensor | int, answers: Tensor = CLEAN) -> Tensor:
    """What an epoch's held-out images say: which attacked ones are right, the first so many by default."""
    right = torch.arange(100) < robust if isinstance(robust, int) else robust
    return torch.stack([Y, answers, right.long()], 1)


def chosen(rule: Select, *epochs: Tensor) -> Choice | None:
    found = None
    for number, held_out in enumerate(epochs):
        found = rule.next(found, number, held_out, 2)
    return found


ROBUST, CLEANLY = Select("robust", 1.0), Select("clean", 1.0)


def test_the_standard_error_of_paired_images_by_hand() -> None:
    """Of 100 differences one is 1 and three are −1: the mean is −0.02, the variance (4 − 100·0.02²)/99."""
    one, other = torch.ones(100, dtype=torch.bool), torch.ones(100, dtype=torch.bool)
    other[0], one[1:4] = False, False
    assert standard_error(one, other) == pytest.approx(math.sqrt((4 - 0.04) / 99 / 100))
    assert standard_error(one, one) == 0
    assert standard_error(one[:1], other[:1]) == 0


def test_the_latest_that_is_not_told_from_the_highest_is_taken() -> None:
    a = torch.arange(100) < 60
    b = a.clone()
    b[[0, 1, 2, 70, 71]] = ~b[[0, 1, 2, 70, 71]]  # 59: lost 3, won 2, a difference of 1 against an error of 2.2
    c = torch.arange(100) < 57  # lost 3, won none: 3 against 1.7
    found = chosen(ROBUST, epoch(50), epoch(a), epoch(b), epoch(c))
    assert found is not None
    assert (found.epoch, found.accuracy, found.highest_epoch, found.highest) == (
        2,
        pytest.approx(0.59),
        1,
        pytest.approx(0.6),
    )
    says = "epoch 2: latest within 1 standard error of the highest robust accuracy on 100 held-out images, 59.0 % "
    assert found.text() == f"{says}(60.0 % in epoch 1)"
    assert chosen(OLD, epoch(50), epoch(a), epoch(b), epoch(a)).epoch == 1, "the first of the highest"
    assert chosen(ROBUST, epoch(a), epoch(a)).epoch == 1, "of two that are alike the later"


@pytest.mark.parametrize("rule", [ROBUST, CLEANLY, OLD, Select("clean", None), Select("robust", 1e9)])
def test_a_net_that_guesses_is_never_the_best(rule: Select) -> None:
    one_class, coin = torch.zeros(100, dtype=torch.long), torch.where(torch.arange(100) < 48, 1 - Y, Y)
    for answers in (one_class, 1 - one_class, coin):
        guess = epoch(100, answers)
        assert knows_nothing(answers, Y, 2)
        assert chosen(rule, guess) is None
        assert chosen(rule, epoch(30), guess).epoch == 0
        assert chosen(rule, guess, epoch(0), guess, guess).epoch == 1, "however little the other withstands"


def test_a_run_that_attacks_nothing_is_chosen_by_clean_accuracy() -> None:
    better = torch.where(torch.arange(100) < 2, 1 - Y, Y)
    epochs = (epoch(60), epoch(20, better))
    config = {"by": None, "within": 1}
    found = chosen(Select.of(config, attacks=False), *epochs)
    assert (found.epoch, found.by, found.accuracy, found.robust) == (1, "clean", pytest.approx(0.98), pytest.approx(0.2))
    assert chosen(Select.of(config, attacks=True), *epochs).epoch == 0
    assert chosen(Select.of({"by": "robust"}, attacks=False), *epochs).epoch == 0
    assert Select.of(None, attacks=False) == OLD, "configs from before there was a choice"


RUNS = st.lists(st.lists(st.booleans(), min_size=100, max_size=100), min_size=1, max_size=6)


@given(RUNS, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_the_choice_is_the_latest_within_the_error_of_the_highest(rows: list[list[bool]], within: float) -> None:
    """Epoch by epoch it is what looking back at all of them gives; resumed from its state it is the same."""
    epochs = [epoch(torch.tensor(row)) for row in rows]
    right = [held_out[:, 2].bool() for held_out in epochs]
    sums = [int(row.sum()) for row in right]
    top = sums.index(max(sums))
    near = [
        i for i, row in enumerate(right) if (sums[top] - sums[i]) / 100 <= within * standard_error(right[top], row) + 1e-12
    ]
    rule, found = Select("robust", within), None
    for number, held_out in enumerate(epochs):
        found = rule.next(None if found is None else Choice(**found.state()), number, held_out, 2)
    assert found is not None
    assert (found.epoch, found.highest_epoch) == (max(i for i in near if i >= top), top)


def test_images_in_another_order_are_not_paired() -> None:
    first = ROBUST.next(None, 0, epoch(60), 2, processes=2)
    other = torch.arange(100) >= 41  # 59 others: as one order the error would be 10 points
    assert ROBUST.next(first, 1, epoch(other), 2, processes=2).epoch == 1
    assert ROBUST.next(first, 1, epoch(other), 2, processes=1) is first


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"by": "luck"}, r"select\.by: expected null, robust or clean; found 'luck'"),
        ({"within": -1}, r"select\.within: expected null or a finite number >= 0, found -1"),
        ({"within": True}, r"select\.within"),
        ({"within": float("nan")}, r"select\.within"),
        ({"best": 1}, r"select: expected by and within"),
        (3, r"select: expected by and within, such as .*; found 3"),
    ],
)
def test_bad_rules_are_refused(config: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Select.of(config, attacks=True)  # type: ignore[arg-type]


class Small(nn.Module):
    """What Checkpoints reads of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.num_classes = nn.Linear(1, 1), 2
        self.broken_logits, self.held_out = SumMetric(), CatMetric()


def end_of(kept: Checkpoints, number: int, module: Small, held_out: Tensor | None) -> None:
    trainer = SimpleNamespace(
        current_epoch=number, world_size=1, global_step=number, is_global_zero=True, sanity_checking=False,
        lightning_module=module, strategy=SimpleNamespace(broadcast=lambda value: value),
        save_checkpoint=lambda path: torch.save(
            {"callbacks": {"Checkpoints": {**kept.state_dict(), "generators": {}}}, "epoch": number}, path
        ),
    )  # fmt: skip
    module.broken_logits.update(0.0)
    if held_out is not None:
        module.held_out.reset()
        module.held_out.update(held_out.float())
        kept.on_validation_end(trainer, module)
    kept.on_train_epoch_end(trainer, module)


def test_an_epoch_without_a_validation_of_its_own_is_not_judged_by_an_older_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        "glassarmor.lightning_modules.callbacks.checkpointing.summed", lambda module: __import__("contextlib").nullcontext()
    )
    kept, module = Checkpoints(tmp_path, select=ROBUST), Small()
    held = [epoch(0, torch.zeros(100, dtype=torch.long)), epoch(60), None, epoch(40), None]
    best = []
    for number, held_out in enumerate(held):
        end_of(kept, number, module, held_out)
        best.append(torch.load(kept.best, weights_only=True)["epoch"] if kept.best.is_file() else None)
    assert best == [None, 1, 1, 1, 1]
    assert kept.best_score == pytest.approx(0.6)
    assert how_chosen(kept.best) == "epoch 1: highest robust accuracy on 100 held-out images, 60.0 %"
    again = Checkpoints(tmp_path)
    again.load_state_dict({**kept.state_dict()})
    assert again.choice is not None
    assert again.choice.text() == kept.choice.text()
    again.load_state_dict({"best_score": 0.4, "generators": {}})  # of a checkpoint from before
    assert again.best_score == 0.4
    assert OLD.next(again.choice, 3, epoch(40), 2) is again.choice
    assert OLD.next(again.choice, 3, epoch(41), 2).epoch == 3
