"""The interpretation summary of a card: every number of every panel, with its unit, and no bare keys."""

from __future__ import annotations

from glassarmor.interpret.views.summary import summarised

VALUES = {
    "pse/share_inactive": 0.2,
    "pse/share_suppression": 0.4,
    "pse/share_promotion": 0.1,
    "pse/share_balanced": 0.3,
    "pse/promotion": 0.50481,
    "pse/suppression": 0.94612,
    "pse/gap": 0.1366,
    "profiles/turned": 0.3,
    "profiles/coverage": 0.95,
    "profiles/turning/stage1": 0.1,
    "profiles/turning/stage2.0": 0.2,
    "profiles/divergence/stage2.0": 0.25,
    "sensitivity/attack/stage1": 0.08,
    "sensitivity/noise/stage1": 0.02,
    "sensitivity/attack_sensitive/stage1": 0.75,
    "dissection/detectors/texture": 2.0,
    "dissection/detectors/position": 25.0,
    "mine/other": 0.123456,
}


def test_kinds_turning_layer_units_and_detectors_are_told_with_their_units() -> None:
    sentences, tables = summarised(VALUES)
    text = "\n".join(sentences)
    # Shares are of what the attack moves: 0.4, 0.1 and 0.3 of 0.8.
    assert "50.0 % are dominated by suppression of the true class, 12.5 % by promotion of the target, 37.5 % by both" in text
    assert "promotion 0.505 logits, suppression 0.946 logits" in text
    assert "30.0 % of the images cross over to the target's side, most often at stage2.0 (20.0 % of all)" in text
    assert "position 25, texture 2." in text
    profiles, units = tables
    assert [list(row) for row in profiles[1]] == [["stage1", "10.0 %", "–"], ["stage2.0", "20.0 %", "0.25 of their length"]]
    assert list(units[1][0]) == ["stage1", "0.08 σ", "0.02 σ", "75.0 %"]
    assert sentences[-1] == "mine/other: 0.1235", "what no sentence knows is still told"
    assert summarised({}) == ([], [])
