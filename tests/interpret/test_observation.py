"""The one record that everything reads: hooks, shared statistics (invariants 3, 6, 9), shared gradients, default layers."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn

from glassarmor.interpret.observation import Observation, feature_layers, observe, record, strongest_wrong
from tests.reference.nets import Linear, Residual, batch, conv_bn, hooks, smooth, unchanged, untidy


def test_unknown_layer_names_the_key_and_close_names():
    net = conv_bn()
    x, x_adv, y = batch()
    with pytest.raises(ValueError, match=r"layers: the network has no layer 'atc2'; close names: .*act2"):
        observe(net, x, x_adv, y, layers=["atc2"])
    with pytest.raises(ValueError, match="no layer ''"):
        observe(net, x, x_adv, y, layers=[""])
    assert hooks(net) == 0


class Odd(nn.Module):
    """A net with a layer that never runs, one that runs twice, one that returns a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.unused = nn.Conv2d(3, 4, 3)
        self.twice = nn.Conv2d(4, 4, 1)
        self.rnn = nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        a = self.twice(self.twice(self.conv(x)))
        return self.head(self.rnn(a.flatten(2).mT)[0].mean(1))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("unused", "unused recorded nothing"),
        ("twice", "'twice' ran twice"),
    ],
)
def test_layers_that_cannot_be_recorded(layer, message):
    net = Odd()
    x, x_adv, y = batch()
    with pytest.raises(ValueError, match=message):
        observe(net, x, x_adv, y, layers=["conv", layer])
    assert hooks(net) == 0


def test_what_is_overwritten_in_place_goes_on_as_a_copy():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 36, 5))
    x, x_adv, y = batch()
    obs = observe(net, x, x_adv, y, layers=["0"])
    torch.testing.assert_close(obs.adv.acts["0"], net[0](x_adv))
    torch.testing.assert_close(obs.adv.logits, net(x_adv))
    with pytest.raises(ValueError, match="layers: 0 overwritten by an in-place operation"), record(net, ["0"]):
        net(x)  # recorded as it is, without knowing
    assert observe(net, x, x_adv, y, layers=["1"]).adv.acts["1"].min() == 0
    assert hooks(net) == 0


def test_hooks_are_removed_when_the_forward_fails():
    net = conv_bn()
    with pytest.raises(RuntimeError), record(net, ["act1", "act2"]):
        net(torch.rand(2, 7, 8, 8))
    assert hooks(net) == 0
    x, x_adv, y = batch()
    with pytest.raises(ValueError, match="net: expected one that runs in training mode"):
        observe(net, x[:, :2], x_adv, y, layers=["act1"])  # the clean pass fails
    assert hooks(net) == 0
    assert not any("forward" in m.__dict__ for m in net.modules())


def test_what_is_recorded_is_the_layer_output_and_the_logits():
    net = conv_bn().eval()
    x, x_adv, y = batch()
    obs = observe(net, x, x_adv, y, layers=["act2", "act1"])
    for side, images in (("clean", x), ("adv", x_adv)):
        stem = net.act1(net.bn1(net.conv1(images)))
        torch.testing.assert_close(obs.side(side).acts["act1"], stem, rtol=0, atol=0)
        torch.testing.assert_close(obs.side(side).acts["act2"], net.act2(net.bn2(net.conv2(stem))), rtol=0, atol=0)
        torch.testing.assert_close(obs.side(side).logits, net(images), rtol=0, atol=0)
    torch.testing.assert_close(obs.delta("act1"), obs.adv.acts["act1"] - obs.clean.acts["act1"], rtol=0, atol=0)
    assert list(obs.adv.acts) == ["act1", "act2"]  # execution order
    assert hooks(net) == 0


def test_default_target_is_the_strongest_wrong_class_and_a_given_one_is_kept():
    logits = torch.tensor([[5.0, 1.0, 3.0], [5.0, 1.0, 3.0], [0.0, -1.0, -2.0]])
    assert strongest_wrong(logits, torch.tensor([0, 1, 0])).tolist() == [2, 0, 1]
    net = conv_bn().eval()
    x, x_adv, y = batch()
    obs = observe(net, x, x_adv, y)
    z = obs.adv.logits.detach().clone()
    z[range(len(y)), y] = -torch.inf
    assert torch.equal(obs.target, z.argmax(1))
    given = (y + 1) % 5
    obs = observe(net, x, x_adv, y, target=given)
    assert torch.equal(obs.logit("target", "clean"), obs.clean.logits[range(len(y)), given])
    assert torch.equal(obs.logit("true"), obs.adv.logits[range(len(y)), y])


def test_without_clean_pass_only_the_adversarial_images_run():
    net = conv_bn()
    seen = []
    net.register_forward_pre_hook(lambda _m, inputs: seen.append(len(inputs[0])))
    x, x_adv, y = batch()
    obs = observe(net, x, x_adv, y, layers=["act2"], clean=False)
    assert seen == [3, 4]  # three learn which axis is what, once
    observe(net, x, x_adv, y, layers=["act2"], clean=False)
    assert seen == [3, 4, 4]
    with pytest.raises(ValueError, match=r"no clean pass; call observe\(\.\.\., clean=True\)"):
        obs.delta("act2")
    obs = observe(net, x, x, y, layers=["act2"])
    assert seen == [3, 4, 4, 4]  # no attack: one pass serves both sides
    assert obs.clean is obs.adv


@pytest.mark.parametrize("make", [conv_bn, Residual])
def test_joined_and_separate_agree_in_eval_mode(make):
    net = make().eval()
    layers = feature_layers(net, torch.rand(1, 3, 8, 8))
    x, x_adv, y = batch()
    joined = observe(net, x, x_adv, y, layers=layers, joined=True)
    apart = observe(net, x, x_adv, y, layers=layers)
    assert torch.equal(joined.target, apart.target)
    for side in ("adv", "clean"):
        torch.testing.assert_close(joined.side(side).logits, apart.side(side).logits)
        for layer in layers:
            torch.testing.assert_close(joined.side(side).acts[layer], apart.side(side).acts[layer])
            for label in ("true", "target"):
                torch.testing.assert_close(
                    joined.layer_gradient(layer, side, label), apart.layer_gradient(layer, side, label)
                )


# Train mode: whose statistics, and who updates them.


def _state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_clean_pass_under_shared_statistics_updates_nothing():
    x, x_adv, y = batch()
    observed, plain = conv_bn().train(), conv_bn().train()
    before = _state(plain)
    obs = observe(observed, x, x_adv, y, layers=["act2"])
    logits = plain(x_adv)
    assert torch.equal(obs.adv.logits, logits)
    assert _same(_state(observed), _state(plain))
    assert not _same(before, _state(plain))
    assert int(observed.bn1.num_batches_tracked) == 1
    assert not any("forward" in m.__dict__ for m in observed.modules())
    assert observed.training


def test_joined_pass_updates_once_with_the_joined_batch():
    x, x_adv, y = batch()
    observed, plain = conv_bn().train(), conv_bn().train()
    observe(observed, x, x_adv, y, layers=["act2"], joined=True)
    plain(torch.cat([x, x_adv]))
    assert _same(_state(observed), _state(plain))
    assert int(observed.bn2.num_batches_tracked) == 1


def test_frozen_batchnorm_keeps_its_own_statistics_on_both_sides():
    """Submodules may mix modes: a BatchNorm in eval mode normalises by what it has learned, in the clean pass too."""
    net = conv_bn().train()
    net.bn1.eval()
    x, x_adv, y = batch()
    obs = observe(net, x, x_adv, y, layers=["bn1"])
    torch.testing.assert_close(obs.clean.acts["bn1"], net.bn1(net.conv1(x)), rtol=0, atol=0)


def test_batchnorm_used_twice_is_refused_and_cleaned_up():
    bn = nn.BatchNorm2d(3)
    net = nn.Sequential(bn, nn.ReLU(), bn, nn.Flatten(), nn.Linear(192, 5)).train()
    x, x_adv, y = batch()
    with pytest.raises(ValueError, match="BatchNorm layer is used twice"):
        observe(net, x, x_adv, y)
    assert hooks(net) == 0
    observe(net, x, x_adv, y, joined=True)
    observe(net.eval(), x, x_adv, y)  # no batch statistics, nothing ambiguous


def _shift_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(),
                    head=nn.Linear(4, 5))
    ).train()  # fmt: skip


def test_invariant_3_a_constant_channel_shift_survives_batchnorm():
    x, _, y = batch()
    x_adv = x + 0.1  # through a 1×1 convolution: one constant per channel before the BatchNorm
    net = _shift_net()
    shift = 0.1 * net.conv.weight.sum((1, 2, 3)).detach()

    obs = observe(net, x, x_adv, y, layers=["bn"])
    std = (net.conv(x_adv).var((0, 2, 3), correction=0) + net.bn.eps).sqrt()
    expected = (shift / std).detach()
    torch.testing.assert_close(obs.delta("bn").mean((0, 2, 3)), expected, rtol=1e-4, atol=1e-5)
    assert expected.abs().min() > 0.05

    joined = observe(net, x, x_adv, y, layers=["bn"], joined=True)
    std = (net.conv(torch.cat([x, x_adv])).var((0, 2, 3), correction=0) + net.bn.eps).sqrt()
    torch.testing.assert_close(joined.delta("bn").mean((0, 2, 3)), (shift / std).detach(), rtol=1e-4, atol=1e-5)

    apart = net.bn(net.conv(x_adv)) - net.bn(net.conv(x))  # what two train-mode passes would have seen: nothing
    assert apart.mean((0, 2, 3)).abs().max() < 1e-5


def test_shared_statistics_equal_the_adversarial_batch_norm_formula():
    """A clean image equal to its adversarial image gives the same activations and logits, whatever the rest of the batch."""
    net = conv_bn().train()
    x, x_adv, y = batch()
    x_adv[2] = x[2]
    obs = observe(net, x, x_adv, y, layers=["act1", "act2"])
    for layer in ("act1", "act2"):
        assert obs.delta(layer)[2].abs().max() < 1e-5
        assert obs.delta(layer)[0].abs().max() > 1e-2
    torch.testing.assert_close(obs.clean.logits[2], obs.adv.logits[2], rtol=1e-4, atol=1e-5)


def test_dropout_masks_are_shared_and_the_random_stream_goes_on_as_after_one_pass():
    net = conv_bn(dropout=0.5).train()
    x, _, y = batch(n=8)
    start = torch.get_rng_state()
    obs = observe(net, x, x.clone(), y, layers=["drop", "act2"])
    torch.testing.assert_close(obs.clean.logits, obs.adv.logits, rtol=1e-4, atol=1e-5)
    dropped = obs.adv.acts["drop"].flatten(2).abs().sum(2) == 0
    assert 0 < dropped.float().mean() < 1
    assert torch.equal(dropped, obs.clean.acts["drop"].flatten(2).abs().sum(2) == 0)
    after = torch.rand(3)
    torch.set_rng_state(start)
    net(x)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("parameter", ["conv1.weight", "bn1.weight", "conv2.weight", "bn2.bias", "head.weight"])
def test_the_shared_pass_has_true_gradients_through_the_statistics(parameter, double_precision):
    net = smooth().train()
    x, x_adv, y = (t.double() if t.is_floating_point() else t for t in batch(size=6, channels=2, classes=3))
    weights = torch.randn(4, 3, dtype=torch.float64)
    p = net.get_parameter(parameter)

    def value() -> torch.Tensor:
        return (observe(net, x, x_adv, y).clean.logits * weights).sum()

    (gradient,) = torch.autograd.grad(value(), p)
    direction = torch.randn_like(p)
    with torch.no_grad():
        p.add_(1e-6 * direction)
        up = value()
        p.sub_(2e-6 * direction)
        down = value()
    numeric = float(up - down) / 2e-6
    assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=1e-5, abs=1e-7)


# The gradient of a logit at a layer.


def test_layer_gradient_is_the_gradient_and_is_computed_once(monkeypatch):
    net = conv_bn().eval()
    x, x_adv, y = batch()
    calls = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (calls.append(1), real(*a, **k))[1])

    def read(obs: Observation) -> None:
        for _ in range(2):
            for layer in ("act1", "act2"):
                for side in ("adv", "clean"):
                    for label in ("true", "target"):
                        obs.layer_gradient(layer, side, label)

    obs = observe(net, x, x_adv, y, layers=["act1", "act2"])
    read(obs)
    assert len(calls) == 4  # one per side and label, whatever the number of layers
    calls.clear()
    read(observe(net, x, x_adv, y, layers=["act1", "act2"], joined=True))
    assert len(calls) == 2  # one per label

    for label, index in (("true", y), ("target", obs.target)):
        w = net.head.weight.detach()[index]  # (N, C): below pooling and a linear head, w / (HW) everywhere
        expected = (w / 16)[:, :, None, None].expand(-1, -1, 4, 4)
        torch.testing.assert_close(obs.layer_gradient("act2", "clean", label), expected)


def test_a_first_reader_under_no_grad_does_not_cut_the_graph_of_the_next():
    """Running estimates read before the loss does, and a term at weight 0 reads without gradients."""
    net = conv_bn().eval()
    x, x_adv, y = batch()
    obs = observe(net, x, x_adv, y, layers=["act1"], create_graph=True)
    with torch.no_grad():
        obs.delta("act1")
        obs.layer_gradient("act1", "clean", "target")
    assert obs.delta("act1").requires_grad
    assert obs.layer_gradient("act1", "clean", "target").requires_grad


def test_layer_gradient_without_graph_says_what_to_do():
    net = conv_bn().eval()
    x, x_adv, y = batch()
    with torch.no_grad():
        obs = observe(net, x, x_adv, y, layers=["act2"])
    with pytest.raises(ValueError, match="observe under enable_grad"):
        obs.layer_gradient("act2")


@pytest.mark.parametrize("create_graph", [False, True])
def test_create_graph_decides_whether_readers_can_differentiate(create_graph):
    net = conv_bn().train()
    x, x_adv, y = batch()
    gradient = observe(net, x, x_adv, y, layers=["act1"], create_graph=create_graph).layer_gradient("act1")
    assert gradient.requires_grad == create_graph


# Default layers.


@pytest.mark.parametrize(
    ("make", "size", "expected"),
    [
        (conv_bn, 8, ("act1", "act2")),
        (Residual, 8, ("block1", "norm")),
        (lambda: torchvision.models.resnet18(), 64, ("relu", "layer1", "layer2", "layer3", "layer4")),
    ],
)
def test_feature_layers_are_the_stages_and_can_be_observed(make, size, expected):
    net = untidy(make())
    x, x_adv, y = batch(n=2, size=size)
    with unchanged(net):
        layers = feature_layers(net, x)
    assert layers == expected
    net.eval()
    assert tuple(observe(net, x, x_adv, y, layers=layers).adv.acts) == expected


def test_feature_layers_are_in_execution_order_where_a_resolution_comes_back():
    """Down and up again, as in a decoder: the last layer at 8×8 runs after the one at 4×4."""
    net = nn.Sequential(
        OrderedDict(a=nn.Conv2d(3, 4, 1), down=nn.Conv2d(4, 4, 2, 2), up=nn.Upsample(scale_factor=2), flat=nn.Flatten())
    )
    assert feature_layers(net, torch.rand(1, 3, 8, 8)) == ("down", "up")


def test_feature_layers_of_vgg11():
    with torch.device("meta"):  # shapes are all that is asked for, and the real one has 133 million weights
        net = torchvision.models.vgg11()
        layers = feature_layers(net, torch.rand(1, 3, 224, 224))
    assert layers[:-1] == ("features.1", "features.4", "features.9", "features.14", "features.19")
    module = dict(net.named_modules())[layers[-1]]
    assert module in (net.features, net.avgpool)  # the last map ahead of the classifier


def test_no_feature_map_is_an_error():
    with pytest.raises(ValueError, match="layers: no layer of the network can be observed; name the layers"):
        feature_layers(Linear((3, 8, 8), 5), torch.rand(1, 3, 8, 8))
