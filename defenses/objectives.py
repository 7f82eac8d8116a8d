"""What an attack maximises: per-sample functions of the logits at x'.  One class an objective, chosen in YAML."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from defenses import losses


class Objective(Protocol):
    """Called with the logits at x' (N, K), the true labels (N,) and, where ``needs_clean``, the logits at x."""

    needs_clean: ClassVar[bool]

    def __call__(self, logits: Tensor, y: Tensor, clean: Tensor | None) -> Tensor: ...


class CrossEntropy:
    """−log p_y(x') (Madry et al. 2018)."""

    needs_clean: ClassVar[bool] = False

    def __call__(self, logits: Tensor, y: Tensor, clean: Tensor | None) -> Tensor:
        return losses.cross_entropy(logits, y)


class KLToClean:
    """KL(p(x) ‖ p(x')), the inner problem of TRADES.  Its gradient is zero at x' = x: start at random."""

    needs_clean: ClassVar[bool] = True

    def __call__(self, logits: Tensor, y: Tensor, clean: Tensor | None) -> Tensor:
        assert clean is not None
        return losses.kl_divergence(clean, logits)


class Margin:
    """max_{c≠y} Z_c − Z_y (Carlini & Wagner 2017, f₆ without the cap): does not saturate as the cross-entropy does."""

    needs_clean: ClassVar[bool] = False

    def __call__(self, logits: Tensor, y: Tensor, clean: Tensor | None) -> Tensor:
        return losses.margin(logits, y)


class NuclearCE:
    """−log p_y(x') + λ·‖Z(x') − Z(x)‖_* / N, the inner problem of NuAT (Sriramanan et al. 2021).

    The released code leaves the second part out in every other step; here it is always there.

    Args:
        weight: λ, 4.5 as released.
    """

    needs_clean: ClassVar[bool] = True

    def __init__(self, weight: float = 4.5) -> None:
        self.weight = weight

    def __call__(self, logits: Tensor, y: Tensor, clean: Tensor | None) -> Tensor:
        assert clean is not None
        # The same for every sample: summed over the batch, as attacks do, it stands beside the summed cross-entropy.
        return losses.cross_entropy(logits, y) + self.weight * losses.nuclear_norm(clean, logits)


class Targeted:
    """log p_t(x') for the class (y + offset) mod K: every sample gets a wrong target.

    Args:
        offset: 1..K−1.
    """

    needs_clean: ClassVar[bool] = False

    def __init__(self, offset: int = 1) -> None:
        self.offset = offset

    def target(self, y: Tensor, classes: int) -> Tensor:
        """The promoted class, (N,).

        Raises:
            ValueError: the offset leads back to the true class.
        """
        if self.offset % classes == 0:
            raise ValueError(f"objective.offset: expected 1..{classes - 1} for {classes} classes, found {self.offset}")
        return (y + self.offset) % classes

    def __call__(self, logits: Tensor, y: Tensor, clean: Tensor | None) -> Tensor:
        return -losses.cross_entropy(logits, self.target(y, logits.shape[1]))
