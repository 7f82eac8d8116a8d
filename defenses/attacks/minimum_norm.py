"""Minimum-norm attacks: the smallest change that is misclassified, wherever in [0,1] it leads.

All minimise  c · hinge(x') + size(x' − x)  for a constant c that is searched, image by image: the smaller the c that still
succeeds, the smaller the change.  What differs is the size (squared L2, elastic net, groups of pixels) and the descent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from copy import copy
from typing import ClassVar, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassarmor.defenses.attacks.objectives import Margin, Targeted
from glassarmor.defenses.attacks.supported import Masked
from glassarmor.defenses.losses import margin
from glassarmor.defenses.options import require_number, require_one_of, require_whole
from glassarmor.defenses.threat import Linf, Threat, norms, parse_eps, per_sample
from glassarmor.interpret.inputs import borrowed
from glassarmor.interpret.modes import as_module

HALVINGS: Final = 8
Lead = Callable[[Tensor], Tensor]  # images (N, C, H, W) → by how many logits the attack has won, (N,)


class Box(Linf):
    """All images: the set of an attack whose change is small by its own choice and not by a budget."""

    name = "Box"

    def __init__(self) -> None:
        super().__init__(1.0)

    def __repr__(self) -> str:
        return "[0,1]"


class MinimumNorm(ABC):
    """The search over c, and the best image of each sample, for whichever descent a subclass brings.

    Where no change was found that succeeds, the clean image is returned (as Foolbox and adversarial-library do), so
    ``net(x_adv).argmax(1) != y`` marks the successes.  An image that is misclassified from the start is returned as it
    is.  Nothing is random.  At the end the best change is shortened along its own line, by bisection (ours: eight forwards).

    Args:
        steps: of the descent for each c.
        search_steps: values of c that are tried: ten times the last until one succeeds, then bisection.
        step_size: of the descent.
        initial_c: the first c.
        confidence: κ ≥ 0: logits by which the attack has to win.
        objective: Margin() for any wrong class, or Targeted(offset) for the class (y + offset) mod K.
        abort_early: end a descent when no sample's loss has fallen by 0.01 % in a tenth of the steps.

    Raises:
        ValueError: an option out of its range.
    """

    p: ClassVar[float]  # of the norm that is to be small

    def __init__(
        self,
        steps: int,
        search_steps: int,
        step_size: float,
        initial_c: float,
        confidence: float,
        objective: Margin | Targeted | None,
        abort_early: bool,
    ) -> None:
        require_whole("attack.steps", steps, 1)
        require_whole("attack.search_steps", search_steps, 1)
        require_number("attack.step_size", step_size, "(0, inf)")
        require_number("attack.initial_c", initial_c, "(0, inf)")
        require_number("attack.confidence", confidence, "[0, inf)")
        self.objective = Margin() if objective is None else objective
        if not isinstance(self.objective, Margin | Targeted):
            raise ValueError(
                f"attack.objective: expected Margin or Targeted, what decides success; found {type(objective).__name__}"
            )
        self.steps = steps
        self.search_steps = search_steps
        self.step_size = step_size
        self.initial_c = initial_c
        self.confidence = confidence
        self.abort_early = abort_early

    @property
    def threat(self) -> Threat:
        return Box()

    def reseed(self, call: int) -> None:  # noqa: B027  not abstract: nothing is random
        """Nothing to do: nothing is random."""

    def distortion(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """What the attack keeps small: the p-norm of x' − x, (N,)."""
        return norms(x_adv - x, self.p)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images (N, C, H, W), fp32, detached, in [0,1]; the clean image where none was found.

        Args:
            net: run in eval mode; modes, flags, buffers and gradients are put back.
            x: images in [0,1], (N, C, H, W).
            y: true labels (N,).
        """
        net = as_module(net)
        with borrowed(net, x, y) as (x, y):
            return self._attack(net, x, y)

    def _attack(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self._search(self._lead(net, y), x)

    def _lead(self, net: nn.Module, y: Tensor) -> Lead:
        def lead(images: Tensor) -> Tensor:
            logits = net(images)
            if isinstance(self.objective, Targeted):
                return -margin(logits, self.objective.target(y, logits.shape[1]))
            return margin(logits, y)

        return lead

    def _search(self, lead: Lead, x: Tensor) -> Tensor:
        with torch.no_grad():
            done = lead(x) > self.confidence
        best, smallest = x.clone(), torch.where(done, 0.0, torch.inf)
        c, lower, upper = (torch.full_like(smallest, value) for value in (self.initial_c, 0.0, torch.inf))
        for _ in range(self.search_steps):
            succeeded = torch.zeros_like(done)
            before = torch.full_like(smallest, torch.inf)
            for step, (images, ahead) in enumerate(self._descend(lead, x, c)):
                success = ahead > self.confidence
                size = self._size(images - x)
                better = success & (size < smallest)
                best = torch.where(per_sample(better, x), images, best)
                smallest = torch.where(better, size, smallest)
                succeeded |= success
                if self.abort_early and step % -(-self.steps // 10) == 0:
                    loss = c * self._hinge(ahead) + self._objective(images - x)
                    if (loss > 0.9999 * before).all():
                        break
                    before = loss
            upper = torch.where(succeeded, c, upper)
            lower = torch.where(succeeded, lower, c)
            c = torch.where(upper.isinf(), 10 * c, (lower + upper) / 2)
        return self._shorten(lead, x, best)

    @torch.no_grad()
    def _shorten(self, lead: Lead, x: Tensor, found: Tensor) -> Tensor:
        """Back towards x on the straight line, by bisection, as far as the attack still succeeds."""
        best, low, high = found, x.new_zeros(len(x)), x.new_ones(len(x))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            images = self.threat.project(x, x + per_sample(middle, x) * (found - x))
            success = lead(images) > self.confidence
            best = torch.where(per_sample(success, x), images, best)
            low, high = torch.where(success, low, middle), torch.where(success, middle, high)
        return best

    def _hinge(self, ahead: Tensor) -> Tensor:
        """Logits still missing, (N,)."""
        return (self.confidence - ahead).clamp_min(0)

    @abstractmethod
    def _descend(self, lead: Lead, x: Tensor, c: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of each step in [0,1] and their lead, detached; c is of shape (N,)."""

    @abstractmethod
    def _objective(self, delta: Tensor) -> Tensor:
        """The size that is minimised, (N,)."""

    def _size(self, delta: Tensor) -> Tensor:
        """The size by which the best of several successes is chosen, (N,)."""
        return self._objective(delta)


class CarliniWagner(MinimumNorm):
    """Smallest squared L2 norm, by Adam on w with x' = (tanh w + 1)/2 (Carlini & Wagner 2017, 1608.04644, f₆).

    Forwards and backwards per call: at most ``steps × search_steps`` each, + 9 forwards.  Start and image differ from the
    released code where pixels are black or white (see the comments).

    Args:
        step_size: of Adam, in w.
        For the others see :class:`MinimumNorm`.
    """

    p = 2.0

    def __init__(
        self,
        steps: int = 200,
        search_steps: int = 9,
        step_size: float = 0.01,
        initial_c: float = 1e-3,
        confidence: float = 0.0,
        objective: Margin | Targeted | None = None,
        abort_early: bool = True,
    ) -> None:
        super().__init__(steps, search_steps, step_size, initial_c, confidence, objective, abort_early)

    def _descend(self, lead: Lead, x: Tensor, c: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        # Short of ±1, where w is infinite and tanh flat: at 0.999999, as usual, black pixels need hundreds of steps to move.
        start = torch.atanh((2 * x - 1) * 0.999)
        w = start.clone().requires_grad_()
        adam = torch.optim.Adam([w], lr=self.step_size)
        for _ in range(self.steps):
            # As a difference, so that w = start is x itself and not an image that is 0.0005 off at black and white.
            images = (x + (torch.tanh(w) - torch.tanh(start)) / 2).clamp(0, 1)
            ahead = lead(images)
            loss = c * self._hinge(ahead) + self._objective(images - x)
            (w.grad,) = torch.autograd.grad(loss.sum(), w)
            yield images.detach(), ahead.detach()
            adam.step()

    def _objective(self, delta: Tensor) -> Tensor:
        return delta.square().flatten(1).sum(1)


class Proximal(MinimumNorm):
    """Accelerated proximal descent (FISTA) on c · hinge + l2 · ‖δ‖₂² + a part that makes δ sparse, by shrinking.

    The gradient's step falls with √(1 − k / steps), the amount of shrinking stays, as in EAD's paper and code: the sparse
    part weighs more and more.  (A proximal step proper would shrink by less and less; it ends less sparse.)

    Forwards per call: at most ``2 · steps × search_steps`` (the gradient is taken at the extrapolated point, success judged
    at the sparse one), + 9; half as many backwards.

    Args:
        l2: weight of ‖δ‖₂².
        eps: optional cap on every pixel's change, "8/255" accepted; it is then the declared threat.
    """

    def __init__(
        self,
        steps: int,
        search_steps: int,
        step_size: float,
        initial_c: float,
        confidence: float,
        objective: Margin | Targeted | None,
        abort_early: bool,
        l2: float,
        eps: str | float | None,
    ) -> None:
        super().__init__(steps, search_steps, step_size, initial_c, confidence, objective, abort_early)
        self.l2 = l2
        self.box = Box() if eps is None else Linf(parse_eps(eps, "attack.eps"))

    @property
    def threat(self) -> Threat:
        return self.box

    def _descend(self, lead: Lead, x: Tensor, c: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        images = point = x
        for k in range(self.steps):
            step = self.step_size * (1 - k / self.steps) ** 0.5
            point = point.detach().requires_grad_()
            smooth = c * self._hinge(lead(point)) + self.l2 * (point - x).square().flatten(1).sum(1)
            (gradient,) = torch.autograd.grad(smooth.sum(), point)
            with torch.no_grad():
                delta = self._shrink(point - step * gradient - x)
                # Shrinking and clamping one after the other is exact where shrinking works pixel by pixel.
                images, previous = self.box.project(x, x + delta), images
                point = images + k / (k + 3) * (images - previous)
                ahead = lead(images)
            yield images, ahead

    @abstractmethod
    def _shrink(self, delta: Tensor) -> Tensor:
        """Proximal map of the sparse part at the first step size s: argmin_u ½‖u − δ‖² + s · sparse(u)."""


class ElasticNet(Proximal):
    """Small and sparse: β‖δ‖₁ + ‖δ‖₂² (EAD; Chen et al. 2018, 1709.04114).

    Args:
        beta: weight of the L1 norm beside the squared L2 norm.  The paper's β is the amount of shrinking, our β times the
            step size: 0.01 for the defaults here.
        rule: which success is best: the smallest "L1" norm, or the smallest elastic net, "EN".
        For the others see :class:`Proximal` and :class:`MinimumNorm`.
    """

    p = 1.0

    def __init__(
        self,
        beta: float = 1.0,
        rule: Literal["L1", "EN"] = "EN",
        steps: int = 200,
        search_steps: int = 9,
        step_size: float = 0.01,
        initial_c: float = 1e-3,
        confidence: float = 0.0,
        objective: Margin | Targeted | None = None,
        abort_early: bool = True,
        eps: str | float | None = None,
    ) -> None:
        super().__init__(steps, search_steps, step_size, initial_c, confidence, objective, abort_early, l2=1.0, eps=eps)
        require_number("attack.beta", beta, "[0, inf)")
        require_one_of("attack.rule", rule, ("L1", "EN"))
        self.beta = beta
        self.rule = rule

    def _shrink(self, delta: Tensor) -> Tensor:
        return F.softshrink(delta, self.step_size * self.beta)

    def _objective(self, delta: Tensor) -> Tensor:
        return self.beta * norms(delta, 1) + delta.square().flatten(1).sum(1)

    def _size(self, delta: Tensor) -> Tensor:
        return norms(delta, 1) if self.rule == "L1" else self._objective(delta)


class GroupSparse(Proximal):
    """Few square patches: γ‖δ‖₂² + τ Σ_G ‖δ_G‖₂ over the cells G of a grid, all channels together.

    The objective, its weights (γ 2, τ 3), the grid (cells of 13×13 pixels above 32, else 2×2), the first c and the second
    descent on the support found are those of StrAttack (Xu et al. 2019, 1808.01664) and its released code.  Ours: FISTA
    in place of ADMM (no splitting, so no ρ and α), clamping after shrinking, cells cut off at the border (the released
    code leaves the pixels there out of every group), and the choice of the best success by the objective.

    Forwards per call: those of :class:`Proximal`, twice when refined.

    Args:
        gamma, tau: weights of the squared L2 norm and of the groups.
        cell: side of a cell in pixels; None takes the paper's.
        refine: descend once more, on the cells found, for ‖δ‖₂ alone; kept where it succeeds with less.
        eps: cap on every pixel's change.
        For the others see :class:`MinimumNorm`.
    """

    p = 2.0

    def __init__(
        self,
        gamma: float = 2.0,
        tau: float = 3.0,
        cell: int | None = None,
        refine: bool = True,
        steps: int = 200,
        search_steps: int = 8,
        step_size: float = 0.01,
        initial_c: float = 1.0,
        confidence: float = 0.0,
        objective: Margin | Targeted | None = None,
        abort_early: bool = True,
        eps: str | float | None = None,
    ) -> None:
        super().__init__(steps, search_steps, step_size, initial_c, confidence, objective, abort_early, l2=gamma, eps=eps)
        require_number("attack.gamma", gamma, "[0, inf)")
        require_number("attack.tau", tau, "[0, inf)")
        require_whole("attack.cell", cell, 1, null=True)
        self.tau = tau
        self.cell = cell
        self.refine = refine

    def _attack(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        best = super()._attack(net, x, y)
        if not self.refine:
            return best
        cells = self._spread(self._group_norms(best - x) > 0, x)
        dense = copy(self)
        dense.l2, dense.tau = 1.0, 0.0
        masked = Masked(net, x, cells)
        refined = masked.compose(dense._search(self._lead(masked, y), x))
        with torch.no_grad():
            better = self._lead(net, y)(refined) > self.confidence
        better &= norms(refined - x, 2) < norms(best - x, 2)
        return torch.where(per_sample(better, x), refined, best)

    def _shrink(self, delta: Tensor) -> Tensor:
        kept = 1 - self.step_size * self.tau / self._group_norms(delta).clamp_min(1e-12)
        return delta * self._spread(kept.clamp_min(0), delta)

    def _objective(self, delta: Tensor) -> Tensor:
        return self.l2 * delta.square().flatten(1).sum(1) + self.tau * self._group_norms(delta).flatten(1).sum(1)

    def _group_norms(self, delta: Tensor) -> Tensor:
        """‖δ_G‖₂, (N, 1, rows, columns)."""
        side = self._side(delta)
        height, width = delta.shape[-2:]
        # Padded, for pooling drops incomplete cells; a sum, for divisor_override is one.
        squares = F.pad(delta.square().sum(1, keepdim=True), (0, -width % side, 0, -height % side))
        return F.avg_pool2d(squares, side, divisor_override=1).sqrt()

    def _spread(self, groups: Tensor, like: Tensor) -> Tensor:
        """Values of the cells, (N, 1, rows, columns), on their pixels, (N, 1, H, W)."""
        side = self._side(like)
        return groups.repeat_interleave(side, 2).repeat_interleave(side, 3)[..., : like.shape[-2], : like.shape[-1]]

    def _side(self, like: Tensor) -> int:
        return self.cell or (13 if max(like.shape[-2:]) > 32 else 2)
