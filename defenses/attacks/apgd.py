"""APGD: projected gradient ascent that chooses its own steps (Croce & Hein 2020, 2003.01690), untargeted and targeted.

Ours, beside the paper: an image that has fallen is attacked no further, so that time goes to those that still stand; and
where the ascent returns to its best point, it starts there without momentum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final, Literal

import torch
from torch import Tensor, nn

from glassarmor.defenses.attacks.draws import Seeded
from glassarmor.defenses.attacks.objectives import CrossEntropy, Objective, TargetedDLR, TargetedMargin
from glassarmor.defenses.losses import margin
from glassarmor.defenses.options import require_number, require_one_of, require_whole
from glassarmor.defenses.threat import Threat, per_sample
from glassarmor.interpret.inputs import borrowed
from glassarmor.interpret.modes import as_module

MOMENTUM: Final = 0.75  # α, the share of the new step


def checkpoints(steps: int) -> tuple[int, ...]:
    """The iterations at which the step size is reconsidered: w_j = ⌈p_j · N⌉, p_1 = 0.22, eq. 3 of the paper."""
    before, now, found = 0.0, 0.22, list[int]()
    while now <= 1:
        found.append(math.ceil(round(now * steps, 9)))
        before, now = now, now + max(now - before - 0.03, 0.06)
    return tuple(dict.fromkeys(found))


def halves(rises: Tensor, since: int, halved_before: Tensor, best: Tensor, best_before: Tensor, rho: float = 0.75) -> Tensor:
    """Whose step is halved at a checkpoint, (N,) bool: conditions 1 and 2 of the paper, section 3.

    Args:
        rises: iterations since the last checkpoint in which the objective rose, (N,).
        since: iterations since the last checkpoint.
        halved_before: whether the last checkpoint halved the step, (N,) bool.
        best, best_before: the highest objective now and at the last checkpoint, (N,).
        rho: the share of rises that a good step size brings.
    """
    return (rises < rho * since) | (~halved_before & (best <= best_before))


@dataclass
class _Ascent:
    """What the ascent knows of each image that still stands; every field is (N, ...)."""

    row: Tensor  # place in the batch
    x: Tensor
    y: Tensor
    clean: Tensor  # logits at x
    at: Tensor  # the current point
    before: Tensor  # the point before it
    gradient: Tensor  # at the current point
    value: Tensor  # objective there
    best: Tensor
    best_gradient: Tensor
    best_value: Tensor
    best_lead: Tensor  # margin at the best point
    checked_value: Tensor  # best value at the last checkpoint
    rises: Tensor
    halved: Tensor
    step: Tensor

    def keep(self, which: Tensor) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[which])


class APGD(Seeded):
    """Auto-PGD: momentum, and a step from 2ε on that is halved for each image whose objective no longer rises.

    An image that is misclassified is returned as it is, one that falls at the first point found that is misclassified, one
    that stands at the point of largest margin among the best of each run.  Per call and image at most
    1 + restarts · (steps + 1) forwards and restarts · steps backwards.

    Args:
        threat: the ball.
        steps: iterations of a run.
        restarts: runs from further random points, on the images that still stand.
        objective: what is maximised; DLR() as in the paper for logits that saturate.
        rho: a step is kept while at least this share of the iterations rise.
        seed: of the attack's own generator, as in :class:`.PGD`.

    Raises:
        ValueError: no steps, no restarts, or rho outside (0, 1).
    """

    def __init__(
        self,
        threat: Threat,
        steps: int = 100,
        restarts: int = 1,
        objective: Objective | None = None,
        rho: float = 0.75,
        seed: int = 0,
    ) -> None:
        require_whole("attack.steps", steps, 1)
        require_whole("attack.restarts", restarts, 1)
        require_number("attack.rho", rho, "(0, 1)")
        self.threat = threat
        self.steps = steps
        self.restarts = restarts
        self.objective: Objective = CrossEntropy() if objective is None else objective
        self.rho = rho
        self.seed = seed
        self.calls = 0

    def objectives(self, classes: int) -> Sequence[Objective]:
        """What is maximised, one after the other."""
        return (self.objective,)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images (N, C, H, W), fp32, detached.

        Args:
            net: run in eval mode; modes, flags, buffers and gradients are put back.
            x: images in [0,1], (N, C, H, W).
            y: true labels (N,).
        """
        net = as_module(net)
        with borrowed(net, x, y) as (x, y):
            generator = self.generator(x.device)
            with torch.no_grad():
                clean = net(x).float()
            found, lead = x.clone(), clean.new_full((len(x),), -torch.inf)
            standing = (clean.argmax(1) == y).nonzero().flatten()
            for objective in self.objectives(clean.shape[1]):
                for _ in range(self.restarts):
                    if len(standing):
                        fallen = self._run(net, x, y, clean, standing, objective, generator, found, lead)
                        standing = standing[~fallen[standing]]
        return found

    def _run(
        self,
        net: nn.Module,
        x: Tensor,
        y: Tensor,
        clean: Tensor,
        rows: Tensor,
        objective: Objective,
        generator: torch.Generator,
        found: Tensor,
        lead: Tensor,
    ) -> Tensor:
        """One run on these rows; writes the points found and their margins, returns who fell, (N,) bool."""
        fallen = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        state = self._begin(x[rows], y[rows], clean[rows], rows, generator)
        marks, last = frozenset(checkpoints(self.steps)), 0
        for k in range(self.steps + 1):
            value, gradient, ahead, wrong = self._look(net, state, objective, slope=k < self.steps)
            state.rises += value > state.value
            better = value > state.best_value
            state.best = torch.where(per_sample(better, state.x), state.at, state.best)
            state.best_gradient = torch.where(per_sample(better, state.x), gradient, state.best_gradient)
            state.best_value = torch.where(better, value, state.best_value)
            state.best_lead = torch.where(better, ahead, state.best_lead)
            state.value, state.gradient = value, gradient
            if k == 0:
                state.rises.zero_()  # there was no point before the first
                state.checked_value = state.best_value
            if wrong.any():
                found[state.row[wrong]], fallen[state.row[wrong]] = state.at[wrong], True
                state.keep(~wrong)
                if not len(state.row):
                    return fallen
            if k in marks:
                self._reconsider(state, k - last)
                last = k
            if k < self.steps:
                self._move(state, momentum=k > 0)
        further = state.best_lead > lead[state.row]
        found[state.row[further]], lead[state.row[further]] = state.best[further], state.best_lead[further]
        return fallen

    def _begin(self, x: Tensor, y: Tensor, clean: Tensor, rows: Tensor, generator: torch.Generator) -> _Ascent:
        at = self.threat.project(x, x + self.threat.noise(x, generator))
        lowest = clean.new_full((len(x),), -torch.inf)
        zeros = torch.zeros_like(x)
        return _Ascent(
            row=rows,
            x=x,
            y=y,
            clean=clean,
            at=at,
            before=at,
            gradient=zeros,
            value=lowest,
            best=at,
            best_gradient=zeros,
            best_value=lowest,
            best_lead=lowest,
            checked_value=lowest,
            rises=torch.zeros(len(x), dtype=torch.long, device=x.device),
            halved=torch.zeros(len(x), dtype=torch.bool, device=x.device),
            step=x.new_full((len(x),), 2 * self.threat.eps),
        )

    def _look(
        self, net: nn.Module, state: _Ascent, objective: Objective, slope: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Objective, its gradient (where asked for), margin, and whether the point is misclassified."""
        at = state.at.detach().requires_grad_(slope)
        with torch.set_grad_enabled(slope):
            logits = net(at)
            value = objective(logits, state.y, state.clean)
        # A sum, not a mean: in low precision a mean's small gradients underflow to sign 0.
        gradient = torch.autograd.grad(value.sum(), at)[0] if slope else state.gradient
        logits = logits.detach().float()
        return value.detach().float(), gradient, margin(logits, state.y), logits.argmax(1) != state.y

    def _reconsider(self, state: _Ascent, since: int) -> None:
        """At a checkpoint: halve steps that no longer help, and go back to the best point there."""
        halved = halves(state.rises, since, state.halved, state.best_value, state.checked_value, self.rho)
        wide = per_sample(halved, state.x)
        state.step = torch.where(halved, state.step / 2, state.step)
        state.at = torch.where(wide, state.best, state.at)
        state.before = torch.where(wide, state.best, state.before)
        state.gradient = torch.where(wide, state.best_gradient, state.gradient)
        state.value = torch.where(halved, state.best_value, state.value)
        state.halved, state.checked_value = halved, state.best_value
        state.rises = torch.zeros_like(state.rises)

    def _move(self, state: _Ascent, momentum: bool) -> None:
        """x⁺ = P(x + α (P(x + η g) − x) + (1 − α) (x − x⁻)), eq. 1 of the paper; the first step has no past."""
        step = per_sample(state.step, state.x) * self.threat.ascent(state.gradient)
        moved = self.threat.project(state.x, state.at + step)
        if momentum:
            moved = state.at + MOMENTUM * (moved - state.at) + (1 - MOMENTUM) * (state.at - state.before)
            moved = self.threat.project(state.x, moved)
        state.before, state.at = state.at, moved


class APGDT(APGD):
    """APGD towards each of the ``targets`` most likely wrong classes of the clean image in turn (APGD-T).

    Per call and image at most 1 + targets · restarts · (steps + 1) forwards and targets · restarts · steps backwards.

    Args:
        targets: as many as there are, where there are fewer.
        loss: "dlr", the targeted difference-of-logits ratio, which needs 4 classes; or "margin", Z_t − Z_y.
        For the others see :class:`APGD`.

    Raises:
        ValueError: as APGD, no target, or another loss; when called, "dlr" with fewer than 4 classes.
    """

    def __init__(
        self,
        threat: Threat,
        steps: int = 100,
        targets: int = 9,
        restarts: int = 1,
        loss: Literal["dlr", "margin"] = "dlr",
        rho: float = 0.75,
        seed: int = 0,
    ) -> None:
        super().__init__(threat, steps, restarts, None, rho, seed)
        require_whole("attack.targets", targets, 1)
        require_one_of("attack.loss", loss, ("dlr", "margin"))
        self.targets = targets
        self.loss = loss

    def objectives(self, classes: int) -> Sequence[Objective]:
        towards = TargetedDLR if self.loss == "dlr" else TargetedMargin
        return [towards(rank) for rank in range(1, min(self.targets, classes - 1) + 1)]
