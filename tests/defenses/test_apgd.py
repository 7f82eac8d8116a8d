"""APGD: the paper's algorithm, closed forms on linear nets, the ball, who is attacked again, and its cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from torch import Tensor, nn

from glassarmor.defenses.attacks.apgd import APGD, APGDT, checkpoints, halves
from glassarmor.defenses.attacks.objectives import DLR, CrossEntropy, Margin, TargetedDLR, TargetedMargin
from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.evaluation.inputs import counted
from glassarmor.defenses.losses import margin
from glassarmor.defenses.threat import L2, Linf
from tests.reference import apgd as reference
from tests.reference.nets import Linear, seeded


class Bowl(nn.Module):
    """Z = (0, −‖A(x − c)‖² + lift): class 0's rival is highest at c; a hard surface where A is ill-conditioned."""

    def __init__(self, inputs: int, lift: float, seed: int = 0) -> None:
        super().__init__()
        scale = torch.logspace(0, 1.5, inputs, dtype=torch.float64)
        turn = torch.linalg.qr(torch.randn(inputs, inputs, generator=seeded(seed), dtype=torch.float64)).Q
        self.A = nn.Parameter(torch.diag(scale) @ turn)
        self.c = nn.Parameter(torch.full((inputs,), 0.55, dtype=torch.float64))
        self.lift = lift

    def forward(self, x: Tensor) -> Tensor:
        rival = self.lift - ((x.flatten(1) - self.c) @ self.A.T).square().sum(1)
        return torch.stack([torch.zeros_like(rival), rival], 1)


@pytest.mark.parametrize("threat", [Linf(0.125), L2(0.25)], ids=str)
def test_the_reference_in_float64_takes_the_same_way(threat, double_precision) -> None:
    """On a badly conditioned bowl the step is halved many times, for each image by itself."""
    net = Bowl(12, lift=-1.0)
    x = torch.rand(5, 1, 3, 4, generator=seeded(1), dtype=torch.float64) * 0.6 + 0.2
    y = torch.zeros(5, dtype=torch.long)
    attack = APGD(threat, steps=60, objective=Margin(), seed=3)
    found = attack(net, x, y)
    noise = threat.noise(x, torch.Generator().manual_seed(3 * 1_000_003))
    starts = threat.project(x, x + noise)
    A, c = net.A.detach().numpy(), net.c.detach().numpy()
    halvings = set()
    for image, start, ours in zip(x, starts, found, strict=True):
        best, value, sizes = reference.apgd(
            lambda z: -1 - ((A @ (z - c)) ** 2).sum(),
            lambda z: -2 * A.T @ A @ (z - c),
            image.flatten().numpy(),
            start.flatten().numpy(),
            threat.eps,
            60,
            threat.p,
        )
        np.testing.assert_allclose(ours.flatten().numpy(), best, atol=1e-9)
        assert float(margin(net(ours[None]), y[:1])) == pytest.approx(value, abs=1e-9)
        halvings.add(tuple(sizes))
    assert len(halvings) > 1  # images halve at times of their own
    assert all(sizes[-1] < sizes[0] / 4 for sizes in halvings)


@pytest.mark.parametrize("objective", [CrossEntropy(), Margin()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.4)], ids=str)
def test_the_optimum_on_a_linear_net_is_reached(threat, objective) -> None:
    """With two live classes the margin rises by at most ε times the dual norm of w_1 − w_0, and it does."""
    net = Linear((1, 4, 4), 3)
    with torch.no_grad():
        net.head.bias.copy_(torch.tensor([12.0, 4.0, -20.0]))  # too far to fall, and the third class out of play
    x = torch.rand(6, 1, 4, 4, generator=seeded(2)) * 0.1 + 0.45
    y = torch.zeros(6, dtype=torch.long)
    found = APGD(threat, steps=40, objective=objective)(net, x, y)
    slope = (net.head.weight[1] - net.head.weight[0]).detach()
    gain = threat.eps * float(slope.abs().sum() if threat.p == float("inf") else slope.norm())
    expected = margin(net(x), y) + gain
    torch.testing.assert_close(margin(net(found), y), expected, rtol=0, atol=2e-3)


def test_checkpoints_are_those_of_the_paper() -> None:
    assert checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
    for steps in (1, 2, 5, 20, 33, 50, 77, 1000):
        assert list(checkpoints(steps)) == sorted(set(reference.marks(steps)))


def test_the_step_is_halved_by_the_two_conditions_of_the_paper() -> None:
    rises = torch.tensor([14, 15, 20, 20, 20])  # of 20: three quarters are 15
    halved_before = torch.tensor([False, False, False, True, False])
    best = torch.tensor([2.0, 2.0, 1.0, 1.0, 1.5])
    before = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    found = halves(rises, 20, halved_before, best, before)
    # too few rises; enough; no better best with the same step; no better best, but the step is new; all well
    assert found.tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_targets_fell_exactly_what_some_target_can(classes) -> None:
    """Linear net, images inside: class t overtakes exactly where Z_t − Z_y + ε‖w_t − w_y‖₁ > 0."""
    net = Linear((1, 4, 4), classes)
    x = torch.rand(200, 1, 4, 4, generator=seeded(3)) * 0.6 + 0.2
    logits = net(x).detach()
    y = logits.argmax(1)
    w = net.head.weight.detach()
    reach = logits - logits.gather(1, y[:, None]) + 0.05 * (w[None] - w[y][:, None]).abs().sum(2)
    reach = reach.scatter(1, y[:, None], -torch.inf)
    clear = (reach.abs() > 1e-3).all(1)  # not on the edge, where rounding decides
    can = (reach > 0).any(1)
    assert 20 < int(can.sum()) < 180
    found = APGDT(Linf(0.05), 30, targets=9, loss="margin")(net, x, y)
    fell = net(found).argmax(1) != y
    assert torch.equal(fell[clear], can[clear])
    # Only the strongest rival of the clean image is aimed at: whom it can reach falls.
    rival = logits.scatter(1, y[:, None], -torch.inf).argmax(1, keepdim=True)
    aimed = net(APGDT(Linf(0.05), 30, targets=1, loss="margin")(net, x, y)).argmax(1) != y
    assert aimed[clear & (reach.gather(1, rival).squeeze(1) > 0)].all()
    assert not aimed[clear & ~can].any()
    if classes == 6:  # and some fall to another rival than the strongest, which is what the further targets are for
        assert int(fell.sum()) > int(aimed.sum())


def test_the_ratio_losses_are_those_of_the_package() -> None:
    logits = torch.randn(50, 7, generator=seeded(4))
    clean = torch.randn(50, 7, generator=seeded(5))
    y = torch.randint(7, (50,), generator=seeded(6))
    package = AutoAttack(nn.Identity(), norm="Linf", eps=0.1)
    torch.testing.assert_close(DLR()(logits, y, None), package.apgd.dlr_loss(logits, y))
    order = clean.scatter(1, y[:, None], -torch.inf).sort(dim=1, descending=True)[1]
    for rank in (1, 3, 6):
        package.apgd_targeted.y_target = order[:, rank - 1]
        torch.testing.assert_close(TargetedDLR(rank)(logits, y, clean), package.apgd_targeted.dlr_loss_targeted(logits, y))
        expected = logits.gather(1, order[:, rank - 1, None]) - logits.gather(1, y[:, None])
        torch.testing.assert_close(TargetedMargin(rank)(logits, y, clean), expected.squeeze(1))


def mlp(classes: int = 5) -> nn.Module:
    """Five live classes and a curved surface on images (N, 1, 6, 6)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, classes)).eval()
    with torch.no_grad():
        net[1].weight.mul_(6)
        net[3].weight.mul_(4)
    return net


@pytest.mark.parametrize("threat", [Linf(0.03), L2(0.15)], ids=str)
def test_as_strong_as_the_package_at_the_same_budget(threat) -> None:
    net = mlp()
    x = torch.rand(200, 1, 6, 6, generator=seeded(7)) * 0.8 + 0.1
    y = net(x).argmax(1)
    package = AutoAttack(net, norm=threat.name, eps=threat.eps, seed=0)
    package.apgd.n_iter, package.apgd.loss, package.apgd.n_restarts = 50, "ce", 1
    theirs = net(package.apgd.perturb(x, y)).argmax(1) == y
    ours = net(APGD(threat, 50)(net, x, y)).argmax(1) == y
    assert 0.2 < float(theirs.float().mean()) < 0.9
    assert int(ours.sum()) <= int(theirs.sum())
    assert float((ours == theirs).float().mean()) > 0.97


def test_what_fell_is_attacked_no_further_and_the_budget_is_kept() -> None:
    net = mlp()
    x = torch.rand(6, 1, 6, 6, generator=seeded(7))
    y = net(x).argmax(1)
    for attack, runs in ((APGD(Linf(0.0), 7, restarts=3), 3), (APGDT(Linf(0.0), 7, targets=3), 3)):  # nobody can fall
        with counted(net) as passes:
            attack(net, x, y)
        assert (passes.forwards, passes.backwards) == (6 * (1 + runs * 8), 6 * runs * 7)
    wrong = (y + 1) % 5
    with counted(net) as passes:
        assert torch.equal(APGD(Linf(0.1), 7)(net, x, wrong), x)  # misclassified from the start
    assert (passes.forwards, passes.backwards) == (6, 0)
    with counted(net) as passes:
        found = APGD(Linf(0.5), 50, restarts=3)(net, x, y)
    assert (net(found).argmax(1) != y).all()
    assert passes.backwards < 6 * 10


def test_worse_or_equal_for_the_net_than_pgd_on_a_saturated_softmax() -> None:
    """Logits a thousand times as large: the cross-entropy's gradient is zero in fp32, the ratio's is not."""
    net = Linear((1, 4, 4), 4)
    x = torch.rand(100, 1, 4, 4, generator=seeded(8)) * 0.6 + 0.2
    y = net(x).argmax(1)
    with torch.no_grad():
        net.head.weight.mul_(1000)
        net.head.bias.mul_(1000)
    stand = {
        "ce": net(PGD(Linf(0.05), 20)(net, x, y)).argmax(1) == y,
        "dlr": net(APGD(Linf(0.05), 20, objective=DLR())(net, x, y)).argmax(1) == y,
    }
    assert int(stand["dlr"].sum()) < int(stand["ce"].sum())


@pytest.mark.parametrize(("objective", "classes"), [(DLR(), 2), (TargetedDLR(), 3)], ids=["dlr", "targeted"])
def test_too_few_classes_are_refused_with_the_reason(objective, classes) -> None:
    logits = torch.zeros(1, classes)
    with pytest.raises(ValueError, match=f"needs {classes + 1} classes, found {classes}; with fewer take a margin loss"):
        objective(logits, torch.tensor([0]), logits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: APGD(Linf(0.1), steps=0), "steps: expected a whole number >= 1"),
        (lambda: APGD(Linf(0.1), restarts=0), "restarts: expected a whole number >= 1"),
        (lambda: APGD(Linf(0.1), rho=1.0), "attack.rho"),
        (lambda: APGDT(Linf(0.1), targets=0), "attack.targets"),
        (lambda: APGDT(Linf(0.1), loss="ce"), "attack.loss"),
        (lambda: TargetedDLR(0), "objective.rank"),
        (lambda: TargetedMargin(2)(torch.zeros(1, 2), torch.tensor([0]), torch.zeros(1, 2)), "expected 1..1"),
    ],
)
def test_bad_settings_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_finite_gradients_where_the_ratio_has_no_denominator() -> None:
    logits = torch.zeros(1, 5, requires_grad=True)
    loss = DLR()(logits, torch.tensor([0]), None) + TargetedDLR()(logits, torch.tensor([0]), logits.detach())
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all()
    assert F.relu(gradient).sum() > 0
