"""Charts as still pictures: (H, W, 3) uint8 for W&B, PNG or SVG for papers.

Matplotlib's objects only, never ``pyplot``: no global state, so figures may be drawn from any thread or process.
A grid of maps is composed as one picture in numpy; one axes an image would take seconds.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patches import Patch

from glassarmor.interpret.views.charts import Bars, Lines, MapColumn, Maps, Scatter
from glassarmor.interpret.views.draw import raster

DPI = 100
INK, MUTED = "#171b22", "#5a6472"


def to_array(figure: Figure) -> np.ndarray:
    """Draw a figure, (H, W, 3) uint8: W&B shows floats in [0,1] as black."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, SVG or PDF, by the path's suffix."""
    FigureCanvasAgg(figure)
    if Path(path).is_symlink():  # the link is replaced, not what it leads to
        Path(path).unlink()
    vector = Path(path).suffix in (".svg", ".pdf")
    # Pictures inside a drawing are placed by the pixel, so that a vector file keeps the figure's own resolution.  The same
    # figure is the same file: no date, no names drawn by chance.
    dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(Path(path).suffix)
    with rc_context({"svg.hashsalt": "glassarmor"}):
        figure.savefig(path, dpi=DPI if vector else 2 * DPI, metadata=dated)


def write_png(picture: np.ndarray, path: str | Path) -> None:
    """Write a picture (H, W, 3) uint8 as PNG."""
    if Path(path).is_symlink():
        Path(path).unlink()
    imsave(path, picture)


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


# ---- maps -----------------------------------------------------------------------------------------------------------


def maps_figure(maps: Maps, limits: Mapping[str, float], heading: str = "", tile: int = 96) -> Figure:
    """A grid of maps with titles and one colour bar a scale group.

    Args:
        maps: what to draw.
        limits: magnitude at which the colour of each scale group saturates.  Keep it constant over epochs and pictures
            of different epochs compare.  A group without a limit gets the next 1-2-5 number above its largest value.
        heading: one line above the grid.
        tile: pixels a map.
    """
    gap, left, bottom = 6, 172, 96
    fixed, limits = limits, {**_automatic_limits(maps), **limits}
    grid = raster.compose(_pictures(maps, limits), tile, gap)
    width = max(left + grid.shape[1] + 14, 720)
    lines = textwrap.wrap(heading or maps.title, width // 9)
    top = 72 + 18 * len(lines)
    height = top + grid.shape[0] + bottom
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.figimage(grid, xo=left, yo=bottom, origin="upper")

    def write(x: float, y: float, text: str, **style: object) -> None:  # pixels from the top left
        figure.text(x / width, 1 - y / height, text, parse_math=False, **style)  # type: ignore[arg-type]

    write(14, 12, "\n".join(lines), va="top", size=10.5, weight="bold", color=INK)
    for j, column in enumerate(maps.columns):
        label = textwrap.fill(column.title, 15) + (f"\n{column.unit}" if column.unit else "")
        write(left + j * (tile + gap) + tile / 2, top - 6, label, ha="center", va="bottom", size=8, color=INK)
    for i, row in enumerate(maps.row_titles):
        text = "\n".join(textwrap.fill(part, 26) for part in row.split(" · "))
        write(14, top + i * (tile + gap) + tile / 2, text, va="center", size=8, color=INK)
    _legends(figure, maps, limits, fixed, width, height)
    return figure


def _is_map(column: MapColumn) -> bool:
    return column.kind in ("signed", "positive")


def _automatic_limits(maps: Maps) -> dict[str, float]:
    largest: dict[str, float] = {}
    for column in filter(_is_map, maps.columns):
        finite = np.abs(column.values[np.isfinite(column.values)])
        largest[column.scale_group] = max(largest.get(column.scale_group, 0.0), float(finite.max(initial=0.0)))
    return {group: raster.nice_limit(value) for group, value in largest.items()}


def _pictures(maps: Maps, limits: Mapping[str, float]) -> list[list[np.ndarray]]:
    rows: list[list[np.ndarray]] = []
    for i in range(len(maps.row_titles)):
        row: list[np.ndarray] = []
        image: np.ndarray | None = None
        for column in maps.columns:
            values = np.asarray(column.values[i])
            if column.kind == "image":
                picture = image = raster.colour_image(values)
            elif column.kind == "category":
                picture = raster.colour_category(values)
            else:
                paint = raster.colour_signed if column.kind == "signed" else raster.colour_positive
                picture = paint(values, limits[column.scale_group])
            if column.overlay and image is not None:
                picture = raster.overlay(raster.resize_nearest(picture, *image.shape[:2]), image)
            row.append(picture)
        rows.append(row)
    return rows


def _legends(
    figure: Figure, maps: Maps, limits: Mapping[str, float], fixed: Mapping[str, float], width: int, height: int
) -> None:
    """Colour bars and the key of the categories, side by side under the grid."""
    groups = list(dict.fromkeys(c.scale_group for c in maps.columns if _is_map(c)))
    category = next((c for c in maps.columns if c.kind == "category"), None)
    slots = len(groups) + (category is not None)
    step = (width - 28) / max(slots, 1)
    for k, group in enumerate(groups):
        columns = [c for c in maps.columns if _is_map(c) and c.scale_group == group]
        axes = figure.add_axes((((14 + k * step) / width), 66 / height, min(step - 40, 260) / width, 11 / height))
        _colour_bar(figure, axes, columns, limits[group], group in fixed)
    if category is not None:
        patches = [
            Patch(color=raster.CATEGORIES[i % len(raster.CATEGORIES)], label=name)
            for i, name in enumerate(category.categories)
        ]
        figure.legend(
            handles=patches,
            loc="upper left",
            bbox_to_anchor=((14 + len(groups) * step) / width, 82 / height),
            ncols=2,
            fontsize=8,
            frameon=False,
            borderpad=0,
            handlelength=1.2,
        )


def _colour_bar(figure: Figure, axes: Axes, columns: Sequence[MapColumn], limit: float, fixed: bool) -> None:
    signed = any(column.kind == "signed" for column in columns)
    beyond = float(np.mean([np.mean(np.abs(column.values) > limit * (1 + 1e-9)) for column in columns]))
    norm = FuncNorm((lambda v: np.sign(v) * np.sqrt(np.abs(v)), lambda u: np.sign(u) * u**2), -limit if signed else 0, limit)
    table = raster.DIVERGING if signed else raster.SEQUENTIAL
    ticks = [-limit, -limit / 4, 0, limit / 4, limit] if signed else [0, limit / 4, limit]
    bar = figure.colorbar(
        ScalarMappable(norm, ListedColormap(table / 255)),
        cax=axes,
        orientation="horizontal",
        ticks=ticks,
        extend=("both" if signed else "max") if beyond > 0 else "neither",
    )
    bar.ax.set_xticklabels([_number(t) for t in ticks])
    bar.ax.tick_params(labelsize=7.5, length=2, colors=MUTED)
    bar.ax.minorticks_off()
    bar.outline.set_linewidth(0.4)
    unit = columns[0].unit
    note = "square-root scale" + (", same every epoch" if fixed else "")
    note += f"\n{_percent(beyond)} of cells beyond it" if beyond > 0 else ""
    name = f"{columns[0].scale_group}{', ' + unit if unit else ''}"
    bar.set_label(f"{name}\n{note}", size=7.5, color=INK, loc="left")


# ---- bars, lines, points, trends ------------------------------------------------------------------------------------


def plain_axes(axes: Axes, title: str) -> None:
    axes.set_title(textwrap.fill(title, 46), fontsize=8.5, loc="left", color=INK, parse_math=False)
    axes.tick_params(labelsize=8, length=2, colors=MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c9ced6")


def _draw_bars(axes: Axes, bars: Bars) -> None:
    places = np.arange(len(bars.values))
    factor = 100 if bars.unit == "%" else 1
    values = np.array(bars.values) * factor
    axes.barh(places, values, color=[raster.SERIES[0 if v < 0 else 1] for v in values], height=0.7)
    unit = bars.unit
    if bars.reference is not None:
        axes.plot(np.array(bars.reference) * factor, places, "|", color=INK, ms=10, mew=1.6)
        unit += f"   (mark: {bars.reference_label})"
    axes.set_yticks(places, [textwrap.shorten(label, 22, placeholder="…") for label in bars.labels], parse_math=False)
    axes.invert_yaxis()
    plain_axes(axes, bars.title)
    axes.set_xlabel(unit, fontsize=8, color=MUTED)


def _draw_lines(axes: Axes, lines: Lines) -> None:
    across, up = (100 if unit == "%" else 1 for unit in (lines.x_unit, lines.unit))
    for i, edges in enumerate(lines.spread):
        if edges is not None:
            low, high = (np.array(edge, float) * up for edge in edges)
            colour = raster.SERIES[i % len(raster.SERIES)]
            axes.fill_between(np.array(lines.x) * across, low, high, color=colour, alpha=0.18, lw=0)
    for i, (label, values) in enumerate(zip(lines.labels, lines.series, strict=True)):
        axes.plot(
            np.array(lines.x) * across,
            np.array(values, float) * up,
            ("-", "-", "-", "--", ":", "-.")[i % 6],
            label=label,
            color=raster.SERIES[i % len(raster.SERIES)],
            lw=1.8,
        )
    if lines.limits:
        axes.set_ylim(lines.limits[0] * up, lines.limits[1] * up)
    plain_axes(axes, lines.title)
    axes.set_xlabel(lines.x_label + (" (%)" if across == 100 else ""), fontsize=8, color=MUTED)
    axes.set_ylabel(lines.unit, fontsize=8, color=MUTED)
    if lines.x_names:
        name_places(axes, np.array(lines.x) * across, lines.x_names)
    axes.legend(fontsize=7, frameon=False)


def name_places(axes: Axes, places: np.ndarray, names: Sequence[str]) -> None:
    """Names along the horizontal axis, slanted; every k-th of many."""
    step = -(-len(names) // 12)
    short = [name if len(name) < 15 else "…" + name[-13:] for name in names]
    axes.set_xticks(places[::step], short[::step], rotation=28, ha="right", fontsize=7, parse_math=False)


def _draw_scatter(axes: Axes, scatter: Scatter) -> None:
    """All groups at once, each in a colour; a still picture has no group to choose."""
    largest = max([*scatter.size, 1e-12])
    for g, name in enumerate(scatter.groups):
        inside = [i for i, group in enumerate(scatter.group) if group == g]
        axes.scatter(
            [scatter.x[i] for i in inside],
            [scatter.y[i] for i in inside],
            [6 + 90 * max(scatter.size[i], 0) / largest if scatter.size_label else 20 for i in inside],
            color=raster.SERIES[g % len(raster.SERIES)],
            marker=("o", "s", "^", "D", "v", "P")[g % 6],
            alpha=0.65,
            linewidths=0,
            label=name,
        )
    if scatter.diagonal:
        axes.axline((0, 0), slope=1, color=MUTED, ls="--", lw=1)
    plain_axes(axes, scatter.title)
    axes.set_xlabel(scatter.x_label, fontsize=8, color=MUTED)
    axes.set_ylabel(scatter.y_label, fontsize=8, color=MUTED)
    axes.legend(fontsize=7, frameon=False)


def charts_figure(charts: Sequence[Bars | Lines | Scatter], heading: str = "", columns: int = 3) -> Figure:
    """Several charts side by side."""
    columns = max(1, min(columns, len(charts)))
    rows = max(1, -(-len(charts) // columns))
    width, row = 380 * columns, 250  # pixels; fixed places, since a layout engine draws everything twice
    title = textwrap.wrap(heading, width // 9)
    head = 14 + 18 * len(title)
    height = head + rows * row
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.text(
        14 / width, 1 - 10 / height, "\n".join(title), va="top", size=10.5, weight="bold", color=INK, parse_math=False
    )
    for i, chart in enumerate(charts):
        across, down = i % columns, i // columns
        left = 110 if isinstance(chart, Bars) else 62
        foot = 46 + 20 * bool(isinstance(chart, Lines) and chart.x_names)
        inside = row - 42 - foot
        box = (across * 380 + left, height - head - down * row - 42 - inside, 380 - left - 20, inside)
        axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
        if isinstance(chart, Bars):
            _draw_bars(axes, chart)
        elif isinstance(chart, Lines):
            _draw_lines(axes, chart)
        else:
            _draw_scatter(axes, chart)
    return figure
