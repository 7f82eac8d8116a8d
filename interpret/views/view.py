"""What a panel hands on: one immutable :class:`View`, drawn the same in the local page and in W&B.

A panel is a callable ``(Probe) -> View``.  It measures with the pure functions of ``interpret`` and draws nothing twice:
``charts`` is data that the local page renders, ``drawing`` is a picture for W&B and for papers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from matplotlib.figure import Figure
from torch import Tensor, nn

from glassarmor.interpret.observation import Observation
from glassarmor.interpret.signals.conductance import Conductance, conductance
from glassarmor.interpret.signals.pse import PromotionSuppression, region_effects
from glassarmor.interpret.signals.sensitivity import SensitivityControl, sensitivity_control
from glassarmor.interpret.views.charts import Chart, Table

T = TypeVar("T")


@dataclass(frozen=True)
class Probe:
    """One look at the network on the same images each time; every panel reads it, none runs an attack of its own.

    ``obs`` holds the clean and adversarial pass of ``n`` images in eval mode, with gradients available.
    """

    net: nn.Module
    obs: Observation
    layers: tuple[str, ...]  # observed layers, in execution order
    ids: tuple[str, ...]  # fixed identity of each probe image, e.g. "val-17"
    class_names: tuple[str, ...]
    scalars: Mapping[str, float]  # this epoch's metrics, e.g. {"val/robust_acc": 0.61, "train/loss": 1.2}
    training: tuple[Tensor, Tensor] | None = (
        None  # images (M, C, H, W) in [0,1] and labels, for panels that compare with them
    )
    run: str = "RUN"  # the run folder, and the command that trained it, for what a panel proposes
    command: str = "python train.py"
    concepts: dict[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # by layer, what an earlier panel found units to detect
    _known: dict[tuple[object, ...], Any] = field(default_factory=dict, repr=False, compare=False)

    def grid(self, wanted: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of regions, capped by the image size."""
        height, width = self.obs.adv.x.shape[-2:]
        return min(wanted[0], height), min(wanted[1], width)

    def region_effects(self, wanted: tuple[int, int]) -> PromotionSuppression:
        """Effects (N, G) of the regions of :meth:`grid`, computed once for all panels."""
        grid, obs = self.grid(wanted), self.obs
        return self._once(
            ("regions", grid),
            lambda: region_effects(self.net, obs.clean.x, obs.adv.x, obs.y, obs.target, regions=grid),
        )

    def conductance(self, steps: int) -> Conductance:
        """Promotion and suppression of all units and positions of the observed layers, computed once for all panels."""
        obs = self.obs
        return self._once(
            ("conductance", steps),
            lambda: conductance(self.net, obs.clean.x, obs.adv.x, obs.y, obs.target, layers=self.layers, steps=steps),
        )

    def sensitivity(self, draws: int) -> dict[str, SensitivityControl]:
        """Sensitivity of the observed layers to the attack and to noise of equal norm, computed once for all panels."""
        obs = self.obs
        return self._once(
            ("sensitivity", draws),
            lambda: sensitivity_control(self.net, obs.clean.x, obs.adv.x, obs.y, self.layers, draws=draws),
        )

    def _once(self, key: tuple[object, ...], compute: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = compute()
        value: T = self._known[key]
        return value


Question = Literal["trust", "healthy", "where", "units", "changed", "next"]


@dataclass(frozen=True)
class Answer:
    """What a panel says to one of the questions that the overview answers; ``command`` does it, where there is one."""

    question: Question
    text: str
    command: str = ""


@dataclass(frozen=True)
class View:
    """What one panel shows for one epoch.

    ``headline`` is one sentence computed from the numbers shown: what a reader should conclude.  ``how_to_read`` is the
    one line that a newcomer needs before the charts.

    Raises:
        ValueError: ``table`` is none of ``charts``.
    """

    name: str  # W&B key and page anchor, e.g. "pse"
    title: str
    headline: str
    charts: tuple[Chart, ...]
    drawing: Figure | None = None  # a picture for W&B, and for papers as SVG
    scalars: Mapping[str, float] = field(default_factory=dict)
    table: Table | None = None  # the one of ``charts`` that goes to W&B, with fixed example ids
    how_to_read: str = ""
    answers: tuple[Answer, ...] = ()  # for the overview, where those of one question stand together

    def __post_init__(self) -> None:
        if self.table is not None and not any(chart is self.table for chart in self.charts):
            raise ValueError(f"view {self.name}: expected the table for W&B to be one of its charts")


class Panel(Protocol):
    """A panel: measure on the probe, return what to show.  ``name`` is unique within a dashboard."""

    name: str

    def __call__(self, probe: Probe) -> View: ...
