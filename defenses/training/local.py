"""Terms about the loss near x, which look at the net with passes of their own: each says how many (``extra_passes``).

They see the net in eval mode, as attacks do, so that samples stay apart and no statistics move; the released codes of
GradAlign and LLR look in train mode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glassarmor.defenses.attacks.draws import Seeded
from glassarmor.defenses.losses import cross_entropy
from glassarmor.defenses.options import require_number, require_whole
from glassarmor.defenses.threat import Threat, norms, per_sample
from glassarmor.defenses.training.terms import Ramp, Term
from glassarmor.interpret.observation import Observation


def loss_and_gradient(obs: Observation, images: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (N,) and its gradient by ``images`` (N, C, H, W); differentiable where gradients are enabled."""
    learning = torch.is_grad_enabled()
    with torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        values = cross_entropy(obs.look(images), y)
        (gradient,) = torch.autograd.grad(values.sum(), images, create_graph=learning)
    return values, gradient.float()


def clean_images(obs: Observation) -> Tensor:
    assert obs.x is not None, "the observation was made by observe(...)"
    return obs.x.detach()


class _Local(Seeded, Term):
    """Reads x, y and the net; draws from its own generator, one seed a step."""

    looks_inside = False

    def __init__(self, weight: float | Ramp, seed: int = 0) -> None:
        super().__init__(weight)
        self.seed, self.calls = seed, 0


class GradientNorm(_Local):
    """‖∇_x CE(x)‖², input-gradient regularisation (Ross & Doshi-Velez 2018, 1711.09404); needs no attack."""

    extra_passes = 1

    def __init__(self, weight: float | Ramp = 0.1) -> None:
        super().__init__(weight)

    def forward(self, obs: Observation) -> Tensor:
        """(N,)."""
        _, gradient = loss_and_gradient(obs, clean_images(obs), obs.y)
        return gradient.flatten(1).square().sum(1)


class GradAlign(_Local):
    """1 − cos(∇_x CE(x), ∇_x CE(x + η)), η uniform in the ball (Andriushchenko & Flammarion 2020, 2007.02617: Ω).

    Keeps one-step attacks honest.  0 where either gradient vanishes.

    Args:
        threat: the ball.
        weight: 0.2 as published for CIFAR-10 at 8/255.
    """

    needs_attack = True
    extra_passes = 2

    def __init__(self, threat: Threat, weight: float | Ramp = 0.2, seed: int = 0) -> None:
        super().__init__(weight, seed)
        self.threat = threat

    def forward(self, obs: Observation) -> Tensor:
        """(N,)."""
        x = clean_images(obs)
        beside = x + self.threat.noise(x, self.generator(x.device))
        _, gradients = loss_and_gradient(obs, torch.cat([x, beside]), obs.y.repeat(2))
        # By the largest entry first: the squares of a confident sample's gradient underflow.
        largest = norms(gradients.detach(), float("inf"))
        alive = largest > 0
        scaled = (gradients / per_sample(torch.where(alive, largest, 1), gradients)).flatten(1)
        at_x, at_noise = scaled.chunk(2)
        both = alive.view(2, -1).all(0)
        return torch.where(both, 1 - torch.cosine_similarity(at_x, at_noise, eps=1e-12), 0)


class LocalLinearity(_Local):
    """|CE(x+δ) − CE(x) − δ·∇CE(x)| + s·|δ·∇CE(x)|, local linearity (Qin et al. 2019, 1907.02610).

    The weight is their λ (4 for CIFAR-10) and s = μ/λ (μ = 3).

    Args:
        threat: the ball in which δ is sought.
        slope: s.
        steps: of ascent on the first part, from a uniform start, as published (with ``defense=none``); 0 takes the δ of
            the step's attack and saves them.
    """

    def __init__(
        self, threat: Threat, weight: float | Ramp = 4.0, slope: float = 0.75, steps: int = 0, seed: int = 0
    ) -> None:
        super().__init__(weight, seed)
        require_whole("regularizers.local_linearity.steps", steps, 0)
        require_number("regularizers.local_linearity.slope", slope, "[0, inf)")
        self.threat, self.slope, self.steps = threat, slope, steps
        self.needs_attack = steps == 0
        self.extra_passes = 2 if steps == 0 else 3 + steps

    def forward(self, obs: Observation) -> Tensor:
        """(N,)."""
        x = clean_images(obs)
        x_adv = self._search(obs, x) if self.steps else obs.adv.x.detach()
        at_x, gradient = loss_and_gradient(obs, x, obs.y)
        predicted = (gradient * (x_adv - x)).flatten(1).sum(1)
        return (cross_entropy(obs.look(x_adv), obs.y) - at_x - predicted).abs() + self.slope * predicted.abs()

    @torch.no_grad()
    def _search(self, obs: Observation, x: Tensor) -> Tensor:
        """δ by projected ascent on |CE(x+δ) − CE(x) − δ·∇CE(x)|, whose gradient is ±(∇CE(x+δ) − ∇CE(x))."""
        at_x, gradient = loss_and_gradient(obs, x, obs.y)
        x_adv = self.threat.project(x, x + self.threat.noise(x, self.generator(x.device)))
        for _ in range(self.steps):
            value, slope = loss_and_gradient(obs, x_adv, obs.y)
            gap = value - at_x - (gradient * (x_adv - x)).flatten(1).sum(1)
            ascent = per_sample(gap.sign(), x) * (slope - gradient)
            x_adv = self.threat.project(x, x_adv + 2.5 * self.threat.eps / self.steps * self.threat.ascent(ascent))
        return x_adv
