"""Pictures of an ablation for papers: fronts of clean against robust accuracy, and a sweep in parallel coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from glassarmor.interpret.views.charts import Intervals
from glassarmor.interpret.views.draw import raster
from glassarmor.interpret.views.draw.figures import DPI, INK, MUTED, plain_axes

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # the shape tells methods apart in a grey print
LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Front:
    """One method: (P, 2) mean clean and robust accuracy in [0,1] of its settings, their standard deviations, and names."""

    method: str
    mean: np.ndarray
    std: np.ndarray
    points: tuple[str, ...]
    chosen: int  # index of the setting that the validation split chose, −1: none


def fronts_figure(fronts: Sequence[Front], attack: str, baseline: str | None = None) -> Figure:
    """A line a method through its settings, bars of one standard deviation; the chosen setting is filled and named.

    The baseline's line is heavy and in ink: what lies above it is more robust at the same clean accuracy.
    """
    height = max(4.2, 0.19 * len(fronts) + 0.9)
    figure = Figure(figsize=(8.2, height), dpi=DPI)
    axes = figure.add_axes((0.08, 0.5 / height, 0.54, 1 - 0.9 / height))
    named = []
    for i, front in enumerate(fronts):
        order = np.argsort(front.mean[:, 0])
        clean, robust = 100 * front.mean[order].T
        own = front.method == baseline
        colour, marker = (INK, "o") if own else _style(i)
        axes.errorbar(
            clean,
            robust,
            xerr=100 * np.nan_to_num(front.std[order, 0]),
            yerr=100 * np.nan_to_num(front.std[order, 1]),
            fmt=marker + ("-" if own else LINES[i % len(LINES)]),
            color=colour,
            mfc="white",
            ms=5.5,
            lw=2.4 if own else 1.2,
            elinewidth=0.5,
            capsize=1.5,
        )
        if front.chosen >= 0:
            x, y = 100 * front.mean[front.chosen]
            axes.plot(x, y, marker, color=colour, ms=6.5, zorder=3)  # above the error bars
            text = " · ".join(part for part in (front.method, front.points[front.chosen]) if part)
            named.append((x, y, text, (colour, marker)))
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    _name(axes, named, 0.16 / height)
    heavy = f"; heavy: {shorten(baseline, 20, placeholder='…')}" if baseline else ""
    plain_axes(axes, f"Clean against robust accuracy, bars ± 1 std over seeds{heavy}")
    axes.set_xlabel("clean accuracy (%)", fontsize=8, color=MUTED)
    axes.set_ylabel(f"accuracy under {attack} (%)", fontsize=8, color=MUTED)
    return figure


def _style(i: int) -> tuple[str, str]:
    """Colour and marker of the i-th method: 64 pairs before one comes again."""
    return raster.SERIES[i % len(raster.SERIES)], MARKERS[(i + i // len(raster.SERIES)) % len(MARKERS)]


def _name(axes: Axes, named: Sequence[tuple[float, float, str, tuple[str, str]]], step: float) -> None:
    """Names in a column beside the axes, each as high as its point or as near as a ``step`` (of the height) apart lets."""
    low, high = axes.get_ylim()
    axes.set_xlim(axes.get_xlim())
    ordered = sorted(named, key=lambda entry: -entry[1])
    wanted = [(y - low) / (high - low) for _, y, _, _ in ordered]
    places: list[float] = []
    for k, want in enumerate(wanted):
        # Room for those below, and not above the one before.
        lowest = (len(wanted) - 1 - k) * step
        places.append(min(max(want, lowest), places[-1] - step if places else 1.0))
    for (x, y, text, (colour, marker)), place in zip(ordered, places, strict=True):
        axes.annotate(
            shorten(text, 48, placeholder="…"),
            (x, y),
            (1.045, place),
            textcoords="axes fraction",
            fontsize=7,
            color=INK,
            va="center",
            parse_math=False,
            arrowprops={
                "arrowstyle": "-",
                "ls": ":",  # not an error bar
                "color": colour,
                "lw": 0.5,
                "relpos": (0, 0.5),
                "shrinkA": 8,
                "shrinkB": 3,
            },
        )
        axes.plot(1.025, place, marker, color=colour, ms=5, transform=axes.transAxes, clip_on=False)


def intervals_figure(chart: Intervals) -> Figure:
    """The forest plot for papers: what crosses the line at 0 is hollow and grey, what does not is filled and in ink."""
    rows = range(len(chart.names))
    height = max(1.6, 0.21 * len(rows) + 0.85)
    figure = Figure(figsize=(8.2, height), dpi=DPI)
    axes = figure.add_axes((0.34, 0.45 / height, 0.4, 1 - 0.75 / height))
    axes.axvline(0, color=INK, lw=0.8)
    for i, (name, text) in enumerate(zip(chart.names, chart.texts, strict=True)):
        low, middle, high = chart.low[i], chart.middle[i], chart.high[i]
        apart = low > 0 or high < 0  # false for NaN
        colour = INK if apart else MUTED
        axes.plot(np.clip([low, high], -chart.limit, chart.limit), [i, i], color=colour, lw=1.6, solid_capstyle="butt")
        for edge, beyond, marker in ((-chart.limit, low < -chart.limit, "<"), (chart.limit, high > chart.limit, ">")):
            if beyond:
                axes.plot(edge, i, marker, color=colour, ms=4, clip_on=False)
        axes.plot(middle, i, "o", color=colour, mfc=colour if apart else "white", ms=5)
        for x, words, align in ((-0.03, shorten(name, 46, placeholder="…"), "right"), (1.03, text, "left")):
            axes.text(x, i, words, transform=axes.get_yaxis_transform(), ha=align, va="center", fontsize=7, parse_math=False)
    axes.set_xlim(-chart.limit, chart.limit)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    plain_axes(axes, "")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(chart.x_label, fontsize=8, color=MUTED)
    figure.text(0.01, 1 - 0.08 / height, chart.title, va="top", fontsize=8.5, color=INK, parse_math=False)
    return figure


def parallel_figure(axes_names: Sequence[str], rows: np.ndarray, groups: Sequence[str], colour_by: str) -> Figure:
    """A sweep in parallel coordinates: a line a setting across one axis a quantity, each axis from its least to its largest.

    Args:
        axes_names: (Q,).
        rows: (S, Q) numbers; a NaN breaks the line.
        groups: (S,) method of each row: the style of its line.
        colour_by: the quantity whose value colours the lines, darker is more.

    Raises:
        ValueError: a quantity that is no axis.
    """
    if colour_by not in axes_names:
        raise ValueError(f"colour_by: expected one of {', '.join(axes_names)}; found {colour_by!r}")
    low, high = np.nanmin(rows, 0, initial=np.inf), np.nanmax(rows, 0, initial=-np.inf)
    width = np.where(high > low, high - low, 1)
    places = np.where(high > low, (rows - low) / width, 0.5)
    figure = Figure(figsize=(max(6.0, 1.25 * len(axes_names) + 1.6), 4.4), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    shade = np.nan_to_num(places[:, list(axes_names).index(colour_by)])
    methods = list(dict.fromkeys(groups))
    for row, group, value in zip(places, groups, shade, strict=True):
        m = methods.index(group)
        colour = raster.SEQUENTIAL[int((0.25 + 0.75 * value) * (raster.LEVELS - 1))] / 255
        axes.plot(row, LINES[m % len(LINES)], marker=MARKERS[m % len(MARKERS)], ms=3.5, color=colour, lw=1.1)
    for method in methods:
        m = methods.index(method)
        axes.plot(
            [],
            [],
            LINES[m % len(LINES)],
            marker=MARKERS[m % len(MARKERS)],
            ms=4,
            color=MUTED,
            label=shorten(method, 36, placeholder="…"),
        )
    for i, (bottom, top) in enumerate(zip(low, high, strict=True)):
        axes.axvline(i, color="#c9ced6", lw=0.8, zorder=0)
        for y, value, va in ((-0.02, bottom, "top"), (1.02, top, "bottom")):
            axes.text(i, y, f"{value:.3g}".replace("-", "−"), ha="center", va=va, fontsize=7, color=MUTED)
    axes.set_xticks(range(len(axes_names)), [name.replace("/", "/\n") for name in axes_names], fontsize=7, color=INK)
    axes.set_yticks([])
    axes.set_ylim(-0.1, 1.1)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"A line a setting, mean over seeds; darker is more {colour_by}", fontsize=8.5, loc="left", color=INK)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
