"""The interpretation summary of a card: every number of every panel, with its unit, and no bare keys."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from glassarmor.datamodules.concepts import procedural_concepts
from glassarmor.interpret.observation import observe
from glassarmor.interpret.views.panels.attribution import AttributionPanel
from glassarmor.interpret.views.panels.cam import CAMPanel
from glassarmor.interpret.views.panels.dissection import DissectionPanel
from glassarmor.interpret.views.panels.failures import FailuresPanel
from glassarmor.interpret.views.panels.outcome import OutcomePanel
from glassarmor.interpret.views.panels.profiles import ProfilesPanel
from glassarmor.interpret.views.panels.pse import PSEPanel
from glassarmor.interpret.views.panels.restoration import RestorationPanel
from glassarmor.interpret.views.panels.sensitivity import SensitivityPanel
from glassarmor.interpret.views.panels.units import UnitsPanel
from glassarmor.interpret.views.summary import summarised
from glassarmor.interpret.views.view import Probe

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


def test_no_number_of_the_panels_is_left_to_its_bare_name() -> None:
    torch.manual_seed(0)
    x = torch.rand(6, 1, 8, 8)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        y = net(x).argmax(1)
    obs = observe(net, x, (x + 0.4 * torch.randn_like(x)).clamp(0, 1), y, layers=["1"])
    training = (torch.rand(12, 1, 8, 8), torch.arange(12) % 3)
    probe = Probe(net, obs, ("1",), tuple("abcdef"), ("a", "b", "c"), {}, training)
    panels = (
        OutcomePanel(),
        FailuresPanel(),
        PSEPanel(),
        RestorationPanel(),
        UnitsPanel(),
        SensitivityPanel(),
        DissectionPanel(partial(procedural_concepts, count=40)),
        ProfilesPanel(per_class=2, points=2),
        CAMPanel(),
        AttributionPanel(),
    )
    values = {key: 0.5 for panel in panels for key in panel(probe).scalars}
    assert len(values) > 40
    sentences, tables = summarised(values)
    assert [text for text in sentences if text.split(":")[0] in values] == []
    assert len(tables) == 3
