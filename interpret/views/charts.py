"""Charts as data: what a panel shows, drawn by the page and by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


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


Chart = Trend | Bars | Intervals | Lines | Scatter | Maps | Table | Profiles | Stored
