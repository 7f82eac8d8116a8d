"""CAM: Zhou's map, its mean is the logit, one scale for clean and adversarial, true gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glassarmor.interpret.observation import observe
from glassarmor.interpret.signals.cam import cam_change, class_activation_map
from tests.reference import differences
from tests.reference import signals as reference
from tests.reference.nets import batch, conv_bn


@pytest.mark.parametrize("mode", ["eval", "joined", "shared"])
@pytest.mark.parametrize("label", ["true", "target"])
@pytest.mark.parametrize("side", ["adv", "clean"])
def test_equals_zhou_and_its_mean_plus_bias_is_the_logit(mode, label, side):
    net = conv_bn().train(mode != "eval")
    x, x_adv, y = batch()
    obs = observe(net, x, x_adv, y, layers=["act2"], joined=mode == "joined")
    maps = class_activation_map(obs, "act2", label, side)
    w, acts = net.head.weight.detach().double().numpy(), obs.side(side).acts["act2"].detach().double().numpy()
    expected = np.stack([reference.cam(a, w, c) for a, c in zip(acts, obs.labels(label), strict=True)])
    np.testing.assert_allclose(maps.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps.mean((1, 2)) + net.head.bias[obs.labels(label)], obs.logit(label, side))


def test_change_is_the_signed_difference():
    net = conv_bn().eval()
    x, x_adv, y = batch()
    obs = observe(net, x, x_adv, y, layers=["act1"])
    for label in ("true", "target"):
        ends = [class_activation_map(obs, "act1", label, side) for side in ("adv", "clean")]
        assert torch.equal(cam_change(obs, "act1", label), ends[0] - ends[1])
    assert cam_change(obs, "act1").min() < 0 < cam_change(obs, "act1").max()


def test_a_flat_layer_has_no_map():
    net = conv_bn().eval()
    x, x_adv, y = batch()
    obs = observe(net, x, x_adv, y, layers=["head"])
    with pytest.raises(ValueError, match=r"layers: 'head' gives .*no positions that form a map"):
        class_activation_map(obs, "head")


SIGNALS = {
    "true adv": lambda obs, layer: class_activation_map(obs, layer, "true", "adv"),
    "target clean": lambda obs, layer: class_activation_map(obs, layer, "target", "clean"),
    "change": lambda obs, layer: cam_change(obs, layer),
}


@pytest.mark.parametrize(("mode", "signal"), differences.every(*SIGNALS))
@pytest.mark.parametrize("layer", ["act1", "act2"])
def test_gradients_are_true(mode, signal, layer, double_precision):
    net, observed = differences.setting(mode)
    differences.check(net, lambda: differences.weighted(SIGNALS[signal](observed(), layer)))
