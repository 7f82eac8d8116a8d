"""What a panel hands on: one immutable :class:`View`, drawn the same in the local page and in W&B.

A panel is a callable ``(Probe) -> View``.  It measures with the pure functions of ``interpret`` and draws nothing twice:
``charts`` is data that the local page renders, ``figure`` is a picture for W&B and for papers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from interpret.conductance import Conductance, conductance
from interpret.observation import Observation
from interpret.pse import PromotionSuppression, region_effects
from interpret.sensitivity import SensitivityControl, sensitivity_control

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


@dataclass(frozen=True)
class Trend:
    """Scalars over epochs; the page collects the values from each epoch's ``View.scalars`` and epoch metrics.

    Unit "%", here and in :class:`Bars`, shows fractions as percent: 0.612 reads "61.2 %".
    """

    title: str
    keys: tuple[str, ...]
    labels: tuple[str, ...]
    unit: str = ""
    style: Literal["line", "share"] = "line"  # "share": stacked areas that sum to 1
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, largest first as given; ``reference`` draws a control value beside each bar."""

    title: str
    labels: tuple[str, ...]
    values: tuple[float, ...]
    unit: str = ""
    reference: tuple[float, ...] | None = None
    reference_label: str = ""


@dataclass(frozen=True)
class Intervals:
    """A forest plot: estimates with their intervals on one axis, a row a name, around 0, which is no effect.

    An interval that leaves ±``limit`` is cut there, with an arrow; NaN edges draw the estimate alone.
    ``texts`` says each row's numbers beside it.
    """

    title: str
    x_label: str
    names: tuple[str, ...]
    middle: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    texts: tuple[str, ...]
    limit: float


@dataclass(frozen=True)
class Lines:
    """Curves over one common axis, e.g. attack strength; unit "%" as in :class:`Trend`, for either axis.

    ``x_names`` names the places of ``x``, e.g. layers.  ``spread``: a lower and an upper edge around each curve, or none.
    """

    title: str
    x: tuple[float, ...]
    x_label: str
    labels: tuple[str, ...]
    series: tuple[tuple[float, ...], ...]  # one a label, as long as ``x``; NaN breaks the line
    unit: str = ""
    x_unit: str = ""
    limits: tuple[float, float] | None = None
    x_names: tuple[str, ...] = ()
    spread: tuple[tuple[tuple[float, ...], tuple[float, ...]] | None, ...] = ()


@dataclass(frozen=True)
class MapColumn:
    """One column of a :class:`Maps` chart.  ``values``: (n, H, W, 3) in [0,1] for "image", (n, H, W) otherwise.

    "signed" is centred on zero, "positive" starts at zero; both use the colour scale that the row shares.  "category"
    holds indices into ``categories``.  Non-finite values of a map are drawn grey: there is no number to show.
    """

    title: str
    values: np.ndarray
    kind: Literal["image", "signed", "positive", "category"]
    unit: str = ""
    categories: tuple[str, ...] = ()
    scale_group: str = "effect"  # columns of one group share one colour scale within a row, over all epochs
    overlay: bool = False  # lay the map over the nearest image column to its left


@dataclass(frozen=True)
class Maps:
    """A grid of pictures: one row a probe image, one column a quantity; scales are shared as ``MapColumn`` says.

    ``own_scale``: a row's colour scale is that of this epoch alone, for rows that mean something else each epoch.
    """

    title: str
    row_titles: tuple[str, ...]
    columns: tuple[MapColumn, ...]
    own_scale: bool = False


@dataclass(frozen=True)
class Table:
    """Plain cells; numbers stay numbers so that W&B can sort them.  ``open``: shown without being asked for.

    ``command``: the column whose cells are words for a command line, which the page lets the reader copy.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str | float | int, ...]]
    open: bool = False
    command: str = ""


@dataclass(frozen=True)
class Scatter:
    """Points with a name each, shown group by group (a layer, say); pointing at one, or choosing it, shows its ``details``.

    ``details`` holds one row a point that has some; ``detail_rows`` gives each point's row, −1 for none.  ``named`` writes
    names beside the marks, for few points, on axes that need not begin at 0; ``line`` joins points, whatever group is shown.
    """

    title: str
    x_label: str
    y_label: str
    names: tuple[str, ...]
    x: tuple[float, ...]
    y: tuple[float, ...]
    size: tuple[float, ...]  # area of the mark, ≥ 0
    size_label: str
    group: tuple[int, ...]  # index into ``groups``
    groups: tuple[str, ...]
    diagonal: str = ""  # what it means to lie on y = x; empty draws no diagonal
    details: Maps | None = None
    detail_rows: tuple[int, ...] = ()
    named: bool = False
    line: tuple[int, ...] = ()
    line_label: str = ""


@dataclass(frozen=True)
class LayerNode:
    """One box of the Architecture View.  ``column``, ``lane``: its place; ``layer``: index among the observed, or −1."""

    name: str
    kind: str
    shape: str
    parameters: int
    column: int
    lane: int
    layer: int


@dataclass(frozen=True)
class UnitMaps:
    """Layer View of one observed layer: U units of N examples, clean and adversarial, on one scale.

    ``values`` (N, 2, U, h, w); ``units`` (U,) their numbers in the layer; ``columns`` what is known of each unit, by name.
    """

    units: tuple[int, ...]
    of: int  # units of the layer in all
    values: np.ndarray
    columns: Mapping[str, tuple[float | str, ...]]
    filters: np.ndarray | None = None  # (U, h, w, 3) in [0,1], where a unit's weights can be drawn


@dataclass(frozen=True)
class Profiles:
    """Activation Profiles: Architecture, Flow and Layer View of the same examples, linked (following 2103.10229).

    ``position`` (S, L, N): place on the evidence axis at S attack strengths, 0 the true class, 1 the target.
    ``bands`` (L, P, 2, 5): quantiles .05 .25 .5 .75 .95 of the background of both classes on the axis of a pair.
    """

    title: str
    nodes: tuple[LayerNode, ...]
    edges: tuple[tuple[int, int], ...]
    layers: tuple[str, ...]
    colours: Mapping[str, tuple[float, ...]]  # what the Architecture View can show, one number an observed layer
    examples: tuple[str, ...]  # "val-17 · true 3 · …", as in Maps
    images: np.ndarray  # (2, N, H, W, 3): clean, adversarial
    classes: tuple[tuple[str, str], ...]  # true class and target, (N,)
    strength: tuple[float, ...]  # (S,)
    position: np.ndarray
    turning: tuple[int, ...]  # (N,) index into ``layers``, −1: none
    perception: np.ndarray  # (2, L, N, 2) clean, adversarial: share of near background images of the true class, the target
    pair: tuple[int, ...]  # (N,)
    bands: np.ndarray
    units: tuple[UnitMaps | None, ...]  # (L,), None for a layer without maps
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stored:
    """A chart as a page holds it, encoded, with its pictures and its scales over all epochs: shown again as it is."""

    chart: Mapping[str, Any]
    blobs: Mapping[str, str]
    limits: Mapping[str, list[float]]


Question = Literal["trust", "healthy", "where", "units", "changed", "next"]


@dataclass(frozen=True)
class Answer:
    """What a panel says to one of the questions that the overview answers; ``command`` does it, where there is one."""

    question: Question
    text: str
    command: str = ""


Chart = Trend | Bars | Intervals | Lines | Scatter | Maps | Table | Profiles | Stored


@dataclass(frozen=True)
class View:
    """What one panel shows for one epoch.

    ``headline`` is one sentence computed from the numbers shown: what a reader should conclude.  ``how_to_read`` is the
    one line that a newcomer needs before the charts.
    """

    name: str  # W&B key and page anchor, e.g. "pse"
    title: str
    headline: str
    charts: tuple[Chart, ...]
    figure: np.ndarray | None = None  # (H, W, 3) uint8: W&B shows [0,1] floats as black
    scalars: Mapping[str, float] = field(default_factory=dict)
    table: Table | None = None  # goes to W&B with fixed example ids
    how_to_read: str = ""
    answers: tuple[Answer, ...] = ()  # for the overview, where those of one question stand together
    drawing: Figure | None = None  # what ``figure`` shows, for papers: written as SVG


class Panel(Protocol):
    """A panel: measure on the probe, return what to show.  ``name`` is unique within a dashboard."""

    name: str

    def __call__(self, probe: Probe) -> View: ...
