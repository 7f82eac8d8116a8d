"""Evidence axis and turning layer: closed forms."""

from __future__ import annotations

import torch

from interpret.profiles import evidence_position, pooled, turning_layer


def test_the_evidence_axis_is_zero_at_the_true_centroid_and_one_at_the_targets() -> None:
    start, end = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 4.0]])
    for features, expected in (([1.0, 0.0], 0.0), ([1.0, 4.0], 1.0), ([9.0, 1.0], 0.25), ([1.0, -4.0], -1.0)):
        assert evidence_position(torch.tensor([features]), start, end).item() == expected


def test_a_layer_is_pooled_over_positions_only() -> None:
    act = torch.arange(24.0).view(2, 3, 2, 2)
    assert torch.equal(pooled(act), act.mean((2, 3)))
    assert torch.equal(pooled(act[:, :, 0, 0]), act[:, :, 0, 0])


def test_the_turning_layer_is_the_first_from_which_the_adversarial_line_stays_over() -> None:
    clean = torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.9], [0.2, 0.2, 0.6, 0.2, 0.9], [0.1, 0.1, 0.2, 0.1, 0.9]])
    adv = torch.tensor([[0.7, 0.2, 0.2, 0.2, 0.9], [0.3, 0.8, 0.8, 0.3, 0.9], [0.9, 0.9, 0.9, 0.4, 0.9]])
    #  came back and left again → last; stays from 1; from 1, but there the clean line is over too → 2; never; clean over
    assert turning_layer(clean, adv).tolist() == [2, 1, 2, -1, -1]
