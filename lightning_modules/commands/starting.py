"""What training starts from: weights of before, and which of them learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig
from torch import nn

from glassarmor.lightning_modules.commands.subject import located, renamed_keys
from glassarmor.lightning_modules.learning import freeze
from glassarmor.lightning_modules.networks.build import Filled, load_weights
from glassarmor.lightning_modules.run.folder import RunFolder


@dataclass(frozen=True)
class WarmStart:
    """What a network was filled with, and what of it learns; None where nothing was asked for."""

    filled: Filled | None = None
    learns: str | None = None

    @property
    def sentences(self) -> tuple[str, ...]:
        """What a reader should know of it."""
        found = []
        if self.filled is not None:
            head = f"; a new head for these classes: {', '.join(self.filled.new)}" if self.filled.new else ""
            found = [f"weights: starts from {self.filled.path}{head}", *(f"weights: {each}" for each in self.filled.notes)]
        return (*found, *((f"freeze: {self.learns}",) if self.learns is not None else ()))

    @property
    def record(self) -> dict[str, Any]:
        """For ``run.json``: the file by the hash of its bytes, and what was taken of it."""
        if self.filled is None:
            return {}
        place, new = self.filled.place, list(self.filled.new)
        return {"weights": {"path": str(self.filled.path), "sha256": self.filled.sha256, "place": place, "new": new}}

    def checked(self, folder: RunFolder | None) -> dict[str, Any]:
        """The record, which a resumed run has already.

        Raises:
            ValueError: the file is another than the one that the run started from.
        """
        known = {} if folder is None else folder.info.get("weights", {})
        if known and self.filled is not None and known.get("sha256") != self.filled.sha256:
            raise ValueError(f"weights: {self.filled.path} is another file than the one that the run started from")
        return self.record


def warm_start(cfg: DictConfig, net: nn.Module) -> WarmStart:
    """Fill ``net`` and freeze what ``cfg.weights`` and ``cfg.freeze`` say.

    A resumed run does so too: the net that is trained for comparison starts there.

    Raises:
        ValueError: no such weights, weights of another network, layers that are not there, or nothing left that learns.
    """
    filled = learns = None
    if cfg.get("weights") is not None:
        with renamed_keys(checkpoint="weights"):
            path, _ = located(str(cfg.weights))
        filled = load_weights(net, path, "weights", new_head=True)
    if cfg.get("freeze"):
        learns = freeze(net, list(cfg.freeze) if isinstance(cfg.freeze, ListConfig) else cfg.freeze)
    return WarmStart(filled, learns)
