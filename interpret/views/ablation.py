"""Pictures of an ablation for papers: fronts of clean against robust accuracy, and a sweep in parallel coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from interpret.views import raster
from interpret.views.figures import DPI, INK, MUTED, _plain_axes

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


def fronts_figure(fronts: Sequence[Front], attack: str, title: str = "Clean against robust accuracy") -> Figure:
    """A line a method through its settings, bars of one standard deviation; the chosen setting is filled and named."""
    figure = Figure(figsize=(6.4, 4.6), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    named = []
    for i, front in enumerate(fronts):
        order = np.argsort(front.mean[:, 0])
        clean, robust = 100 * front.mean[order].T
        colour, marker = raster.SERIES[i % len(raster.SERIES)], MARKERS[i % len(MARKERS)]
        axes.errorbar(
            clean,
            robust,
            xerr=100 * np.nan_to_num(front.std[order, 0]),
            yerr=100 * np.nan_to_num(front.std[order, 1]),
            fmt=marker + LINES[(i // len(MARKERS) + i) % len(LINES)],
            color=colour,
            mfc="white",
            ms=6,
            lw=1.3,
            elinewidth=0.6,
            capsize=1.5,
            label=shorten(front.method, 36, placeholder="…"),
        )
        if front.chosen >= 0:
            x, y = 100 * front.mean[front.chosen]
            axes.plot(x, y, marker, color=colour, ms=7, zorder=3)  # above the error bars
            named.append((x, y, " · ".join(part for part in (front.method, front.points[front.chosen]) if part), colour))
    _name(axes, named)
    _plain_axes(axes, title)
    axes.set_xlabel("clean accuracy (%)", fontsize=8, color=MUTED)
    axes.set_ylabel(f"accuracy under {attack} (%)", fontsize=8, color=MUTED)
    if len(fronts) > 1:
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _name(axes: Axes, named: Sequence[tuple[float, float, str, str]]) -> None:
    """Names to the right of their points, moved down until none covers another."""
    low, high = axes.get_ylim()
    step, last = 0.045 * (high - low), np.inf
    left, right = axes.get_xlim()
    for x, y, text, colour in sorted(named, key=lambda entry: -entry[1]):
        last = min(y, last - step)
        at_left = x > (left + right) / 2
        axes.annotate(
            shorten(text, 44, placeholder="…"),
            (x, y),
            (x + (-0.02 if at_left else 0.02) * (right - left), last),
            fontsize=7,
            color=INK,
            ha="right" if at_left else "left",
            va="center",
            parse_math=False,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkB": 3},
        )


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
