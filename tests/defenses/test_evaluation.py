"""Accuracy under attack: exact counts over unequal batches, repeatable, the net as it was."""

from __future__ import annotations

import pytest
import torch

from glassarmor.defenses.attacks.pgd import FGSM, PGD
from glassarmor.defenses.evaluation.accuracy import accuracy_under
from glassarmor.defenses.threat import Linf
from tests.reference.nets import Linear, batch, conv_bn, unchanged, untidy

CPU = torch.device("cpu")


def data(sizes=(5, 1, 8)):
    return [batch(n=n, seed=i)[::2] for i, n in enumerate(sizes)]


def test_counts_are_exact_over_unequal_batches():
    net = conv_bn().eval()
    batches = data()
    attacks = {"fgsm": FGSM(Linf(0.1)), "pgd": PGD(Linf(0.1), steps=3)}
    found = accuracy_under(net, batches, attacks, CPU)
    assert list(found) == ["clean", "fgsm", "pgd"]
    correct = sum(int((net(x).argmax(1) == y).sum()) for x, y in batches)
    assert found["clean"] == correct / 14
    fresh = FGSM(Linf(0.1))
    assert found["fgsm"] == sum(int((net(fresh(net, x, y)).argmax(1) == y).sum()) for x, y in batches) / 14
    assert len({correct / 14, sum((net(x).argmax(1) == y).float().mean().item() for x, y in batches) / 3}) == 2


def test_accuracy_falls_from_clean_to_pgd_to_a_larger_ball():
    net = Linear((3, 8, 8), 5)
    batches = [(x, net(x).argmax(1)) for x, _ in data()]
    found = accuracy_under(net, batches, {"weak": PGD(Linf(0.005)), "strong": PGD(Linf(0.5))}, CPU)
    assert found["clean"] == 1
    assert found["clean"] > found["weak"] > found["strong"] == 0


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_repeatable_wherever_it_is_called_and_the_net_is_left_alone(context):
    attacks = {"pgd": PGD(Linf(0.03), steps=2)}
    net = untidy(conv_bn(dropout=0.5))
    expected = accuracy_under(net, data(), attacks, CPU)
    with context():
        batches = data()
        with unchanged(net):
            assert accuracy_under(net, batches, attacks, CPU) == expected


def test_the_random_start_belongs_to_the_batch_number():
    seen = []

    class Spy(PGD):
        def __call__(self, net, x, y):
            seen.append(self.calls)
            return super().__call__(net, x, y)

    attack = Spy(Linf(0.1), steps=1)
    attack(conv_bn(), *data()[0])
    accuracy_under(conv_bn(), data(), {"pgd": attack}, CPU)
    assert seen == [0, 0, 1, 2]


def test_no_batch_is_an_error():
    with pytest.raises(ValueError, match="evaluation: expected at least one batch, found none"):
        accuracy_under(conv_bn(), [], {}, CPU)
