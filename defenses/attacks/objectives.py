"""What an attack maximises: per-sample functions of the logits at x'.  One class an objective, chosen in YAML."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from glassarmor.defenses import losses
from glassarmor.defenses.options import require_whole


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


class DLR:
    """−(Z_y − max_{c≠y} Z_c) / (Z_π1 − Z_π3), π the order of the logits (Croce & Hein 2020, 2003.01690, eq. 6).

    Invariant to the scale and the shift of the logits: nets whose softmax saturates keep their gradients.

    Raises:
        ValueError: when called with fewer than 3 classes, where Z_π3 does not exist.
    """

    needs_clean: ClassVar[bool] = False

    def __call__(self, logits: Tensor, y: Tensor, clean: Tensor | None) -> Tensor:
        ordered = _ordered(logits, 3, "dlr")
        return losses.margin(logits, y) / (ordered[:, 0] - ordered[:, 2]).clamp_min(1e-12)


class TargetedDLR:
    """−(Z_y − Z_t) / (Z_π1 − (Z_π3 + Z_π4)/2) for the ``rank``-th most likely wrong class t of x (2003.01690, eq. 7).

    Args:
        rank: 1 is the strongest rival.

    Raises:
        ValueError: a rank below 1; when called, fewer than 4 classes or no wrong class of that rank.
    """

    needs_clean: ClassVar[bool] = True

    def __init__(self, rank: int = 1) -> None:
        require_whole("objective.rank", rank, 1)
        self.rank = rank

    def __call__(self, logits: Tensor, y: Tensor, clean: Tensor | None) -> Tensor:
        ordered = _ordered(logits, 4, "targeted dlr")
        return self._lead(logits, y, clean) / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2).clamp_min(1e-12)

    def _lead(self, logits: Tensor, y: Tensor, clean: Tensor | None) -> Tensor:
        """Z_t − Z_y, (N,)."""
        assert clean is not None
        if self.rank >= logits.shape[1]:
            raise ValueError(f"objective.rank: expected 1..{logits.shape[1] - 1}, the wrong classes; found {self.rank}")
        wrong = clean.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
        target = wrong[:, self.rank - 1, None]
        logits = logits.float()
        return (logits.gather(1, target) - logits.gather(1, y[:, None])).squeeze(1)


class TargetedMargin(TargetedDLR):
    """Z_t − Z_y for the ``rank``-th most likely wrong class t of x: for as few as two classes."""

    def __call__(self, logits: Tensor, y: Tensor, clean: Tensor | None) -> Tensor:
        return self._lead(logits, y, clean)


def _ordered(logits: Tensor, least: int, name: str) -> Tensor:
    """The logits of each sample, largest first."""
    if logits.shape[1] < least:
        raise ValueError(
            f"objective: the {name} loss is divided by differences of the {least} largest logits: it needs {least} classes, "
            f"found {logits.shape[1]}; with fewer take a margin loss"
        )
    return logits.float().sort(1, descending=True).values
