"""The profiles panel shows the profiles of the same net, for sequential and residual nets, and keeps to its sizes."""

from __future__ import annotations

import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from hydra import compose, initialize_config_dir
from torch import nn

from glassarmor.interpret.observation import observe
from glassarmor.interpret.profiles.profiles import activation_profiles
from glassarmor.interpret.signals.pse import PromotionSuppression
from glassarmor.interpret.signals.sensitivity import SensitivityControl
from glassarmor.interpret.views.charts import Profiles
from glassarmor.interpret.views.page.encode import encode
from glassarmor.interpret.views.panels.profiles import ProfilesPanel, _both
from glassarmor.interpret.views.view import Probe, View
from glassarmor.lightning_modules.networks.resnet import resnet18
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN
from tests.composing import CONFIGS


def probe_of(net: nn.Module, training: bool = True, n: int = 4) -> Probe:
    net.eval()
    x = torch.rand(n, 3, 32, 32)
    obs = observe(net, x, (x + 0.1 * torch.randn_like(x)).clamp(0, 1), torch.arange(n) % 3)
    pool = (torch.rand(30, 3, 32, 32), torch.arange(30) % 3) if training else None
    return Probe(net, obs, (), tuple(f"val-{i}" for i in range(n)), ("a", "b", "c"), {}, pool)


def chart_of(view: View) -> Profiles:
    return next(chart for chart in view.charts if isinstance(chart, Profiles))


def test_the_chart_holds_the_profiles_of_the_net() -> None:
    probe = probe_of(SmallCNN(num_classes=3, in_channels=3, mean=[0.5] * 3, std=[0.5] * 3, width=0.5))
    panel = ProfilesPanel(per_class=5, points=3, units=4)
    view = panel(probe)
    chart = chart_of(view)
    assert "normalize" not in chart.layers  # it has nothing to say but the image's mean colour
    assert chart.layers[-1] == "head"
    obs = observe(probe.net, probe.obs.clean.x, probe.obs.adv.x, probe.obs.y, target=probe.obs.target, layers=chart.layers)
    assert probe.training is not None
    found = activation_profiles(obs, panel.background(probe.net, probe.training, chart.layers))
    np.testing.assert_allclose(chart.position[0], found.clean, atol=1e-3)
    np.testing.assert_allclose(chart.position[-1], found.adv, atol=1e-3)
    assert chart.turning == tuple(found.turning.tolist())
    assert view.scalars["profiles/turned"] == pytest.approx(float((found.turning >= 0).float().mean()))
    drawn = {node.layer for node in chart.nodes if node.layer >= 0}
    assert drawn == set(range(len(chart.layers)))  # every layer of the flow can be picked in the Architecture View
    for layer, units in zip(chart.layers, chart.units, strict=True):
        assert units is not None
        act = obs.adv.acts[layer].detach()
        act = act if act.dim() == 4 else act[:, :, None, None]
        assert units.of == act.shape[1]
        for place, unit in enumerate(units.units):  # the map of a unit is that unit's, averaged over blocks
            assert units.values[2, 1, place].mean() == pytest.approx(float(act[2, unit].mean()), abs=1e-5)
    encoded = encode(chart)
    assert encoded.chart["units"][0]["of"] == 8
    assert len(encoded.blobs) > 0


def test_a_residual_net_is_drawn_with_its_branches() -> None:
    probe = probe_of(resnet18(num_classes=3, in_channels=3, mean=[0.5] * 3, std=[0.5] * 3), n=2)
    chart = chart_of(ProfilesPanel(per_class=3, points=2, units=2, most=20)(probe))
    assert {"layer1.0", "layer4.1"} <= set(chart.layers)
    assert len({(node.column, node.lane) for node in chart.nodes}) == len(chart.nodes)


def test_without_training_images_it_says_so() -> None:
    view = ProfilesPanel()(probe_of(SmallCNN(num_classes=3, in_channels=3, mean=[0.5] * 3, std=[0.5] * 3), training=False))
    assert view.charts == ()
    assert "given no training images" in view.headline


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"panels.profiles.points: expected a whole number >= 2, found 1"):
        ProfilesPanel(points=1)


def test_a_transformer_is_drawn_by_its_tokens() -> None:
    net = torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=3)
    view = ProfilesPanel(per_class=3, points=2)(probe_of(net))
    chart = chart_of(view)
    assert "encoder.layers.encoder_layer_1" in chart.layers
    assert np.isfinite(chart.position).all()
    assert any(answer.question == "next" for answer in view.answers)


def test_a_net_of_concatenated_branches_is_drawn() -> None:
    net = torchvision.models.DenseNet(4, (1, 1), 8, num_classes=3)
    chart = chart_of(ProfilesPanel(per_class=3, points=2, most=60)(probe_of(net)))
    assert any(node.kind == "concat" for node in chart.nodes)
    assert any(chart.nodes[b].column - chart.nodes[a].column > 1 for a, b in chart.edges)  # what goes around a layer
    assert np.isfinite(chart.position).all()


def test_a_third_of_the_units_are_those_that_move() -> None:
    """Four by the margin that they gain, two by how far the attack moves them beyond noise; none twice."""
    gain, movement = np.array([9.0, 8, 7, 6, 0, 0, 0, 0, 0]), np.array([9.0, 0, 0, 0, 1, 2, 3, 4, 0])
    assert _both(gain, movement, 6).tolist() == [0, 1, 2, 3, 7, 6]
    assert _both(gain[:3], movement[:3], 8).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("weight", "expected"), [(0.5, 0.5), ({"start": 0, "end": 2}, 2.0), (None, 1.0)])
def test_advice_knows_the_weights_in_use(weight: object, expected: float) -> None:
    assert ProfilesPanel(active={"pse": {"weight": weight, "top": 1.0}}).active == {"pse": expected}


def test_commands_of_the_page_are_whole() -> None:
    """What is copied from the page composes: a training run as it was with the words that change it, or an analysis."""
    turning, sides = torch.tensor([1] * 20 + [0]), torch.rand(21, 8)
    effects = PromotionSuppression(sides, sides, sides.sum(1), sides.sum(1))
    moved, still = torch.full((8,), 2.0), torch.zeros(8)
    control = SensitivityControl(moved, moved, still, still + 0.5, still.bool())
    net = SmallCNN(num_classes=3, in_channels=3, mean=[0.5] * 3, std=[0.5] * 3, width=0.5)
    probe = replace(probe_of(net), run="runs/a b", command="python train.py seed=3")
    panel = ProfilesPanel(active={"pse": {"weight": 0.5}})
    said = panel.advice(probe, ("stage1", "stage2"), turning, {"stage2": control}, {"stage2": effects})
    commands = [shlex.split(a.config) for a in said if a.config]
    assert [words[:2] for words in commands].count(["python", "evaluate.py"]) == 1
    for words in commands:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = compose(words[1].removesuffix(".py"), words[2:])
        if words[1] == "train.py":
            assert cfg.seed == 3
            assert "stage2" in {layer for term in cfg.regularizers.values() for layer in term.layers}
        else:
            assert (cfg.checkpoint, cfg.masking.by, list(cfg.masking.layers)) == ("runs/a b", "hand", ["stage2"])
            assert set(cfg.masking.units) <= set(range(8))
