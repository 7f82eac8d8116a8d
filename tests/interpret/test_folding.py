"""Folding: the same function and the same input gradients in fewer operations, and nothing of it is left afterwards."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.threat import Linf
from glassarmor.defenses.training.compiling import NotCompiled
from glassarmor.defenses.training.defense import Defense
from glassarmor.defenses.training.regularizers import PSE, UnitSensitivity
from glassarmor.defenses.training.terms import AdversarialCE, CleanCE, MartBCE, MartKL, TradesKL
from glassarmor.defenses.training.weights import moved
from glassarmor.interpret.modes import batchnorm_as_found, undisturbed
from glassarmor.interpret.network import folding
from glassarmor.interpret.network.folding import Foldable, foldable, folded
from glassarmor.lightning_modules.commands import train
from glassarmor.lightning_modules.networks.resnet import PreActResNet, ResNet
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN
from tests.composing import SMALL, config
from tests.reference.nets import Residual, batch, conv_bn, unchanged, untidy

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "bincount"}
DATA: dict[str, Any] = {"num_classes": 5, "in_channels": 3, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.2)}


def rich() -> nn.Module:
    """Convolutions with bias and groups; BatchNorms without scale and shift, and with one feature map each."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6, affine=False),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6, bias=False),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 4, 1, groups=2),
        nn.BatchNorm2d(4, eps=0.1),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and how many BatchNorms disappear
    "plain": (conv_bn, 2),
    "rich": (rich, 3),
    "residual": (Residual, 2),
    "small_cnn": (lambda: SmallCNN(**DATA, width=0.25), 6),
    "resnet": (lambda: ResNet((2, 1), (4, 8), **DATA), 1 + 6 + 1),
    # The first BatchNorm of a block reads what the shortcut reads too; only the one between two convolutions goes.
    "preact": (lambda: PreActResNet((2, 1), (4, 8), stem_width=4, **DATA), 3),
}


def alive(net: nn.Module) -> nn.Module:
    """Statistics, scales and shifts that are not the identity."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return net


def answer(net: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the cross-entropy with respect to the images."""
    x = x.clone().requires_grad_()
    logits = net(x)
    return logits.detach(), torch.autograd.grad(nn.functional.cross_entropy(logits, y, reduction="sum"), x)[0]


class Calls(TorchDispatchMode):
    """Every operation inside, by name, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func.overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))

    def names(self) -> Counter[str]:
        return Counter(name for name, _ in self.calls)


@pytest.mark.parametrize("name", NETS)
def test_the_same_logits_and_input_gradients(name):
    make, expected = NETS[name]
    net = alive(make()).double().train()
    x, _, y = batch()
    x = x.double()
    with unchanged(net), undisturbed(net):
        logits, gradient = answer(net, x, y)
        with folded(net, x), Calls() as seen:
            same_logits, same_gradient = answer(net, x, y)
        torch.testing.assert_close(same_logits, logits, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(same_gradient, gradient, rtol=1e-10, atol=1e-10)
        assert len(foldable(net, x).pairs) == expected
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    found = seen.names()
    assert sum(count for op, count in found.items() if "batch_norm" in op and "backward" not in op) == norms - expected


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("low", [False, True])
def test_everything_is_put_back(fails, low):
    net = untidy(alive(conv_bn(dropout=0.5)))
    x, _, _ = batch()
    attributes = [dict(vars(module)) for module in net.modules()]
    random = torch.get_rng_state()
    with unchanged(net), torch.autocast("cpu", torch.bfloat16, enabled=low):
        try:
            with undisturbed(net), folded(net, x):
                net(x)
                if fails:
                    raise KeyError("inside")
        except KeyError:
            assert fails
    assert [vars(module).keys() for module in net.modules()] == [found.keys() for found in attributes]
    assert torch.equal(torch.get_rng_state(), random)


def test_weights_that_were_moved_are_folded_as_moved_and_stay_moved():
    net = alive(conv_bn()).eval()
    x, _, _ = batch()
    shift = {net.conv1.weight: torch.randn(net.conv1.weight.shape), net.bn2.weight: torch.rand(8)}
    with torch.no_grad(), moved(net, shift):
        expected = net(x)
        with folded(net, x):
            torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(net(x), expected)


def test_weights_that_changed_since_are_folded_anew():
    net = alive(conv_bn()).eval()
    x, _, _ = batch()
    with torch.no_grad():
        with folded(net, x):
            before = net(x)
        net.conv1.weight.mul_(2)
        net.bn1.running_mean.add_(1)
        with folded(net, x):
            torch.testing.assert_close(net(x), _unfolded(net, x), rtol=1e-4, atol=1e-4)
            assert (net(x) - before).abs().max() > 0.1


def _unfolded(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        twin = copy.deepcopy(net)
        for module in twin.modules():
            for name in ("weight", "bias", "forward"):
                vars(module).pop(name, None)
        return twin(x)


def test_a_changed_structure_is_looked_at_anew():
    net = alive(conv_bn()).eval()
    x, _, _ = batch()
    assert len(foldable(net, x).pairs) == 2
    net.bn1 = nn.Identity()
    assert [norm for _, norm in foldable(net, x).pairs] == [net.bn2]
    with torch.no_grad(), folded(net, x):
        torch.testing.assert_close(net(x), _unfolded(net, x), rtol=1e-4, atol=1e-4)


class Gated(nn.Module):
    """Reads the convolution a second time: in the graph, or where autograd does not see it."""

    def __init__(self, detached: bool) -> None:
        super().__init__()
        self.detached = detached
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), alive(nn.BatchNorm2d(4)), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        gate = maps.detach() if self.detached else maps
        return self.head((self.norm(maps) * gate.sigmoid()).mean((2, 3)))


class Twice(nn.Module):
    """One BatchNorm for two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.head = (
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(4, 4, 3),
            alive(nn.BatchNorm2d(4)),
            nn.Linear(4, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.b(self.norm(self.a(x)))).mean((2, 3)))


class Noisy(nn.Module):
    """Draws random numbers, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + torch.rand_like(x))


class Whole(nn.Module):
    """Wants its four images and no others."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 4:
            raise ValueError("expected four images")
        return self.body(x)


class Choosy(nn.Module):
    """Takes another path, which reads the convolution a second time, for bright images or for many."""

    def __init__(self, by: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.by = by
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), alive(nn.BatchNorm2d(4)), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        found = self.norm(maps)
        return self.head((found * maps if self.by(x) else found).mean((2, 3)))


def parametrized() -> nn.Module:
    net = conv_bn()
    parametrizations.weight_norm(net.conv1)
    return net


@pytest.mark.parametrize(
    ("make", "expected"),
    [(lambda: Gated(True), 0), (lambda: Gated(False), 0), (Twice, 0), (Noisy, 0), (Whole, 0), (parametrized, 1)],
    ids=["detached gate", "gate", "shared norm", "random", "whole batch", "parametrized"],
)
def test_what_cannot_be_folded_is_left_alone(make, expected):
    net = make().eval()
    x, _, _ = batch()
    assert len(foldable(net, x).pairs) == expected
    torch.manual_seed(5)
    with torch.no_grad():
        before = net(x)
        torch.manual_seed(5)
        with folded(net, x):
            torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "by",
    [lambda x: bool(x.mean() > 0.5), lambda x: x.mean().item() > 0.5, lambda x: max(x.flatten().tolist()) > 1.5],
    ids=["bool", "item", "list"],
)
def test_a_path_that_may_depend_on_the_images_is_not_folded(by):
    net = Choosy(by).eval()
    assert foldable(net, torch.full((2, 3, 8, 8), 0.1)) == Foldable()
    bright = torch.rand(6, 3, 8, 8) + 1
    with torch.no_grad(), folded(net, bright):
        found = net(bright)
    torch.testing.assert_close(found, _unfolded(net, bright))


@pytest.mark.parametrize("by", [lambda x: len(x) > 4, lambda x: x.shape[0] == 1], ids=["many", "one"])
def test_a_path_that_depends_on_the_number_of_images_is_seen(by):
    net = Choosy(by).eval()
    images = torch.rand(6, 3, 8, 8)
    assert len(foldable(net, images[:4]).pairs) == 1
    assert len(foldable(net, images[:3]).pairs) == 1
    for x in (images, images[:1], images[:4]):
        with torch.no_grad(), folded(net, x):
            found = net(x)
        torch.testing.assert_close(found, _unfolded(net, x))
    assert foldable(net, images[:4]) == Foldable()


def test_the_logits_are_compared_once_for_each_larger_batch(monkeypatch):
    net, compared = alive(conv_bn()).eval(), []
    agree = folding._agree
    monkeypatch.setattr(folding, "_agree", lambda net, found, x: compared.append(len(x)) or agree(net, found, x))
    for n in (4, 8, 6, 8, 2, 1, 5, 9):
        x = torch.rand(n, 3, 8, 8)
        with undisturbed(net), folded(net, x):
            net(x)
    assert compared == [4, 8, 1, 9]


def test_few_gradients_of_few_images_are_not_worth_it():
    """conv_bn scales 3·6·9 + 6·8·9 = 594 weights; of 4 × 4 pixels its BatchNorms make 6·16 + 8·4 = 128 values an image."""
    net = conv_bn().eval()
    for n in (1, 5):
        found = foldable(net, torch.rand(n, 3, 4, 4))  # and compares, which what follows must not count
    assert (found.weights, found.share) == (594, 128 / 48)
    for n, steps, norms in ((5, 1, 0), (4, 1, 2), (2, 2, 4), (3, 2, 0), (1, 2, 4), (1, 3, 0)):
        net.train()
        with Calls() as seen:
            PGD(Linf(0.1), steps)(net, torch.rand(n, 3, 4, 4), torch.zeros(n).long())
        forwards = sum(count for op, count in seen.names().items() if "batch_norm" in op and "backward" not in op)
        assert forwards == norms, (n, steps)


def test_a_convolution_with_a_hook_gives_what_it_gives():
    net = alive(conv_bn()).eval()
    x, _, _ = batch()
    seen: list[Tensor] = []
    with torch.no_grad():
        expected = net(x)
        handle = net.conv1.register_forward_hook(lambda _m, _i, output: seen.append(output))
        net(x)
        with folded(net, x):
            torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(seen[-1], seen[0])
        assert [conv for conv, _ in foldable(net, x).pairs] == [net.conv2]
        handle.remove()
        assert len(foldable(net, x).pairs) == 2


def test_a_relu_overwrites_only_what_nobody_else_looks_at():
    net = alive(conv_bn()).eval()
    x, _, _ = batch()
    assert set(foldable(net, x).relus) == {net.act1, net.act2}
    seen: list[tuple[Tensor, Tensor]] = []
    handle = net.bn1.register_forward_hook(lambda _m, _i, output: seen.append((output, output.clone())))
    with torch.no_grad(), folded(net, x), Calls() as calls:
        net(x)
    assert calls.names()["relu_"] == 1
    assert all(torch.equal(kept, copied) for kept, copied in seen)
    handle.remove()


class Squashed(nn.Module):
    """Its ReLU would overwrite what the sigmoid's gradient needs, or what a second branch reads."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.branch, self.body, self.relu = branch, alive(conv_bn()), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.body(x) + 0.5
        return self.relu(logits) + logits.square() if self.branch else self.relu(logits.sigmoid())


@pytest.mark.parametrize("branch", [False, True])
def test_nothing_is_overwritten_that_a_gradient_needs(branch):
    net = Squashed(branch).eval()
    x, _, y = batch()
    with undisturbed(net):
        expected = answer(net, x, y)
        assert net.relu not in foldable(net, x).relus
        with folded(net, x):
            for one, other in zip(answer(net, x, y), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_batch_statistics_are_not_folded():
    net = alive(conv_bn()).train()
    x, _, y = batch(n=6)
    attack = PGD(Linf(0.1), steps=2, start="none")
    with batchnorm_as_found(net), Calls() as seen:
        attack(net, x, y)
    assert seen.names()["native_batch_norm"] == 4


def steps(net: nn.Module, low: bool, count: int) -> Calls:
    x, _, y = batch()
    attack = PGD(Linf(0.1), steps=count)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        attack(net, x, y)  # finds the pairs
        with Calls() as seen:
            attack(net, x, y)
    return seen


@pytest.mark.parametrize("low", [False, True])
def test_an_attack_computes_no_weight_gradient_and_no_batchnorm(low):
    seen = steps(conv_bn().train(), low, 3)
    masks = [args[-1] for name, args in seen.calls if name == "convolution_backward"]
    assert masks == [[True, False, False]] * 6
    assert not any("batch_norm" in name for name in seen.names())


def test_an_attack_casts_each_weight_once():
    """Not once a step: autocast forgets the casts of frozen weights."""

    def casts(count: int) -> int:
        seen = steps(conv_bn().train(), True, count)
        return sum(name == "_to_copy" and args[0].dim() == 4 and args[0].shape[1:] == (6, 3, 3) for name, args in seen.calls)

    assert casts(1) == casts(5) == 1


@pytest.mark.long
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        lambda: {"ce": AdversarialCE()},
        lambda: {"ce": CleanCE(), "kl": TradesKL()},
        lambda: {"bce": MartBCE(), "kl": MartKL()},
    ],
    ids=["pgd_at", "trades", "mart"],
)
@pytest.mark.parametrize(
    "sensitivity",
    [
        UnitSensitivity,
        lambda: UnitSensitivity(noise_corrected=True),
        lambda: UnitSensitivity(concepts=lambda size, channels: [], at="turning"),  # asked whether to dissect
    ],
    ids=["", "noise", "concepts"],
)
def test_a_step_never_waits_for_the_device(loss, sensitivity, low):
    """No value of a tensor decides anything in Python, so an accelerator's queue never runs dry.

    What the loader sends, tests/datamodules/test_on_device.py looks at.
    """
    net = alive(conv_bn()).train()
    defense = Defense(PGD(Linf(0.1), steps=2), loss(), {"pse": PSE(), "sensitivity": sensitivity()})
    x, _, y = batch(n=6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=low), Calls() as seen:
            loss_now = defense(net, x, y).loss
        with seen:
            loss_now.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not WAITS & set(seen.names())


@pytest.mark.long
@pytest.mark.parametrize("low", [False, True])
def test_a_compiled_net_is_attacked_as_the_net_itself(low):
    """Folded weights reach the graph, which is compiled once, and nothing of it stays in the defense's state."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net = alive(conv_bn()).train()
    plain, compiled = (
        Defense(PGD(Linf(0.1), steps=3), {"ce": AdversarialCE()}, compile_attack=backend) for backend in (None, "aot_eager")
    )
    x, _, y = batch(n=6)
    for _ in range(3):
        found = []
        for defense in (plain, compiled):
            torch.manual_seed(0)
            with unchanged(net), torch.autocast("cpu", torch.bfloat16, enabled=low), torch.no_grad():
                found.append(defense._attacked(net, x, y))
        assert torch.equal(*found)
        net(x)  # moves the statistics
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert len(list(compiled.modules())) == len(list(plain.modules()))


@pytest.mark.long
def test_hooks_on_a_compiled_net_run_outside_of_it():
    """One that counts passes, as a run's cost is counted, is compiled neither into the graph nor anew for each count."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net = alive(conv_bn()).train()
    defense = Defense(PGD(Linf(0.1), steps=3), {"ce": AdversarialCE()}, compile_attack="aot_eager")
    x, _, y = batch(n=6)
    defense.prepare(net, x, y)
    seen: list[int] = []
    for _ in range(2):
        handle = net.register_forward_pre_hook(lambda _net, inputs: seen.append(len(inputs[0])))
        defense(net, x, y)
        handle.remove()
        defense(net, x, y)
    assert seen == [6] * 8
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert "forward" not in vars(net)


@pytest.mark.long
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler is installed")
@pytest.mark.parametrize("way", ["inductor", "reduce-overhead"])
def test_compiled_kernels_attack_as_the_net_does(way):
    torch._dynamo.reset()
    net = alive(conv_bn()).train()
    x, _, y = batch(n=6)
    found = []
    for how in (None, way):
        defense = Defense(PGD(Linf(0.1), steps=3), {"ce": AdversarialCE()}, compile_attack=how)
        with unchanged(net), torch.no_grad():
            found.append(defense._attacked(net, x, y))
    # A gradient that is nearly 0 may round to the other sign; a pixel is then elsewhere in the ball.
    assert ((found[0] - found[1]).abs() < 1e-5).float().mean() > 0.999


def test_a_net_that_does_not_compile_says_so():
    from torch._dynamo import register_backend

    @register_backend(name="failing")
    def failing(graph: object, inputs: object) -> object:
        raise RuntimeError("no kernel for this\nand more lines")

    torch._dynamo.reset()
    net = alive(conv_bn()).train()
    defense = Defense(PGD(Linf(0.1), steps=1), {"ce": AdversarialCE()}, compile_attack="failing")
    x, _, y = batch(n=6)
    said = r"defense.compile_attack: torch cannot compile Sequential here with failing; expected null.* no kernel for this"
    with unchanged(net), pytest.raises(NotCompiled, match=said):
        defense(net, x, y)
    assert "forward" not in vars(net)


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(ValueError, match=r"defense.compile_attack: expected null or one of .*inductor.*; found 'fast'"):
        Defense(PGD(Linf(0.1)), {"ce": AdversarialCE()}, compile_attack="fast")
    with pytest.raises(ValueError, match="attack_batchnorm=running"):
        Defense(PGD(Linf(0.1)), {"ce": AdversarialCE()}, compile_attack="inductor", attack_batchnorm="batch")
    with pytest.raises(ValueError, match=r"defense.compile_attack: is about the adversarial loss"):
        Defense(None, {"ce": CleanCE()}, compile_attack="inductor")


def test_the_metrics_of_a_step_never_wait_for_the_device():
    module = train.build(config(*SMALL, "panels=[]")).module
    logits, y = torch.randn(6, 10), torch.arange(6)
    with Calls() as seen:
        module.train_accuracy(logits, y)
        module.train_loss(logits.mean())
    assert not WAITS & set(seen.names())
    assert float(module.train_accuracy.compute()) == float((logits.argmax(1) == y).float().mean())


@pytest.mark.long
def test_an_attack_in_low_precision_is_as_strong():
    """Robust accuracy of a robust net, judged in fp32, within 0.3 points whichever precision the attack computes in."""
    from glassarmor.datamodules.digits import Digits

    data = Digits(batch_size=128)
    data.setup("fit")
    x, y = data.train.images.float() / 255, data.train.labels
    torch.manual_seed(0)
    net = SmallCNN(num_classes=10, in_channels=1, mean=data.mean, std=data.std, width=0.5).train()
    defense = Defense(PGD(Linf(0.06), steps=5), {"ce": AdversarialCE()})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for epoch in range(6):
        for rows in torch.randperm(len(x)).split(128):
            defense.at(epoch, int(rows[0]))
            defense(net, x[rows], y[rows]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    attack = PGD(Linf(0.06), steps=20)
    robust = []
    for low in (False, True):
        attack.reseed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            x_adv = attack(net, x, y)
        with undisturbed(net), torch.no_grad():
            robust.append(100 * float((net(x_adv).argmax(1) == y).float().mean()))
    assert 30 < robust[0] < 99
    assert robust[1] == pytest.approx(robust[0], abs=0.3)


def test_a_flag_that_is_set_later_is_seen():
    """Another path through the same modules: what was folded for the first would be wrong for the second."""

    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.skip = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), False

        def forward(self, x):
            made = self.conv(x)
            found = self.norm(made)
            return (found + made if self.skip else found).mean((2, 3))

    torch.manual_seed(0)
    net, x = Switched().eval(), torch.rand(4, 3, 8, 8)
    net.norm.running_mean.fill_(0.3)
    net.norm.weight.data.fill_(1.7)
    for net.skip in (False, True, False):
        with torch.no_grad(), folded(net, x) as light:
            found = light(x)
        with torch.no_grad():
            torch.testing.assert_close(found, net(x))
