"""Terms of a training loss: each reads the one observation of a step.  Here the base losses; see also ``regularizers``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassarmor.defenses import losses
from glassarmor.defenses.options import require_number
from glassarmor.interpret.observation import Observation


@dataclass(frozen=True)
class Ramp:
    """A weight that is ``start`` up to epoch ``delay``, then moves linearly to ``end`` over ``epochs`` epochs."""

    start: float
    end: float
    epochs: float
    delay: float = 0.0

    def __call__(self, epoch: float) -> float:
        share = 1.0 if self.epochs <= 0 else min(1.0, max(0.0, (epoch - self.delay) / self.epochs))
        if self.epochs <= 0 and epoch < self.delay:
            share = 0.0
        return self.start + (self.end - self.start) * share


def at_epoch(value: float | Ramp, epoch: float) -> float:
    """A number, or a ramp's value at an epoch."""
    return value(epoch) if isinstance(value, Ramp) else float(value)


def check_smoothing(value: float) -> float:
    """``value`` if it is a label smoothing.

    Raises:
        ValueError: not in [0, 1).
    """
    require_number("label_smoothing", value, "[0, 1)")
    return float(value)


class Term(nn.Module):
    """One weighted part of a loss.

    Subclasses compute per-sample values (N,), or a scalar, from an :class:`Observation`.  A term that makes passes of its
    own (:meth:`Observation.look`) says how many in ``extra_passes``; while its weight is 0 it is not evaluated.

    Args:
        weight: a number or a :class:`Ramp` over epochs.  A weight that is 0 throughout makes the term absent.
        layers: layers to observe; empty asks :meth:`prepare` to choose.

    Raises:
        ValueError: a weight that is no finite number >= 0.
    """

    needs_clean: ClassVar[bool] = False  # reads obs.clean
    needs_graph: ClassVar[bool] = False  # differentiates obs.layer_gradient once more
    needs_attack: bool = False  # makes no sense at x' = x
    extra_passes: int = 0  # over the batch, made by the term itself
    looks_inside: ClassVar[bool] = True  # a regulariser that names no layer is offered the stages of the net

    def __init__(self, weight: float | Ramp = 1.0, layers: Sequence[str] = ()) -> None:
        super().__init__()
        for value in (weight.start, weight.end) if isinstance(weight, Ramp) else (weight,):
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{type(self).__name__}.weight: expected a finite number >= 0 or a Ramp, found {value!r}")
        self.weight = weight
        self.layers = tuple([layers] if isinstance(layers, str) else layers)

    def weight_at(self, epoch: float) -> float:
        return at_epoch(self.weight, epoch)

    @property
    def absent(self) -> bool:
        """Whether the weight is 0 throughout."""
        ends = (self.weight.start, self.weight.end) if isinstance(self.weight, Ramp) else (self.weight,)
        return all(end == 0 for end in ends)

    def prepare(self, obs: Observation, features: tuple[str, ...]) -> None:
        """Called once before training with an eval-mode observation of ``features`` and of the layers named here."""

    def reseed(self, step: int) -> None:
        """Make the next call draw the random numbers that belong to ``step``, for terms that draw any."""

    def end_epoch(self) -> None:
        """Called after the last batch of an epoch on every process."""

    def forward(self, obs: Observation) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define forward(obs)")


class AdversarialCE(Term):
    """Cross-entropy at x' (Madry et al. 2018)."""

    def __init__(self, weight: float | Ramp = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(weight)
        self.label_smoothing = check_smoothing(label_smoothing)

    def forward(self, obs: Observation) -> Tensor:
        return losses.cross_entropy(obs.adv.logits, obs.y, self.label_smoothing)


class CleanCE(Term):
    """Cross-entropy at x."""

    needs_clean = True

    def __init__(self, weight: float | Ramp = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(weight)
        self.label_smoothing = check_smoothing(label_smoothing)

    def forward(self, obs: Observation) -> Tensor:
        return losses.cross_entropy(obs.clean.logits, obs.y, self.label_smoothing)


class TradesKL(Term):
    """KL(p(x) ‖ p(x')); its weight is TRADES' β, 6 as published."""

    needs_clean = True
    needs_attack = True

    def __init__(self, weight: float | Ramp = 6.0) -> None:
        super().__init__(weight)

    def forward(self, obs: Observation) -> Tensor:
        return losses.kl_divergence(obs.clean.logits, obs.adv.logits)


class MartBCE(Term):
    """Boosted cross-entropy at x' of MART."""

    def forward(self, obs: Observation) -> Tensor:
        return losses.boosted_cross_entropy(obs.adv.logits, obs.y)


class MartKL(Term):
    """KL(p(x) ‖ p(x')) · (1 − p_y(x)) of MART; its weight is λ, 5 by default (published scripts use 5 or 6)."""

    needs_clean = True
    needs_attack = True

    def __init__(self, weight: float | Ramp = 5.0) -> None:
        super().__init__(weight)

    def forward(self, obs: Observation) -> Tensor:
        return losses.mart_kl(obs.clean.logits, obs.adv.logits, obs.y)


class LogitPairing(Term):
    """‖Z(x) − Z(x')‖² of adversarial logit pairing; weight 0.5 as published."""

    needs_clean = True
    needs_attack = True
    looks_inside = False

    def __init__(self, weight: float | Ramp = 0.5) -> None:
        super().__init__(weight)

    def forward(self, obs: Observation) -> Tensor:
        return losses.logit_pairing(obs.clean.logits, obs.adv.logits)


class NuclearNorm(Term):
    """‖Z(x') − Z(x)‖_* / N of the batch, NuAT (Sriramanan et al. 2021); its weight is λ, released as a ramp 0 → 4.5."""

    needs_clean = True
    needs_attack = True
    looks_inside = False

    def __init__(self, weight: float | Ramp = 4.5) -> None:
        super().__init__(weight)

    def forward(self, obs: Observation) -> Tensor:
        """()."""
        return losses.nuclear_norm(obs.clean.logits, obs.adv.logits)


class FeatureConsistency(Term):
    """1 − cos(A(x), A(x')) of a layer: logit pairing moved to features (ours); shrinking the features gains nothing.

    Args:
        weight: a number or a ramp.
        layers: default: the last feature layer.
    """

    needs_clean = True
    needs_attack = True

    def prepare(self, obs: Observation, features: tuple[str, ...]) -> None:
        self.layers = self.layers or features[-1:]

    def forward(self, obs: Observation) -> Tensor:
        """Mean over layers, (N,)."""
        cosines = [
            F.cosine_similarity(obs.clean.acts[layer].float().flatten(1), obs.adv.acts[layer].float().flatten(1))
            for layer in self.layers
        ]
        return 1 - torch.stack(cosines).mean(0)
