"""The Flow View as a still picture for papers: one network, or several beside each other on one evidence axis."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from glassarmor.interpret.profiles.profiles import ActivationProfiles
from glassarmor.interpret.views.draw import raster
from glassarmor.interpret.views.draw.figures import DPI, INK, MUTED, name_places
from glassarmor.interpret.views.rows import numpy

LOW, HIGH = -0.75, 1.75  # positions beyond are drawn at the edge, as on the page
CLEAN, ATTACKED = raster.SERIES[0], raster.SERIES[1]


def flow_figure(heading: str, names: Sequence[str], profiles: Sequence[ActivationProfiles]) -> Figure:
    """Above, each image's line, the medians and the middle half; below, where the images turn.  A column a network.

    Args:
        names: of the networks, shown above their column.
        profiles: of the same examples, each in its own network.
    """
    count = len(profiles)
    width = 760 if count == 1 else 420 * count
    title = textwrap.wrap(heading, width // 9)
    head = 18 * len(title) + 40
    height = head + 390
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.text(
        14 / width, 1 - 10 / height, "\n".join(title), va="top", size=10.5, weight="bold", color=INK, parse_math=False
    )
    each = (width - 96) / count
    most = max(float(found.turning_shares[:-1].max()) for found in profiles)
    for i, (name, found) in enumerate(zip(names, profiles, strict=True)):
        left, across = (82 + i * each) / width, (each - 22) / width
        lines = figure.add_axes((left, 165 / height, across, 225 / height))
        turns = figure.add_axes((left, 58 / height, across, 82 / height))
        _draw_lines(lines, found)
        _draw_turns(turns, found, most)
        lines.set_title(textwrap.shorten(name, 52, placeholder="…"), fontsize=9.5, loc="left", color=INK, parse_math=False)
        for axes in (lines, turns):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8, length=2, colors=MUTED)
            axes.tick_params(labelleft=i == 0)
    figure.axes[0].legend(fontsize=7.5, frameon=False, loc="upper left", ncols=2, borderpad=0.1)
    return figure


def _draw_lines(axes: Axes, found: ActivationProfiles) -> None:
    places = np.arange(len(found.layers))
    for lines, colour, name in ((found.clean, CLEAN, "clean"), (found.adv, ATTACKED, "attacked")):
        values = numpy(lines).clip(LOW, HIGH)
        alpha = float(np.clip(6 / values.shape[1], 0.08, 0.5))
        axes.add_collection(
            LineCollection([np.column_stack([places, line]) for line in values.T], colors=colour, lw=0.6, alpha=alpha)
        )
        low, median, high = np.nanquantile(values, (0.25, 0.5, 0.75), axis=1)
        axes.fill_between(places, low, high, color=colour, alpha=0.2, lw=0)
        axes.plot(places, median, color=colour, lw=2.4, marker="o", ms=3, label=f"{name}, median")
    axes.axhline(0.5, color=MUTED, lw=0.9, ls=(0, (4, 3)))
    axes.set_ylim(LOW, HIGH)
    axes.set_xlim(-0.15, len(places) - 0.85)
    axes.set_yticks([0, 0.5, 1], ["true class  0", "½", "target  1"])
    axes.set_xticks(places, [])


def _draw_turns(axes: Axes, found: ActivationProfiles, most: float) -> None:
    shares = 100 * numpy(found.turning_shares[:-1])
    axes.bar(np.arange(len(shares)), shares, color=ATTACKED, width=0.7)
    axes.set_ylim(0, max(100 * most, 1) * 1.25)
    axes.set_xlim(-0.65, len(shares) - 0.35)
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    turned = 100 - 100 * float(found.turning_shares[-1])
    axes.set_title(f"turn here, % of images ({turned:.0f} % in all)", fontsize=8, loc="left", color=MUTED)
    name_places(axes, np.arange(len(shares)), found.layers)
