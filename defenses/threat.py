"""Threat models: what an attacker may do to an image in [0,1].  Geometry only; the attack loop lives in ``attacks``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor


def parse_eps(eps: str | float, key: str = "threat.eps") -> float:
    """A budget in the image's own units: 0.03 or the fraction "8/255".

    Raises:
        ValueError: not a number, or negative.
    """
    try:
        value = float(Fraction(eps.replace(" ", ""))) if isinstance(eps, str) else float(eps)
    except (ValueError, ZeroDivisionError, OverflowError, TypeError):
        raise ValueError(f"{key}: expected a number or a fraction such as '8/255', found {eps!r}") from None
    if not 0 <= value < float("inf"):
        raise ValueError(f"{key}: expected a finite budget >= 0, found {eps!r}")
    return value


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(N,) shaped to broadcast against (N, C, H, W)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def norms(delta: Tensor, p: float) -> Tensor:
    """p-norm of each sample, (N,)."""
    return torch.linalg.vector_norm(delta.flatten(1), ord=p, dim=1)


class Threat(ABC):
    """A norm ball of radius ``eps`` around each image, cut with [0,1].

    Args:
        eps: radius in the units of images in [0,1]; "8/255" is accepted.
    """

    p: ClassVar[float]
    name: ClassVar[str]

    def __init__(self, eps: str | float) -> None:
        self.eps = parse_eps(eps)

    def __repr__(self) -> str:
        return f"{self.name}(eps={self.eps:.4g})"

    def distance(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Norm of x' − x per sample, (N,)."""
        return norms(x_adv - x, self.p)

    def scaled(self, factor: float) -> Threat:
        """The same ball, ``factor`` times as large."""
        return type(self)(self.eps * factor)

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse a ball that holds every image of this shape: its radius was meant in other units.

        Raises:
            ValueError: eps above the diameter of [0,1]^(C·H·W) in this norm.
        """
        diameter = math.prod(shape) ** (1 / self.p)
        if self.eps > diameter:
            raise ValueError(
                f"threat.eps: images live in [0,1], where no two of shape {tuple(shape)} are further apart than "
                f"{diameter:.4g} in {self.name}; found {self.eps:.4g}"
            )

    @abstractmethod
    def project(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """An admissible point near x': inside the ball around x and inside [0,1]; (N, C, H, W).  A fixed point stays."""

    @abstractmethod
    def ascent(self, gradient: Tensor) -> Tensor:
        """The unit step of steepest ascent in this norm; zero where the gradient is zero."""

    @abstractmethod
    def noise(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A random point of the ball around 0, (N, C, H, W)."""


class Linf(Threat):
    """Every pixel moves by at most ``eps``.

    Raises:
        ValueError: eps above 1, the whole range of an image: a sign that it was meant in 0..255.
    """

    p = float("inf")
    name = "Linf"

    def __init__(self, eps: str | float) -> None:
        super().__init__(eps)
        if self.eps > 1:
            raise ValueError(
                f"threat.eps: an L∞ budget lives in [0,1] pixel units, found {eps!r}; "
                f"did you mean '{eps}/255'? allowed: 0..1 or a fraction such as '8/255'"
            )

    def scaled(self, factor: float) -> Linf:
        return Linf(min(1.0, self.eps * factor))  # a larger ball holds no more images

    def project(self, x: Tensor, x_adv: Tensor) -> Tensor:
        return torch.clamp(x_adv, (x - self.eps).clamp_min(0), (x + self.eps).clamp_max(1))

    def ascent(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def noise(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return (torch.rand(x.shape, generator=generator, device=x.device) * 2 - 1) * self.eps


class L2(Threat):
    """The Euclidean length of the change is at most ``eps``."""

    p = 2.0
    name = "L2"

    def project(self, x: Tensor, x_adv: Tensor) -> Tensor:
        delta = x_adv - x
        # Shaved by one part in 10⁶: rounding of the product must not leave the ball.
        factor = (self.eps * (1 - 1e-6) / norms(delta, 2).clamp_min(1e-12)).clamp_max(1)
        # x is in [0,1], so clamping only shrinks each component: the result stays in the ball.
        return (x + per_sample(factor, x) * delta).clamp(0, 1)

    def ascent(self, gradient: Tensor) -> Tensor:
        # By the largest entry first: the squares of a tiny gradient underflow.
        largest = norms(gradient, float("inf"))
        scaled = gradient / per_sample(torch.where(largest > 0, largest, 1), gradient)
        length = norms(scaled, 2)
        return scaled / per_sample(torch.where(length > 0, length, 1), gradient)

    def noise(self, x: Tensor, generator: torch.Generator) -> Tensor:
        direction = torch.randn(x.shape, generator=generator, device=x.device)
        dimension = direction[0].numel()
        radius = torch.rand(len(x), generator=generator, device=x.device) ** (1 / dimension)
        return direction * per_sample(self.eps * radius / norms(direction, 2).clamp_min(1e-12), x)
