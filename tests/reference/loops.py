"""Robust training as plain loops, written from the papers: SGD, one batch after another, nothing of ours but net and data.

Random starts come from a generator that is seeded by the step as ours are, so that a run here and a run of ours with the
same seed, initial weights and batches differ in what they compute and in nothing that they draw.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from glassarmor.datamodules.images import ImageDataModule
from tests.reference.methods import awp_step


@dataclass(frozen=True)
class Budget:
    """What both sides spend: epochs over the data, and steps of the attack of radius ε (L∞)."""

    epochs: int
    steps: int
    eps: float
    lr: float = 0.1
    seed: int = 0

    def seeded(self, seed: int) -> Budget:
        return replace(self, seed=seed)


# -- attacks: the part in common, x' = clip(x' + α·sign ∇) ----------------------------------------------------------------


def climb(x: Tensor, x_adv: Tensor, alpha: float, ball: float, loss: Callable[[Tensor], Tensor]) -> Tensor:
    x_adv = x_adv.detach().clone().requires_grad_()
    loss(x_adv).backward()
    moved = x_adv.detach() + alpha * x_adv.grad.sign()
    return torch.min(torch.max(moved, x - ball), x + ball).clamp(0, 1)


def uniform(x: Tensor, eps: float, draw: Generator) -> Tensor:
    return (torch.rand(x.shape, generator=draw) * 2 - 1) * eps


def pgd(net: nn.Module, x: Tensor, y: Tensor, budget: Budget, draw: Generator) -> Tensor:
    """Madry et al. 2018: random start, sign steps up the cross-entropy, in eval mode."""
    net.eval()
    x_adv = (x + uniform(x, budget.eps, draw)).clamp(0, 1)
    for _ in range(budget.steps):
        x_adv = climb(x, x_adv, 2.5 * budget.eps / budget.steps, budget.eps, lambda z: F.cross_entropy(net(z), y))
    net.train()
    return x_adv


# -- losses of one batch ---------------------------------------------------------------------------------------------------


def pgd_at(net: nn.Module, x: Tensor, y: Tensor, epoch: float, budget: Budget, draw: Generator) -> Tensor:
    return F.cross_entropy(net(pgd(net, x, y, budget, draw)), y)


def alp(net: nn.Module, x: Tensor, y: Tensor, epoch: float, budget: Budget, draw: Generator) -> Tensor:
    """Kannan et al. 2018, as stated here: CE(x') + ½ ‖Z(x) − Z(x')‖²."""
    x_adv = pgd(net, x, y, budget, draw)
    clean, adv = net(x), net(x_adv)
    return F.cross_entropy(adv, y) + 0.5 * ((clean - adv) ** 2).sum(1).mean()


def trades_images(net: nn.Module, x: Tensor, budget: Budget, draw: Generator) -> Tensor:
    net.eval()
    p = F.softmax(net(x), 1).detach()
    x_adv = (x + 0.001 * torch.randn(x.shape, generator=draw)).clamp(0, 1)
    for _ in range(budget.steps):
        x_adv = climb(
            x,
            x_adv,
            2.5 * budget.eps / budget.steps,
            budget.eps,
            lambda z: F.kl_div(F.log_softmax(net(z), 1), p, reduction="sum"),
        )
    net.train()
    return x_adv


def trades_loss(net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    clean, adv = net(x), net(x_adv)
    robust = F.kl_div(F.log_softmax(adv, 1), F.softmax(clean, 1), reduction="batchmean")
    return F.cross_entropy(clean, y) + 6 * robust


def trades(net: nn.Module, x: Tensor, y: Tensor, epoch: float, budget: Budget, draw: Generator) -> Tensor:
    """Zhang et al. 2019: CE(x) + 6 KL(p(x) ‖ p(x'))."""
    return trades_loss(net, x, trades_images(net, x, budget, draw), y)


def mart(net: nn.Module, x: Tensor, y: Tensor, epoch: float, budget: Budget, draw: Generator) -> Tensor:
    """Wang et al. 2020: −log p_y(x') − log(1 − max p_c(x')) + 5 KL(p(x) ‖ p(x')) (1 − p_y(x))."""
    x_adv = pgd(net, x, y, budget, draw)
    clean, adv = F.softmax(net(x), 1), F.softmax(net(x_adv), 1)
    rows = torch.arange(len(y))
    wrong = adv.clone()
    wrong[rows, y] = 0
    boosted = -torch.log(adv[rows, y] + 1e-12) - torch.log(1.0001 - wrong.max(1).values)
    distance = (clean * (torch.log(clean + 1e-12) - torch.log(adv + 1e-12))).sum(1)
    return (boosted + 5 * distance * (1 - clean[rows, y])).mean()


def fgsm_rs(net: nn.Module, x: Tensor, y: Tensor, epoch: float, budget: Budget, draw: Generator) -> Tensor:
    """Wong et al. 2020: one step of 1.25 ε from a uniform start, all in train mode as released."""
    x_adv = (x + uniform(x, budget.eps, draw)).clamp(0, 1)
    return F.cross_entropy(net(climb(x, x_adv, 1.25 * budget.eps, budget.eps, lambda z: F.cross_entropy(net(z), y))), y)


def n_fgsm(net: nn.Module, x: Tensor, y: Tensor, epoch: float, budget: Budget, draw: Generator) -> Tensor:
    """De Jorge et al. 2022: one step of ε from noise of 2 ε, not projected, all in train mode as released."""
    x_adv = (x + uniform(x, 2 * budget.eps, draw)).clamp(0, 1)
    return F.cross_entropy(net(climb(x, x_adv, budget.eps, 1.0, lambda z: F.cross_entropy(net(z), y))), y)


def nuat(net: nn.Module, x: Tensor, y: Tensor, epoch: float, budget: Budget, draw: Generator) -> Tensor:
    """Sriramanan et al. 2021: CE(x) + λ ‖Z(x') − Z(x)‖_* / N, λ rising to 4.5 over the first half; one step of ε."""
    net.eval()
    x_adv = (x + budget.eps * (0.5 - (torch.rand(x.shape, generator=draw) < 0.5).float())).clamp(0, 1)
    clean = net(x).detach()
    x_adv = climb(
        x,
        x_adv,
        budget.eps,
        budget.eps,
        lambda z: F.cross_entropy(net(z), y) + 4.5 * torch.linalg.matrix_norm(net(z) - clean, "nuc") / len(x),
    )
    net.train()
    clean, adv = net(x), net(x_adv)
    weight = 4.5 * min(1.0, epoch / (budget.epochs / 2))
    # Through the singular values: the gradient of the norm itself is not finite at a matrix without full rank.
    return F.cross_entropy(clean, y) + weight * torch.linalg.svdvals(adv - clean).sum() / len(x)


LOSSES = {f.__name__: f for f in (pgd_at, trades, mart, alp, fgsm_rs, n_fgsm, nuat)}


# -- the loop --------------------------------------------------------------------------------------------------------------


def cosine(step: int, total: int) -> float:
    """Share of the learning rate: linear over the first twentieth, then half a cosine."""
    first = max(1, round(0.05 * total))
    return (step + 1) / first if step < first else 0.5 * (1 + math.cos(math.pi * (step - first) / (total - first)))


def train(net: nn.Module, data: ImageDataModule, method: str, budget: Budget, awp: float = 0, ema: float = 0) -> nn.Module:
    """The net that this method leaves behind; with ``ema`` the running average of its weights and statistics.

    Free-AT (Shafahi et al. 2019, algorithm 1) replays each batch four times, on a quarter of the epochs.
    """
    replays = 4 if method == "free_at" else 1
    optimizer = torch.optim.SGD(net.parameters(), budget.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    loader = data.train_dataloader()
    total, step = budget.epochs * len(loader), 0
    average = None
    delta = torch.zeros(data.batch_size, *data.image_shape)
    net.train()
    for epoch in range(budget.epochs // replays):
        for index, (x, y) in enumerate(loader):
            for _ in range(replays):
                for group in optimizer.param_groups:
                    group["lr"] = budget.lr * cosine(step, total)
                draw = torch.Generator().manual_seed(budget.seed * 1_000_003 + step)
                if method == "free_at":
                    noise = delta.clone().requires_grad_()
                    loss = F.cross_entropy(net((x + noise).clamp(0, 1)), y)
                elif awp:
                    x_adv = trades_images(net, x, budget, draw)
                else:
                    loss = LOSSES[method](net, x, y, epoch + index / len(loader), budget, draw)
                optimizer.zero_grad()
                if awp:
                    awp_step(net, lambda one, x=x, x_adv=x_adv, y=y: trades_loss(one, x, x_adv, y), awp)
                else:
                    loss.backward()
                if method == "free_at":
                    delta = (delta + budget.eps * noise.grad.sign()).clamp(-budget.eps, budget.eps)
                optimizer.step()
                step += 1
                if ema:
                    average = averaged(average, net, ema)
    return net if average is None else average


@torch.no_grad()
def averaged(average: nn.Module | None, net: nn.Module, decay: float) -> nn.Module:
    """d · average + (1 − d) · net for every weight and statistic; the first net as it is."""
    if average is None:
        return copy.deepcopy(net)
    for old, new in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
        old.copy_(decay * old + (1 - decay) * new if old.is_floating_point() else new)
    return average


def judged(net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int = 20) -> tuple[Tensor, Tensor]:
    """Which images are classified rightly, and which still under PGD; (N,) bool each."""
    net.eval()
    clean = net(x).argmax(1) == y
    x_adv = pgd(net, x, y, Budget(0, steps, eps), torch.Generator().manual_seed(0))
    net.eval()
    return clean, net(x_adv).argmax(1) == y
