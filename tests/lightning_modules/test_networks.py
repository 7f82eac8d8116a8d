"""Networks: sizes of the papers, exact class activation maps, nothing in place, local weights, clear errors."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.nn import functional as F

from glassarmor.lightning_modules.networks.check import check_network, without_inplace
from glassarmor.lightning_modules.networks.imported import imported
from glassarmor.lightning_modules.networks.normalize import Normalize
from glassarmor.lightning_modules.networks.resnet import PreActResNet, ResNet, preact_resnet18, resnet18
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN
from glassarmor.lightning_modules.networks.timm_net import timm_net
from glassarmor.lightning_modules.networks.torchvision_net import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LibraryNet,
    torchvision_net,
)
from glassarmor.lightning_modules.networks.wide_resnet import wide_resnet
from tests.composing import config

MEAN, STD = (0.49, 0.48, 0.44), (0.25, 0.24, 0.26)
Factory = Callable[..., nn.Module]

small_resnet = partial(ResNet, (1, 1, 1, 1), (4, 8, 8, 16))
small_preact = partial(PreActResNet, (1, 2, 1, 1), (4, 8, 8, 16), stem_width=4)
small_wrn = partial(wide_resnet, depth=10, widen_factor=1)
pooled = pytest.mark.parametrize(
    ("factory", "last"),
    [(SmallCNN, "stage3"), (small_resnet, "layer4"), (small_preact, "final"), (small_wrn, "final")],
    ids=["small_cnn", "resnet", "preact", "wrn"],
)


def build(factory: Factory, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return factory(num_classes=10, in_channels=3, mean=MEAN, std=STD)


def stir(net: nn.Module) -> nn.Module:
    """Running statistics, scales and shifts as after training, so that eval mode is not a special case."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.1)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.8, 1.2)
    return net


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


# -- Normalize ---------------------------------------------------------------------------------------------------------


@pooled
def test_normalising_inside_equals_normalising_outside(factory: Factory, last: str) -> None:
    net = stir(build(factory)).eval()
    assert next(iter(dict(net.named_children()))) == "normalize"
    images = torch.rand(3, 3, 32, 32)
    outside = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    inside = net(images)
    net.normalize = nn.Identity()
    torch.testing.assert_close(net(outside), inside)


def test_a_checkpoint_keeps_its_normalisation() -> None:
    net = Normalize([0.5], [0.5])
    net.load_state_dict(Normalize([0.1], [0.2]).state_dict())
    torch.testing.assert_close(net(torch.full((1, 1, 2, 2), 0.3)), torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5,), (0.5, 0.5)), ((), ()), ((0.5,), (0.0,)), ((math.nan,), (1.0,)), ((0.5,), (-1.0,))]
)
def test_normalize_rejects_statistics_it_cannot_use(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="mean"):
        Normalize(mean, std)


@pytest.mark.parametrize(("channels", "images"), [(3, 1), (1, 3)])
def test_normalize_never_broadcasts_over_channels(channels: int, images: int) -> None:
    with pytest.raises(ValueError, match=rf"{channels} channel.*Got: images of shape \(2, {images}, 4, 4\)"):
        Normalize([0.5] * channels, [0.5] * channels)(torch.rand(2, images, 4, 4))


# -- Our own networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (resnet18, 11_173_962),
        # The same convolutions (projections included) and head; a BatchNorm before each block's two convolutions and one
        # at the end, none in the stem or the shortcuts.
        (preact_resnet18, 11_172_170),
        (partial(wide_resnet, depth=28), 36_479_194),
        (partial(wide_resnet, depth=34), 46_160_474),
    ],
    ids=["resnet18", "preact_resnet18", "wrn28_10", "wrn34_10"],
)
def test_parameter_counts_of_the_papers(factory: Factory, expected: int) -> None:
    with torch.device("meta"):
        assert parameters(build(factory)) == expected


@pooled
@pytest.mark.parametrize("side", [32, 28, 40])
def test_logits_are_the_head_of_the_pooled_last_feature_map(factory: Factory, last: str, side: int) -> None:
    net = stir(build(factory)).eval()
    recorded: list[Tensor] = []
    net.get_submodule(last).register_forward_hook(lambda module, args, output: recorded.append(output))
    logits = net(torch.rand(2, 3, side, side))
    (features,) = recorded
    assert net.feature_layers[-1] == last
    assert features.min() >= 0
    assert features.shape[-1] > 1
    torch.testing.assert_close(net.head(features.mean(dim=(2, 3))), logits, atol=1e-5, rtol=0)


@pooled
def test_nothing_is_in_place_and_each_relu_runs_once(factory: Factory, last: str) -> None:
    net = build(factory)
    outputs: dict[str, list[tuple[Tensor, int, Tensor]]] = {name: [] for name, _ in net.named_modules() if name}
    for name, module in net.named_modules():
        if name:
            module.register_forward_hook(
                lambda module, args, output, name=name: outputs[name].append((output, output._version, output.clone()))
            )
    net(torch.rand(2, 3, 32, 32)).sum().backward()
    for name, calls in outputs.items():
        assert len(calls) == 1, name
        output, version, value = calls[0]
        assert output._version == version, name
        assert torch.equal(output, value), name
    check_network(net, (3, 32, 32), 10)  # raises for an in-place module
    assert all(parameter.grad is not None for parameter in net.parameters())


@pooled
def test_the_seed_alone_decides_the_weights(factory: Factory, last: str) -> None:
    first, again, other = build(factory, 3).state_dict(), build(factory, 3).state_dict(), build(factory, 4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_feature_layers_exist_and_halve_the_map() -> None:
    net = build(small_preact)
    sides: list[int] = []
    for layer in net.feature_layers:
        net.get_submodule(layer).register_forward_hook(lambda module, args, output: sides.append(output.shape[-1]))
    net(torch.rand(2, 3, 32, 32))
    assert sides == [32, 16, 8, 4]


def test_initial_weights_follow_he() -> None:
    net = build(resnet18)
    convolution = net.layer3[1].conv1.weight
    assert convolution.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.02)
    assert net.head.weight.std().item() == pytest.approx(math.sqrt(1 / 512), rel=0.05)
    assert net.head.bias.abs().max() == 0


def test_options_of_the_small_cnn() -> None:
    net = build(partial(SmallCNN, width=0.5, last_stride=1))
    assert net.head.in_features == 32
    assert nn.Sequential(*list(net)[:4])(torch.rand(2, 3, 32, 32)).shape == (2, 32, 8, 8)
    with pytest.raises(ValueError, match=r"network\.last_stride.*Got: 3"):
        build(partial(SmallCNN, last_stride=3))
    with pytest.raises(ValueError, match=r"network\.width.*Got: 0.01"):
        build(partial(SmallCNN, width=0.01))


@pytest.mark.parametrize(
    ("options", "key"), [({"depth": 27}, "depth"), ({"depth": 4}, "depth"), ({"widen_factor": 0}, "widen_factor")]
)
def test_wide_resnet_rejects_what_the_paper_does_not_define(options: dict[str, int], key: str) -> None:
    with pytest.raises(ValueError, match=rf"network\.{key}.*Got: "):
        build(partial(wide_resnet, **options))


def test_wide_resnet_drops_out_in_training_only() -> None:
    net = build(partial(small_wrn, dropout=0.5))
    images = torch.rand(2, 3, 8, 8)
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))


# -- torchvision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image_size"), [("resnet18", None), ("squeezenet1_1", 64), ("mobilenet_v3_small", 48), ("regnet_y_400mf", None)]
)
def test_torchvision_nets_learn_and_give_gradients(name: str, image_size: int | None) -> None:
    net = build(partial(torchvision_net, name=name, image_size=image_size))
    check_network(net, (3, 32, 32), 10)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    before = {key: value.clone() for key, value in net.state_dict().items() if "net." in key}
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    F.cross_entropy(net(images), torch.tensor([1, 2])).backward()
    optimizer.step()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert any(not torch.equal(value, before[key]) for key, value in net.state_dict().items() if key in before)


def test_every_classifier_of_torchvision_builds_with_our_head() -> None:
    families = ("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t")
    families += ("mnasnet0_5", "shufflenet_v2_x0_5", "swin_t", "vgg11_bn", "vit_b_16")
    with torch.device("meta"):
        for name in families:
            net = build(partial(torchvision_net, name=name))
            last = [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
            assert last.weight.shape[0] == 10, name


def test_a_vision_transformer_runs_at_its_own_image_size() -> None:
    with torch.device("meta"):  # shapes only
        net = build(partial(torchvision_net, name="vit_b_32", image_size=64))
        assert net(torch.rand(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(ValueError, match=r"network\.image_size.*vit_b_32"):
        build(partial(torchvision_net, name="vit_b_32", image_size=50))


def test_grey_images_become_three_equal_channels() -> None:
    torch.manual_seed(0)
    net = torchvision_net(name="squeezenet1_1", num_classes=5, in_channels=1, mean=[0.3], std=[0.2]).eval()
    images = torch.rand(2, 1, 40, 40)
    torch.testing.assert_close(net(images), net.net((images.repeat(1, 3, 1, 1) - 0.3) / 0.2))


@pytest.mark.parametrize("side", [20, 32, 50])
def test_images_are_resized_inside_differentiably(side: int) -> None:
    net = LibraryNet(Normalize(MEAN, STD), nn.Flatten(), image_size=32).double()
    images = torch.rand(1, 3, side, side, dtype=torch.double, requires_grad=True)
    assert net(images).shape == (1, 3 * 32 * 32)
    direction = torch.rand_like(images)
    weight = torch.rand(3 * 32 * 32, dtype=torch.double)
    (gradient,) = torch.autograd.grad(net(images)[0] @ weight, images)
    with torch.no_grad():  # the map is affine: any step is exact
        change = (net(images + direction) - net(images))[0] @ weight
    torch.testing.assert_close((gradient * direction).sum(), change)


def test_the_same_image_size_changes_nothing() -> None:
    net = LibraryNet(Normalize([0.0] * 3, [1.0] * 3), nn.Identity(), image_size=8)
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(net(images), images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet19"}, r"network\.name must be .*resnet18.*Got: 'resnet19'"),
        ({"name": "fcn_resnet50"}, r"network\.name"),
        ({"name": "resnet18", "image_size": 0}, r"network\.image_size .*Got: 0"),
        ({"name": "resnet18", "normalization": "other"}, r"network\.normalization .*Got: 'other'"),
        ({"name": "resnet18", "in_channels": 4}, r"1 or 3 channels.*Got: 4"),
    ],
)
def test_torchvision_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torchvision_net(**{"num_classes": 10, "in_channels": 3, "mean": MEAN, "std": STD, **options})


# -- Local weights -----------------------------------------------------------------------------------------------------

squeeze = partial(torchvision_net, name="squeezenet1_1", in_channels=3, mean=MEAN, std=STD)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.manual_seed(7)
    torch.save(squeeze(num_classes=10).net.state_dict(), path)
    return path


def test_weights_of_a_local_file_are_loaded(weights: Path) -> None:
    net = squeeze(num_classes=10, weights=str(weights))
    saved = torch.load(weights, weights_only=True)
    assert all(torch.equal(value, saved[key]) for key, value in net.net.state_dict().items())
    torch.testing.assert_close(net.normalize.mean.flatten(), torch.tensor(IMAGENET_MEAN))
    torch.testing.assert_close(net.normalize.std.flatten(), torch.tensor(IMAGENET_STD))
    kept = squeeze(num_classes=10, weights=str(weights), normalization="data")
    torch.testing.assert_close(kept.normalize.mean.flatten(), torch.tensor(MEAN))


def test_a_head_of_other_classes_stays_new(weights: Path) -> None:
    net = squeeze(num_classes=4, weights=str(weights)).net
    saved = torch.load(weights, weights_only=True)
    assert net.classifier[1].weight.shape[0] == 4
    assert all(torch.equal(value, saved[key]) for key, value in net.state_dict().items() if "classifier.1" not in key)


def test_weights_as_torchvision_published_them(tmp_path: Path) -> None:
    """DenseNet files carry dotted module names, Inception files auxiliary heads."""
    torch.manual_seed(7)
    dense = partial(torchvision_net, name="densenet121", in_channels=3, mean=MEAN, std=STD, num_classes=10)
    state = dense().net.state_dict()
    published = {key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value for key, value in state.items()}
    published = {key: value for key, value in published.items() if "num_batches_tracked" not in key}
    assert set(published) - set(state)
    torch.save(published, tmp_path / "dense.pth")
    loaded = dense(weights=str(tmp_path / "dense.pth")).net.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_weights_that_do_not_fit_name_the_keys(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    first = next(iter(state))
    for name, change, message in (
        ("headless", lambda: state.pop("classifier.1.bias"), r"classifier\.1\.bias is missing"),
        ("missing", lambda: state.pop("features.0.bias"), r"features\.0\.bias is missing"),
        ("extra", lambda: state.update(other=torch.ones(1)), r"other is not in the network"),
        ("shape", lambda: state.update({first: torch.ones(2)}), rf"{first} \(2,\) instead of \(64, 3, 3, 3\)"),
    ):
        change()
        torch.save(state, tmp_path / name)
        with pytest.raises(ValueError, match=rf"network\.weights: \S*{name} does not fit the network: .*{message}"):
            squeeze(num_classes=10, weights=str(tmp_path / name))


# -- timm --------------------------------------------------------------------------------------------------------------

timm = partial(timm_net, num_classes=5, mean=(0.5,), std=(0.25,), in_channels=1)


def test_a_net_of_timm_is_its_own_with_weights_of_a_local_file(tmp_path: Path) -> None:
    library = pytest.importorskip("timm")
    torch.manual_seed(1)
    args = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    theirs = library.create_model("vit_tiny_patch16_224", img_size=16, num_classes=7, **args).eval()
    torch.save({"state_dict_ema": theirs.state_dict()}, tmp_path / "vit.pt")
    vit = partial(timm, name="vit_tiny_patch16_224", image_size=16, args=args)
    net = vit(num_classes=7, weights=str(tmp_path / "vit.pt")).eval()
    x = torch.rand(2, 1, 8, 8)
    wide = nn.functional.interpolate(x.expand(-1, 3, -1, -1), size=(16, 16), mode="bilinear")
    torch.testing.assert_close(net(x), theirs((wide - 0.5) / 0.5))  # the statistics that timm records for this net
    assert vit(weights=str(tmp_path / "vit.pt")).net.head.out_features == 5
    check_network(vit(), (1, 8, 8), 5)
    for options, message in (
        ({"name": "vit_tinny"}, r"network\.name: expected one of timm's .*vit_tiny.*found 'vit_tinny'"),
        ({"name": "hf-hub:someone/net"}, r"network\.name: "),
        ({"args": {"pretrained": True}}, r"network\.args: nothing is downloaded"),
        ({"args": {"depht": 3}}, r"network: timm cannot build vit_tiny"),
        ({"weights": str(tmp_path / "no.pt")}, r"network\.weights: expected a file of weights"),
    ):
        with pytest.raises(ValueError, match=message):
            vit(**options)


# -- The user's own ----------------------------------------------------------------------------------------------------

OWN = """
from torch import nn

number = 3

def make_net(classes=10, channels=3):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(classes))

class Zoo:
    @staticmethod
    def linear(classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(48, classes))

def make_list():
    return []

def fails():
    raise RuntimeError("no net today")
"""

own = partial(imported, num_classes=10, in_channels=3, mean=MEAN, std=STD)


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    (tmp_path / "own_nets_for_test.py").write_text(OWN)
    (tmp_path / "own_broken_for_test.py").write_text("import surely_not_installed_anywhere\n")


def test_a_callable_that_is_not_there_is_told_beside_at_most_a_dozen_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"net{place:02}" for place in range(20)]
    source = "from torch import nn, optim\nfrom torch.nn import Linear, Module\nclasses = 10\n"
    (tmp_path / "many_nets_for_test.py").write_text(source + "".join(f"def {name}(): ...\n" for name in names))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with pytest.raises(ValueError, match=f"which has {', '.join(names[:12])} and 8 more  Got: no attribute 'nope'"):
        own(target="many_nets_for_test:nope")


@pytest.mark.usefixtures("own_modules")
def test_a_network_from_the_working_directory() -> None:
    net = own(target="own_nets_for_test:Zoo.linear", args={"classes": 10})
    check_network(net, (3, 4, 4), 10)
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(net(images), net.net(Normalize(MEAN, STD)(images)))
    bare = own(target="own_nets_for_test:Zoo.linear", args={"classes": 10}, normalize=False)
    assert isinstance(bare[0], nn.Flatten)
    assert not own(target="own_nets_for_test:make_net").net[1].inplace


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize(
    ("target", "args", "message"),
    [
        (None, {}, "'module:callable'.*Got: None"),
        ("own_nets_for_test", {}, "'module:callable'"),
        (":make_net", {}, "'module:callable'"),
        ("own_missing_for_test:make_net", {}, "'own_missing_for_test'.*Got: no such module"),
        ("own_broken_for_test:make_net", {}, "Got: ModuleNotFoundError: .*surely_not_installed_anywhere"),
        ("own_nets_for_test:make_nets", {}, "which has .*make_list, make_net  Got: no attribute 'make_nets'"),
        ("own_nets_for_test:number", {}, "must be callable  Got: int"),
        ("own_nets_for_test:make_list", {}, r"must return a torch\.nn\.Module  Got: list"),
        ("own_nets_for_test:make_net", {"layers": 3}, r"network\.args = {'layers': 3}  Got: TypeError: .*layers"),
        ("own_nets_for_test:fails", {}, "Got: RuntimeError: no net today"),
    ],
)
def test_targets_that_are_no_network(target: str | None, args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"network\.target.*{message}"):
        own(target=target, args=args)


# -- check_network -----------------------------------------------------------------------------------------------------


class Returns(nn.Module):
    """A net whose output is ``function(logits)``; it moves a buffer and draws random numbers in eval mode as well."""

    def __init__(self, function: Callable[[Tensor], object] = lambda logits: logits) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 10)
        self.batchnorm = nn.BatchNorm1d(10)
        self.function = function
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> object:
        self.calls += 1
        self.batchnorm.running_mean = torch.rand(10)
        return self.function(self.batchnorm(self.linear(images.flatten(1))))


@pytest.mark.parametrize("fails", [False, True])
def test_the_check_leaves_the_net_and_the_generators_as_found(fails: bool) -> None:
    net = Returns(lambda logits: logits[:, :5] if fails else logits)
    net.linear.eval()  # a frozen part, in a net that trains
    net.linear.weight.grad = torch.ones_like(net.linear.weight)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    running_mean = net.batchnorm.running_mean
    random_state = torch.get_rng_state()
    if fails:
        with pytest.raises(ValueError, match="logits"):
            check_network(net, (3, 2, 2), 10)
    else:
        check_network(net, (3, 2, 2), 10)
    assert [module.training for module in net.modules()] == [True, False, True]
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert net.batchnorm.running_mean is running_mean
    assert torch.equal(net.linear.weight.grad, torch.ones_like(net.linear.weight))
    assert net.linear.bias.grad is None
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda logits: logits[:, :5], r"\(2, 10\)  Got: torch\.float32 of shape \(2, 5\)"),
        (lambda logits: logits[:1], r"Got: .* of shape \(1, 10\)"),
        (lambda logits: logits.argmax(1), r"Got: torch\.int64 of shape \(2,\)"),
        (lambda logits: (logits, logits), "Got: tuple"),
        (lambda logits: logits.log() * 0 - math.inf, "NaN or infinite"),
        (lambda logits: logits.softmax(1), "expects logits.*probabilities"),
        (lambda logits: logits.detach(), "gradients must pass"),
        (lambda logits: logits.detach() * torch.ones(10, requires_grad=True), "gradients must pass"),
    ],
)
def test_outputs_that_are_no_logits(function: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"network: .*{message}"):
        check_network(Returns(function), (3, 2, 2), 10)


def test_log_probabilities_are_logits() -> None:
    check_network(Returns(lambda logits: logits.log_softmax(1)), (3, 2, 2), 10)


def test_images_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(N, 3, 4, 4\).*network\.image_size  Got: RuntimeError"):
        check_network(Returns(), (3, 4, 4), 10)
    with pytest.raises(ValueError, match="3 channel"):
        check_network(build(SmallCNN), (1, 32, 32), 10)


def test_in_place_modules_are_named_and_can_be_turned_off() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.Sequential(nn.ReLU(inplace=True), nn.Hardswish(True)))
    images = torch.rand(2, 3, 2, 2)
    expected = net(images)
    with pytest.raises(ValueError, match=r"without_inplace.*Got: inplace=True in 2\.0, 2\.1"):
        check_network(net, (3, 2, 2), 10)
    assert without_inplace(net) is net
    torch.testing.assert_close(net(images), expected)
    check_network(net, (3, 2, 2), 10)


# -- Configs -----------------------------------------------------------------------------------------------------------

CONFIGS = Path(__file__).parents[2] / "configs" / "network"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_config_names_a_factory_and_its_options(path: Path) -> None:
    assert path.read_text().startswith("# ")
    target = ["network.target=torch.nn:Flatten"] if path.stem == "imported" else []
    factory = instantiate(config(f"network={path.stem}", *target).network)
    with torch.device("meta"):
        assert isinstance(factory(num_classes=10, in_channels=3, mean=MEAN, std=STD), nn.Module)


def test_a_peer_gates_any_network_by_name() -> None:
    """The base is a choice of the same group: network=fsr network@network.base=resnet18."""
    factory = instantiate(config("network=fsr", "network@network.base=resnet18", "network.layer=layer3").network)
    with torch.device("meta"):
        net = factory(num_classes=10, in_channels=3, mean=MEAN, std=STD)
    assert isinstance(net, ResNet)
    assert net.layer3.gate.classifier.weight.shape == (10, 256)
