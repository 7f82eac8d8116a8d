"""Invariant 1: whoever borrows a network gives it back bit for bit, exceptions and inference mode included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from glassarmor.interpret.modes import _Scaled, channel_statistics, evaluating, frozen, undisturbed
from tests.reference.nets import batch, conv_bn, unchanged, untidy


@pytest.mark.parametrize("borrow", [evaluating, frozen, undisturbed])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(borrow, fails):
    net = untidy(conv_bn(dropout=0.5))
    x, _, _ = batch()
    with unchanged(net):
        try:
            with borrow(net) as inside:
                assert inside is net
                if borrow is not frozen:
                    net(x)
                    assert not any(m.training for m in net.modules())
                if borrow is not evaluating:
                    assert not any(p.requires_grad for p in net.parameters())
                if fails:
                    raise KeyError("inside")
        except KeyError:
            assert fails


def _train_pass(net: nn.Module) -> None:
    net.bn1.train()
    net.bn1(torch.randn(4, 6, 3, 3) + 5)


def _in_place(net: nn.Module) -> None:
    net.bn1.running_mean.add_(1)
    net.bn2.num_batches_tracked.add_(1)


def _through_data(net: nn.Module) -> None:
    net.bn1.running_var.data.mul_(2)


def _replaced(net: nn.Module) -> None:
    net.bn1.running_mean = torch.ones(6)


def _gradients(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    net(torch.rand(2, 3, 8, 8)).sum().backward()
    assert net.head.weight.grad.abs().sum() > 0


def _modes(net: nn.Module) -> None:
    net.train()


@pytest.mark.parametrize("change", [_train_pass, _in_place, _through_data, _replaced, _gradients, _modes])
@pytest.mark.parametrize("fails", [False, True])
def test_undisturbed_undoes_what_is_done_inside(change, fails):
    """A train-mode BatchNorm writes its statistics without touching their version counter: counters can't be trusted."""
    net = untidy(conv_bn())
    with unchanged(net):
        try:
            with undisturbed(net):
                change(net)
                if fails:
                    raise KeyError("inside")
        except KeyError:
            assert fails


def test_undisturbed_does_not_break_a_graph_made_before():
    """Writing equal values back must not look like an in-place change to a pending backward."""
    net = conv_bn().eval()
    x, x_adv, _ = batch()
    loss = net(x).square().sum()
    with undisturbed(net):
        net(x_adv)
    loss.backward()
    assert net.conv1.weight.grad.abs().sum() > 0


def test_undisturbed_gives_input_gradients_inside_inference_mode():
    net = untidy(conv_bn())
    x, _, y = batch()
    with torch.inference_mode(), unchanged(net), undisturbed(net):
        images = x.clone().requires_grad_()
        loss = net(images).gather(1, y[:, None]).sum()
        (gradient,) = torch.autograd.grad(loss, images)
        assert gradient.abs().sum() > 0
        _train_pass(net)
    assert not torch.is_inference(net.bn1.running_mean)


def test_nested_and_shared_modules_get_their_own_mode_back():
    shared = nn.BatchNorm1d(3)
    net = nn.Sequential(shared, nn.Sequential(nn.Linear(3, 3), shared)).train()
    shared.eval()
    with unchanged(net), undisturbed(net), evaluating(net), frozen(net):
        net(torch.randn(4, 3))


def test_batch_statistics_and_scaling_have_true_first_and_second_gradients(double_precision):
    x = torch.randn(3, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    scale, shift = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, variance = channel_statistics(x)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.var((0, 2, 3), correction=0))
    for function, inputs in ((channel_statistics, (x,)), (_Scaled.apply, (x, scale, shift))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
