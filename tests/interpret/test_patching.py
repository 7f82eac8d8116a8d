"""Exact patching: equal to brute force on any graph, at the cost of what lies above the layer, and nothing left behind."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from glassarmor.interpret.signals.conductance import conductance
from glassarmor.interpret.signals.patching import cut, rerun, unit_patching
from tests.reference.nets import Residual, batch, conv_bn, unchanged, untidy
from tests.reference.trained import attacked


class Shared(nn.Module):
    """One ReLU for all, in place; a functional in-place sum; a module that returns a pair; glue between the modules."""

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Conv2d(4, 4, 3, padding=1)
            self.right = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.fork = self.Fork()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.weight.mul_(4)  # so that a unit moves the logits

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(2 * x - 1))
        left, right = self.fork(x)
        out = self.conv(self.relu(left))
        out += right
        return self.head(self.relu(out).mean((2, 3)))


def brute_force(net: nn.Module, layer: str, x: Tensor, x_adv: Tensor, unit: int) -> Tensor:
    """Logits with one unit replaced, by a hook in a whole forward."""
    kept = []
    module = net.get_submodule(layer)
    handle = module.register_forward_hook(lambda _m, _i, out: kept.append(out.clone()))
    net(x)
    handle.remove()

    def replace(_module, _inputs, output):
        output = output.clone()
        output[:, unit] = kept[0][:, unit]
        return output

    handle = module.register_forward_hook(replace)
    logits = net(x_adv)
    handle.remove()
    return logits.detach()


CASES = [
    *[(conv_bn, layer) for layer in ("conv1", "bn1", "act1", "conv2", "act2", "pool", "flatten", "head")],
    *[(Residual, layer) for layer in ("stem", "block1.conv", "block1.shortcut", "block1", "block2.bn", "block2", "head")],
    *[(Shared, layer) for layer in ("stem", "fork.left", "fork.right", "conv", "head")],
]


@pytest.mark.parametrize(("make", "layer"), CASES)
@pytest.mark.parametrize("chunk", [1, 9, 128])
def test_equals_brute_force_on_any_graph_and_leaves_the_net_alone(make, layer, chunk):
    torch.manual_seed(0)
    net = make()
    x, x_adv, y = batch(n=3)
    target = (y + 1) % 5
    untidy(net)
    with unchanged(net):
        found = unit_patching(net, x, x_adv, y, target, layer=layer, chunk=chunk)
    net.eval()
    z, rows = net(x_adv).detach(), torch.arange(3)
    for unit in range(found.promotion.shape[1]):
        patched = brute_force(net, layer, x, x_adv, unit)
        torch.testing.assert_close(found.promotion[:, unit], (z - patched)[rows, target], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.suppression[:, unit], (patched - z)[rows, y], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.total_suppression, (net(x).detach() - z)[rows, y], rtol=1e-4, atol=1e-5)
    assert found.margin.abs().max() > 1e-3


def test_only_what_lies_above_runs_again():
    net = Residual().eval()
    x, x_adv, y = batch(n=2)
    samples: Counter[str] = Counter()
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            forward = type(module).forward

            def counted(inputs, name=name, module=module, forward=forward):
                samples[name] += len(inputs)
                return forward(module, inputs)

            module.forward = counted
    unit_patching(net, x, x_adv, y, layer="block2.bn", chunk=6)
    whole, patched = 4 + 3, 2 * 8  # both passes and the small one that learns the axes; 8 units of 2 samples
    assert {name for name, n in samples.items() if n == whole} == {
        "stem", "block1.conv", "block1.bn", "block1.shortcut", "block2.conv", "block2.bn",
    }  # fmt: skip
    assert {name for name, n in samples.items() if n == whole + patched} == {"block2.shortcut", "norm", "head"}


def test_rerun_with_the_activation_of_its_own_pass_gives_its_logits():
    net = Residual().eval()
    x, x_adv, _ = batch(n=3)
    at = cut(net, "block1", x_adv)
    torch.testing.assert_close(rerun(net, at, at.activation.repeat(2, 1, 1, 1)), at.logits.repeat(2, 1))
    # Nothing goes around block1, so the other image's activation gives the other image's logits.
    torch.testing.assert_close(rerun(net, at, cut(net, "block1", x).activation), net(x).detach(), rtol=1e-4, atol=1e-5)


def test_exact_where_the_logit_is_linear_in_the_layer():
    """There patching one unit undoes exactly its conductance; below, the two still rank units alike."""
    net, x, x_adv, y, target = attacked(n=8)
    ours = conductance(net, x, x_adv, y, target, layers=["act1", "act2"])
    exact = unit_patching(net, x, x_adv, y, layer="act2")
    torch.testing.assert_close(exact.promotion, ours.units["act2"].promotion, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(exact.suppression, ours.units["act2"].suppression, rtol=1e-3, atol=1e-4)
    assert exact.relative_gap < 1e-5
    margins = [unit_patching(net, x, x_adv, y, layer="act1").margin.flatten(), ours.units["act1"].margin.flatten()]
    assert float(torch.corrcoef(torch.stack(margins))[0, 1]) > 0.95


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 5)
        self.spare = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "layer", "message"),
    [
        (conv_bn, "act3", "the network has no layer 'act3'"),
        (Twice, "conv", "'conv' ran twice in one forward"),
        (Twice, "spare", "'spare' recorded nothing in this forward"),
        (Shared, "fork", "'fork' must return one tensor of 4 rows, found tuple"),
    ],
)
def test_layers_that_cannot_be_patched(make, layer, message):
    net = untidy(make())
    with unchanged(net), pytest.raises(ValueError, match=message):
        unit_patching(net, *batch(), layer=layer)


def test_a_failing_rerun_leaves_the_net_alone():
    net = conv_bn().eval()
    at = cut(net, "act1", batch()[0])
    with unchanged(net), pytest.raises(RuntimeError):
        rerun(net, at, torch.zeros(4, 3, 8, 8))
