"""Captum and our own code answer alike where both apply, and Captum leaves the net as it was."""

from __future__ import annotations

import pytest
import torch
from captum import attr

from glassarmor.interpret.observation import observe
from glassarmor.interpret.signals import captum_bridge
from glassarmor.interpret.signals.cam import class_activation_map
from glassarmor.interpret.signals.pse import grid_regions, region_effects, unit_effects
from tests.reference.nets import Linear, Residual, batch, conv_bn, unchanged, untidy
from tests.reference.trained import attacked


@pytest.mark.parametrize("make", [conv_bn, Residual])
@pytest.mark.parametrize("chunk", [1, 7, 128])
def test_region_effects_equal_feature_ablation_for_both_labels(make, chunk):
    net = untidy(make())
    x, x_adv, y = batch(n=3)
    target = (y + 1) % 5
    regions = grid_regions(8, 8, (3, 2))
    with unchanged(net):
        changes = captum_bridge.region_logit_changes(net, x, x_adv, torch.stack([y, target], 1), regions, chunk)
    ours = region_effects(net, x, x_adv, y, target, regions)
    assert changes.shape == (3, 2, 6)
    torch.testing.assert_close(-changes[:, 0], ours.suppression, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(changes[:, 1], ours.promotion, rtol=1e-4, atol=1e-5)
    assert ours.promotion.abs().max() > 1e-2


@pytest.mark.parametrize("layer", ["act1", "act2"])
@pytest.mark.parametrize("label", ["true", "target"])
def test_cam_equals_gradient_times_activation_and_below_pooling_grad_cam(layer, label):
    net = conv_bn().eval()
    x, x_adv, y = batch()
    obs = observe(net, x, x_adv, y, layers=[layer])
    ours = class_activation_map(obs, layer, label, "adv").detach()
    untidy(net)
    with unchanged(net):
        averaged = captum_bridge.grad_cam(net, layer, x_adv, obs.labels(label))
    product = attr.LayerGradientXActivation(net.eval(), net.get_submodule(layer)).attribute(x_adv, target=obs.labels(label))
    torch.testing.assert_close(product.sum(1) * ours[0].numel(), ours, rtol=1e-4, atol=1e-5)
    same = torch.allclose(averaged * ours[0].numel(), ours, rtol=1e-4, atol=1e-5)
    assert same == (layer == "act2")


def test_grad_cam_is_signed():
    """Without Grad-CAM's ReLU: evidence against a class is evidence too."""
    net = conv_bn().eval()
    with torch.no_grad():
        net.head.weight.neg_()
    x, _, y = batch()
    assert captum_bridge.grad_cam(net, "act2", x, y).min() < -1e-3


@pytest.mark.parametrize("method", captum_bridge.METHODS)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_every_method_runs_and_leaves_the_net_alone(method, context):
    net = untidy(conv_bn(dropout=0.3))
    with context():
        x, _, y = batch(n=2)
        with unchanged(net):
            found = captum_bridge.attribute(net, x, y, method)
    assert found.shape == x.shape
    assert found.isfinite().all()
    assert found.abs().sum() > 0
    assert not found.requires_grad


@pytest.mark.parametrize("method", ["input_x_gradient", "integrated_gradients"])
def test_on_a_linear_net_attribution_is_weight_times_input(method):
    net = Linear((3, 8, 8), 5)
    x, _, y = batch()
    expected = net.head.weight.detach()[y].view_as(x) * x
    torch.testing.assert_close(captum_bridge.attribute(net, x, y, method), expected, rtol=1e-4, atol=1e-5)


def test_unknown_method():
    with pytest.raises(ValueError, match=r"method: expected one of saliency, .*; found 'tea leaves'"):
        captum_bridge.attribute(conv_bn(), torch.rand(1, 3, 8, 8), torch.tensor([0]), "tea leaves")


# Layers.


@pytest.mark.parametrize("method", captum_bridge.LAYER_METHODS)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_every_layer_method_runs_and_leaves_the_net_alone(method, context):
    net = untidy(conv_bn(dropout=0.3))
    own = {name: set(module.__dict__) for name, module in net.named_modules()}
    with context():
        x, x_adv, y = batch(n=2)
        with unchanged(net):
            found = captum_bridge.attribute_layer(net, "act2", x_adv, y, method, baselines=x)
    assert found.shape == (2, 1 if method == "grad_cam" else 8, 4, 4)
    assert found.isfinite().all()
    assert found.abs().sum() > 0
    assert {name: set(module.__dict__) for name, module in net.named_modules()} == own  # DeepLift leaves tensors


@pytest.mark.parametrize("method", ["conductance", "deep_lift", "feature_ablation"])
def test_from_the_clean_image_below_a_linear_head_they_are_our_promotion(method):
    net, x, x_adv, y, target = attacked(n=3)
    ours = unit_effects(observe(net, x, x_adv, y, target=target, layers=["act2"]), "act2")
    theirs = captum_bridge.attribute_layer(net, "act2", x_adv, target, method, baselines=x)
    # Ablation gives each position its unit's whole effect; paths and multipliers give it its own part.
    units = theirs.mean((2, 3)) if method == "feature_ablation" else theirs.sum((2, 3))
    torch.testing.assert_close(units, ours.promotion.detach(), rtol=1e-3, atol=1e-3)


def test_unknown_layer_method():
    with pytest.raises(ValueError, match=r"method: expected one of conductance, .*; found 'tea leaves'"):
        captum_bridge.attribute_layer(conv_bn(), "act1", torch.rand(1, 3, 8, 8), torch.tensor([0]), "tea leaves")


# Our signals in Captum's shape.


@pytest.mark.parametrize("label", ["tensor", "number"])
def test_region_effect_stands_in_for_feature_ablation(label):
    net = conv_bn().eval()
    x, x_adv, y = batch(n=3)
    target = y if label == "tensor" else 2
    regions = grid_regions(8, 8, (3, 2))
    theirs = attr.FeatureAblation(net).attribute(x_adv, baselines=x, target=target, feature_mask=regions[None, None])
    ours = captum_bridge.RegionEffect(net)
    assert isinstance(ours, attr.Attribution)
    torch.testing.assert_close(
        ours.attribute(x_adv, baselines=x, target=target, feature_mask=(3, 2)), theirs.detach(), rtol=1e-4, atol=1e-5
    )
    regions[0, 0] = -1
    assert (ours.attribute(x_adv, target=target, feature_mask=regions)[:, :, 0, 0] == 0).all()


def test_unit_conductance_stands_in_for_layer_conductance():
    net, x, x_adv, _, target = attacked(n=3)
    theirs = attr.LayerConductance(net, net.act1).attribute(x_adv, baselines=x, target=target, n_steps=200)
    ours = captum_bridge.UnitConductance(net, net.act1)
    assert isinstance(ours, attr.LayerAttribution)
    found = ours.attribute(x_adv, baselines=x, target=target, n_steps=50)
    assert found.shape == theirs.shape
    assert (found - theirs).abs().max() < 0.02 * theirs.abs().max()
