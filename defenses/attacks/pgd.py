"""Attacks: ``(net, x, y) -> x_adv``, detached, inside the declared ball; the net is left as it was found."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from glassarmor.defenses.attacks.draws import Seeded
from glassarmor.defenses.attacks.objectives import CrossEntropy, KLToClean, NuclearCE, Objective
from glassarmor.defenses.losses import margin
from glassarmor.defenses.options import require_one_of, require_whole
from glassarmor.defenses.threat import Threat, parse_eps, per_sample
from glassarmor.interpret.inputs import borrowed
from glassarmor.interpret.modes import as_module
from glassarmor.interpret.network.folding import folded

Value = Callable[[Tensor], tuple[Tensor, Tensor]]  # images (N, C, H, W) → logits (N, K), what is maximised (N,)


class Attack(Protocol):
    """What a defense, an evaluation or a dashboard asks of an attack."""

    @property
    def threat(self) -> Threat:
        """The ball that every output lies in."""

    def reseed(self, call: int) -> None:
        """Make the next call draw the random numbers that belong to ``call``."""

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor: ...


@runtime_checkable
class Scalable(Attack, Protocol):
    """An attack whose ball and steps can follow a schedule."""

    calls: int

    def scaled(self, eps: float, step: float) -> Scalable:
        """A twin with a ball ``eps`` and steps ``eps · step`` times as large, which draws on from the same place."""
        ...


class PGD(Seeded):
    """Projected gradient ascent (Madry et al. 2018, 1706.06083) and, as its special cases below, its one-step kin.

    Forwards per call: ``steps × restarts``, + 1 for an objective that looks at the clean logits, + ``restarts`` when there
    are several, to choose the worst.

    Args:
        threat: the ball.
        steps, step_size: step size in the norm's units, "2/255" accepted; by default 2.5 · eps / steps.
        start: "uniform" in the ball, "gaussian" (σ = 0.001, as TRADES), "bernoulli" (each pixel ± eps/2, NuAT), or "none".
        restarts: the worst start wins, sample by sample: first by being misclassified, then by the objective.
        objective: what is maximised.
        seed: of the attack's own generator.  The same call number gives the same start whatever was drawn before, so a
            resumed run repeats an uninterrupted one.

    Raises:
        ValueError: no steps, no restarts, a step that is no positive number, or a start that the objective cannot leave.
    """

    def __init__(
        self,
        threat: Threat,
        steps: int = 10,
        step_size: str | float | None = None,
        start: Literal["uniform", "gaussian", "bernoulli", "none"] = "uniform",
        restarts: int = 1,
        objective: Objective | None = None,
        seed: int = 0,
    ) -> None:
        require_whole("attack.steps", steps, 1)
        require_whole("attack.restarts", restarts, 1)
        require_one_of("attack.start", start, ("uniform", "gaussian", "bernoulli", "none"))
        if restarts > 1 and start == "none":
            raise ValueError("attack.restarts: several restarts need a random start, found start=none")
        if restarts > 1 and isinstance(objective, NuclearCE):
            raise ValueError(
                "attack.restarts: the worst restart is chosen sample by sample, but the nuclear norm belongs to the batch; "
                f"expected restarts=1, found {restarts}"
            )
        if start == "none" and isinstance(objective, KLToClean):
            raise ValueError(
                "attack.start: the KL to the clean prediction has no gradient at the image itself, so its first step would "
                "follow rounding errors; expected uniform or gaussian, found none"
            )
        self.threat = threat
        self.steps = steps
        self.step_size = 2.5 * threat.eps / steps if step_size is None else parse_eps(step_size, "attack.step_size")
        if threat.eps > 0 and self.step_size <= 0:
            raise ValueError(f"attack.step_size: expected a positive number, found {step_size!r}")
        self.start = start
        self.restarts = restarts
        self.objective = CrossEntropy() if objective is None else objective
        self.seed = seed
        self.calls = 0

    def scaled(self, eps: float, step: float) -> PGD:
        twin = copy.copy(self)
        twin.threat, twin.step_size = self.threat.scaled(eps), self.step_size * eps * step
        return twin

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images (N, C, H, W), fp32, detached.

        Args:
            net: run in eval mode; modes, flags, buffers and gradients are put back.
            x: images in [0,1], (N, C, H, W).
            y: true labels (N,).
        """
        net = as_module(net)
        with borrowed(net, x, y) as (x, y), self._lightened(net, x):
            generator = self.generator(x.device)
            value = self._value(net, x, y)
            best = self._ascend(x, value, generator)
            if self.restarts > 1:
                score = self._score(value, best, y)
            for _ in range(self.restarts - 1):
                candidate = self._ascend(x, value, generator)
                better = self._score(value, candidate, y)
                best = torch.where(per_sample(better > score, x), candidate, best)
                score = torch.maximum(score, better)
        return best

    def _lightened(self, net: nn.Module, x: Tensor) -> AbstractContextManager[nn.Module]:
        """The net for the steps of one call, as cheap as what they read of it allows: its logits, here."""
        return folded(net, x, self.steps * self.restarts)

    def _value(self, net: nn.Module, x: Tensor, y: Tensor) -> Value:
        """What is maximised, as a function of x' alone; whatever it needs of x is computed here, once a call."""
        clean = None
        if self.objective.needs_clean:
            with torch.no_grad():
                clean = net(x)

        def value(x_adv: Tensor) -> tuple[Tensor, Tensor]:
            logits = net(x_adv)
            return logits, self.objective(logits, y, clean)

        return value

    def _ascend(self, x: Tensor, value: Value, generator: torch.Generator) -> Tensor:
        x_adv = self._begin(x, generator)
        for _ in range(self.steps):
            x_adv.requires_grad_()
            # A sum, not a mean: in low precision a mean's small gradients underflow to sign 0.
            total = value(x_adv)[1].sum()
            (gradient,) = torch.autograd.grad(total, x_adv)
            x_adv = self._step(x, x_adv.detach() + self.step_size * self.threat.ascent(gradient))
        return x_adv

    def _begin(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if self.start == "none":
            return x.clone()
        if self.start == "gaussian":
            return self._step(x, x + 0.001 * torch.randn(x.shape, generator=generator, device=x.device))
        if self.start == "bernoulli":
            corner = torch.rand(x.shape, generator=generator, device=x.device) < 0.5
            return self._step(x, x + self.threat.eps * (0.5 - corner.float()))
        return self._step(x, x + self.threat.noise(x, generator))

    def _step(self, x: Tensor, x_adv: Tensor) -> Tensor:
        return self.threat.project(x, x_adv)

    def _score(self, value: Value, x_adv: Tensor, y: Tensor) -> Tensor:
        """What is maximised, lifted above every other where the sample is misclassified."""
        with torch.no_grad():
            logits, found = value(x_adv)
            found = found.detach().double()
            return torch.where(margin(logits, y) > 0, found + 1e9, found)


class FGSM(PGD):
    """One step of length ε from the image itself (Goodfellow et al. 2015)."""

    def __init__(self, threat: Threat, objective: Objective | None = None, seed: int = 0) -> None:
        super().__init__(threat, steps=1, step_size=threat.eps, start="none", objective=objective, seed=seed)


class FGSMRS(PGD):
    """One step of length ``alpha`` · ε from a uniform start (Wong et al. 2020, 2001.03994)."""

    def __init__(self, threat: Threat, alpha: float = 1.25, objective: Objective | None = None, seed: int = 0) -> None:
        super().__init__(threat, steps=1, step_size=alpha * threat.eps, objective=objective, seed=seed)


class NFGSM(PGD):
    """One step of length ε from noise of ``noise`` · ε, never projected to the ball (de Jorge et al. 2022, 2202.01181).

    For training only.  The declared ``threat`` is the ball that it can really fill, (1 + noise) · ε.
    """

    def __init__(self, threat: Threat, noise: float = 2.0, objective: Objective | None = None, seed: int = 0) -> None:
        super().__init__(threat.scaled(1 + noise), steps=1, step_size=threat.eps, objective=objective, seed=seed)
        self.noise_ball = threat.scaled(noise)

    def scaled(self, eps: float, step: float) -> NFGSM:
        twin = copy.copy(self)
        twin.threat, twin.step_size = self.threat.scaled(eps), self.step_size * eps * step
        twin.noise_ball = self.noise_ball.scaled(eps)
        return twin

    def _begin(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self._step(x, x + self.noise_ball.noise(x, generator))

    def _step(self, x: Tensor, x_adv: Tensor) -> Tensor:
        return x_adv.clamp(0, 1)
