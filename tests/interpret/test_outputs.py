"""Nets that return more than logits: read in one way by every door, or refused in one sentence."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glassarmor.datamodules.concepts import procedural_concepts
from glassarmor.defenses import (
    APGD,
    FGSM,
    PGD,
    PSE,
    AdversarialCE,
    CarliniWagner,
    Defense,
    Linf,
    Square,
    evaluate_robustness,
    sanity_checks,
)
from glassarmor.interpret import feature_layers, observe, reading
from glassarmor.interpret.concepts.dissection import dissect
from glassarmor.interpret.modes import logits_in, undisturbed
from glassarmor.interpret.network.structure import structure
from glassarmor.lightning_modules.classifier import RobustClassifier
from glassarmor.lightning_modules.networks import SmallCNN
from glassarmor.lightning_modules.networks.check import check_network

Aux = namedtuple("Aux", "aux logits")


@dataclass
class ModelOutput:
    logits: Tensor


class Wordy(nn.Module):
    """Returns what ``tell`` makes of logits (N, 3) and features (N, 4); in eval mode too, or in training alone."""

    def __init__(self, tell: Callable[[Tensor, Tensor], Any], always: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head, self.tell, self.always = nn.Linear(4, 3), tell, always

    def forward(self, x: Tensor) -> Any:
        features = self.body(x)
        logits = self.head(features)
        return self.tell(logits, features) if self.always or self.training else logits


TELLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda z, f: z,
    "tuple": lambda z, f: (z, z + 1),
    "list": lambda z, f: [z, z + 1],
    "tuple of one": lambda z, f: (z,),
    "named tuple": lambda z, f: Aux(z + 1, z),
    "dict": lambda z, f: {"features": f, "logits": z},
    "ordered dict": lambda z, f: OrderedDict(logits=z, loss=z.sum()),
    "dict of one": lambda z, f: {"out": z},
    "object": lambda z, f: ModelOutput(z),
    "with None": lambda z, f: (z, None),
}


@pytest.mark.long
@pytest.mark.parametrize("always", [True, False], ids=["always", "in training alone"])
@pytest.mark.parametrize("tell", TELLS)
def test_every_door_reads_the_same_logits(tell: str, always: bool) -> None:
    torch.manual_seed(0)
    net = Wordy(TELLS[tell], always)
    plain = copy.deepcopy(net)
    plain.tell = TELLS["tensor"]
    x, y = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2] * 2)
    attack = PGD(Linf(0.1), steps=2)
    assert torch.equal(*(copy.deepcopy(attack)(each, x, y) for each in (net, plain)))
    ways = [observe(each, x, x + 0.0, y, layers=("body.2",)).adv.logits for each in (net, plain)]
    assert torch.equal(*ways)
    losses = [Defense(copy.deepcopy(attack), {"ce": AdversarialCE()})(each, x, y).loss for each in (net, plain)]
    assert torch.equal(*losses)
    losses[0].backward()
    assert net.head.weight.grad is not None
    found = [evaluate_robustness(each.eval(), x, y, Linf(0.1), suite="probe").accuracy for each in (net, plain)]
    assert found[0] == found[1]
    module = RobustClassifier(net, Defense(None, {"ce": AdversarialCE()}), attack, 3, torch.optim.SGD)
    assert torch.equal(module(x), plain(x))
    assert not net._forward_hooks  # given back as it was


def test_the_sanity_checks_read_logits_too() -> None:
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 3
    assert sanity_checks(Wordy(TELLS["dict"]).eval(), x, y, Linf(0.1)).verdict in ("trusted", "suspicious", "invalid")


def test_a_plain_function_is_attacked_and_judged() -> None:
    """Anything that maps images to logits, with the same numbers as the module behind it; looking inside needs a module."""
    torch.manual_seed(0)
    net = Wordy(TELLS["tensor"]).eval().requires_grad_(False)
    x, y, threat = torch.rand(12, 1, 8, 8), torch.tensor([0, 1, 2] * 4), Linf(0.1)
    function, tuple_of = (lambda images: net(images)), (lambda images: (net(images), None))
    for make in (
        lambda: PGD(threat, steps=2),
        lambda: APGD(threat, steps=3),
        lambda: Square(threat, queries=5),
        lambda: CarliniWagner(steps=2, search_steps=1),
        lambda: FGSM(threat),
    ):
        assert torch.equal(make()(function, x, y), make()(net, x, y))
    whole = evaluate_robustness(net, x, y, threat, suite="probe")
    for each in (function, tuple_of):
        assert evaluate_robustness(each, x, y, threat, suite="probe").accuracy == whole.accuracy
    many, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 3
    told = [sanity_checks(each, many, labels, threat) for each in (net, function)]
    assert told[0].verdict == told[1].verdict
    for look in (lambda: observe(function, x, x, y), lambda: Defense(None, {"ce": AdversarialCE()})(function, x, y)):
        with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module to look into or to train, found function"):
            look()
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module or a function of images, found str"):
        PGD(threat)("net", x, y)


def test_a_key_says_which_entry_and_no_name_changes() -> None:
    net = Wordy(lambda z, f: {"scores": z, "features": f}).eval()
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    names = [name for name, _ in net.named_modules()], list(net.state_dict())
    with pytest.raises(ValueError, match=r"found a dict with scores, features; say which .*output=NAME"):
        observe(net, x, x, y)
    with pytest.raises(ValueError, match=r"Got: dict with scores, features; output=NAME"):
        check_network(net, (1, 8, 8), 3)
    read = reading(net, "scores")
    assert read is net
    assert names == ([name for name, _ in net.named_modules()], list(net.state_dict()))
    assert net(x).shape == (2, 3)
    assert copy.deepcopy(net)(x).shape == (2, 3)
    check_network(net, (1, 8, 8), 3)
    with pytest.raises(ValueError, match="output: expected one of scores, features of what the net returns, found 'logits'"):
        reading(Wordy(net.tell), "logits")(x)
    assert reading(Wordy(lambda z, f: (f, z)), 1)(x).shape == (2, 3)
    assert reading(Wordy(lambda z, f: (f, z)), "1")(x).shape == (2, 3)
    assert reading(Wordy(lambda z, f: Aux(f, z)), "logits")(x).shape == (2, 3)


def test_tables_of_different_widths_are_not_guessed_at() -> None:
    """Two-dimensional features, taken for logits, would be attacked as classes that nobody has."""
    with pytest.raises(ValueError, match=r"tables of \[3, 4\] columns; say which is the logits"):
        observe(Wordy(lambda z, f: (f, z)), torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
    assert logits_in(()) == ()
    assert logits_in("words") == "words"


def test_what_a_net_returns_in_training_alone_is_checked_before_training() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) in training mode too  Got: dict with features, loss"):
        check_network(Wordy(lambda z, f: {"features": f, "loss": z.sum()}, always=False), (1, 8, 8), 3)
    net = reading(Wordy(TELLS["named tuple"], always=False))
    state = copy.deepcopy(net.state_dict())
    check_network(net, (1, 8, 8), 3)
    assert net.training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_of_torchvision(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.get_model(name, weights=None, num_classes=3, aux_logits=True, init_weights=False)
    x = torch.rand(2, 3, 75, 75) if name == "googlenet" else torch.rand(2, 3, 299, 299)
    with torch.no_grad():
        assert isinstance(logits_in(net.train()(x)), Tensor)
        assert logits_in(net(x)).shape == (2, 3)
        with undisturbed(net):
            assert net(x).shape == (2, 3)


def test_a_distilled_net_of_timm() -> None:
    timm = pytest.importorskip("timm")
    args = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
    net = timm.create_model("deit_tiny_distilled_patch16_224", **args)
    net.set_distilled_training(True)
    x, y = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    assert isinstance(net(x), tuple)
    Defense(PGD(Linf(0.1), steps=1), {"ce": AdversarialCE()})(net, x, y).loss.backward()
    assert net.head.weight.grad is not None


# -- Compiled, parallel, half and double -------------------------------------------------------------------------------


def small() -> SmallCNN:
    torch.manual_seed(2)
    return SmallCNN(num_classes=3, in_channels=3, mean=(0.5,) * 3, std=(0.2,) * 3, width=0.25)


def compiled_in_place() -> nn.Module:
    net = small()
    net.compile(backend="aot_eager")
    return net


KINDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "compiled": (lambda: torch.compile(small(), backend="aot_eager"), "_orig_mod."),
    "compiled in place": (compiled_in_place, ""),
    "DataParallel": (lambda: nn.DataParallel(small()), "module."),
    "double": (lambda: small().double(), ""),
}


LONG = ("compiled",)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.long] * (kind in LONG)) for kind in KINDS])
def test_a_wrapped_net_is_seen_and_trained_as_the_net_itself(kind: str) -> None:
    """After it ran once, too: hooks that come after compilation record nothing, and no second derivative leads through."""
    make, prefix = KINDS[kind]
    x, y, threat = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]), Linf(0.1)
    values = []
    for net, start in ((small(), ""), (make(), prefix)):
        net(x.to(next(net.parameters()).dtype))
        obs = observe(net, x, x.roll(1, 0), y, layers=(f"{start}stage3",))
        step = Defense(PGD(threat, steps=1), {"ce": AdversarialCE()}, {"pse": PSE()})(net, x, y)
        step.loss.backward()
        weight = next(iter(net.parameters())).grad
        kinds = [node.kind for node in structure(net, x[:2]).nodes]
        layers = [name.removeprefix(start) for name in feature_layers(net, x)]
        values.append((obs.adv.acts[f"{start}stage3"], step.loss.detach(), weight, kinds, layers))
    for one, other in zip(values[0][:3], values[1][:3], strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-3, atol=1e-5)
    assert values[0][4] == values[1][4]
    if not prefix:
        assert values[0][3] == values[1][3]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_floats_are_refused_in_one_sentence_by_every_door(kind: torch.dtype) -> None:
    net, x, y, threat = small().to(kind), torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]), Linf(0.1)
    concepts = procedural_concepts(count=8, size=16, channels=3)
    for door in (
        lambda: PGD(threat, steps=1)(net, x, y),
        lambda: observe(net, x, x, y),
        lambda: evaluate_robustness(net, x, y, threat, suite="probe"),
        lambda: structure(net, x),
        lambda: dissect(net, concepts, ["stage3"]),
        lambda: Defense(None, {"ce": AdversarialCE()})(net, x, y),
    ):
        with pytest.raises(ValueError, match=r"net: .*fp32.* net\.float\(\) casts them"):
            door()
