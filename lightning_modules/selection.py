"""Which epoch is the best: the latest that held-out images do not tell from the highest.  Pure rules on their answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, get_args

from torch import Tensor

from glassarmor.defenses.monitoring.alarms import Limits, guesses
from glassarmor.defenses.monitoring.readings import guessing
from glassarmor.defenses.options import require_number, require_one_of

By = Literal["robust", "clean"]


def knows_nothing(answers: Tensor, y: Tensor, classes: int) -> bool:
    """Is a net with these answers (N,) to clean images no better than guessing, by the health monitor's default limits?"""
    return guesses(guessing(answers, y, classes), Limits())


def standard_error(one: Tensor, other: Tensor) -> float:
    """Of the difference of two accuracies on the same images, (N,) bool each: of N paired differences of −1, 0 or 1."""
    differences = one.double() - other.double()
    return float(differences.std() / math.sqrt(len(one))) if len(one) > 1 else 0.0


@dataclass(frozen=True)
class Choice:
    """The best epoch so far, and the one with the highest accuracy ``of`` the rule, which it may not be."""

    epoch: int
    accuracy: float
    robust: float  # of the chosen epoch, whatever chose it
    clean: float
    highest_epoch: int
    highest: float
    images: int
    by: By
    within: float | None
    right: Tensor | None = None  # (N,) bool: what the highest epoch has right; None: unknown, of an older checkpoint
    processes: int = 1  # that the images were dealt out to: what decides their order

    def state(self) -> dict[str, Any]:
        """Plain values and a tensor: what a checkpoint takes."""
        return {**asdict(replace(self, right=None)), "right": self.right}

    def text(self) -> str:
        """How the epoch was chosen, for people."""
        of = f"{self.by} accuracy on {self.images:,} held-out images"
        if self.within is None or self.images == 0:
            return f"epoch {self.epoch}: highest {of}"
        own, top = f"{100 * self.accuracy:.1f} %", f"{100 * self.highest:.1f} % in epoch {self.highest_epoch}"
        if self.epoch == self.highest_epoch:
            return f"epoch {self.epoch}: highest {of}, {own}"
        limit = "standard error" if self.within == 1 else "standard errors"
        return f"epoch {self.epoch}: latest within {self.within:g} {limit} of the highest {of}, {own} ({top})"


@dataclass(frozen=True)
class Select:
    """How the best epoch is chosen.

    A net that guesses, or that is not finite, never is.  The latest within one standard error, paired image by image, is
    taken because a maximum over epochs is mostly luck where few images rank them, and the first of two that are alike has
    been trained for less.

    Args:
        by: accuracy under ``val_attack``, or clean; None: robust, and clean for a run that attacks nothing.
        within: standard errors of the difference from the highest, below which the later epoch is taken; None: the
            highest, the first of several.

    Raises:
        ValueError: an option out of its range; names the config key.
    """

    by: By | None = None
    within: float | None = 1.0

    def __post_init__(self) -> None:
        require_one_of("select.by", self.by, get_args(By), null=True)
        require_number("select.within", self.within, "[0, inf)", null=True)

    @classmethod
    def of(cls, config: Mapping[str, Any] | None, attacks: bool) -> Select:
        """What a run's config says; one from before there was a choice chose the first of the highest, always by robust.

        Args:
            attacks: does the run train against an attack?
        """
        if config is None:
            return OLD
        if not isinstance(config, Mapping) or not set(config) <= {"by", "within"}:
            raise ValueError(f"select: expected by and within, such as select.by=clean; found {config!r}")
        found = cls(**config)
        return replace(found, by=found.by or ("robust" if attacks else "clean"))

    def next(self, last: Choice | None, epoch: int, held_out: Tensor, classes: int, processes: int = 1) -> Choice | None:
        """The choice after one more epoch; ``last`` itself where that changes nothing.

        Args:
            held_out: (N, 3) whole numbers: label, answer to the clean image, is the attacked image answered rightly?
        """
        y, answers, robust = held_out.long().cpu().unbind(1)
        if knows_nothing(answers, y, classes):
            return last
        by = self.by or "robust"
        right = {"robust": robust.bool(), "clean": answers == y}
        shares = {name: float(value.double().mean()) for name, value in right.items()}
        fresh = Choice(
            epoch,
            shares[by],
            shares["robust"],
            shares["clean"],
            epoch,
            shares[by],
            len(y),
            by,
            self.within,
            right[by],
            processes,
        )
        if last is None or fresh.accuracy > last.highest:
            return fresh
        if self.within is None:
            return last
        known = last.right is not None and len(last.right) == len(y) and last.processes == processes
        error = standard_error(last.right, right[by]) if known and last.right is not None else 0.0
        if last.highest - fresh.accuracy > self.within * error:
            return last
        return replace(
            fresh, highest_epoch=last.highest_epoch, highest=last.highest, right=last.right, processes=last.processes
        )


OLD: Final = Select("robust", None)
