"""Charts to compact JSON for the local page: maps quantised with a step of their own, images stored once by content."""

from __future__ import annotations

import base64
import hashlib
import math
from dataclasses import asdict, dataclass, field, fields
from functools import singledispatch
from typing import Any

import numpy as np

from glassarmor.interpret.views.charts import (
    Bars,
    Chart,
    Intervals,
    Lines,
    MapColumn,
    Maps,
    Profiles,
    Scatter,
    Stored,
    Table,
    Trend,
    UnitMaps,
)
from glassarmor.interpret.views.draw.raster import colour_image

FINE_CELLS = 64  # maps up to 8×8 cells are cheap: 16 bits each, so that the value under the pointer is exact enough


@dataclass(frozen=True)
class Encoded:
    """A chart as plain JSON.  ``blobs``: content key → base64.  ``limits``: scale group → largest magnitude per row."""

    chart: dict[str, Any]
    blobs: dict[str, str] = field(default_factory=dict)
    limits: dict[str, list[float]] = field(default_factory=dict)


def quantise(values: np.ndarray) -> tuple[np.ndarray, float]:
    """A map as int8 (int16 where small) and its step: value = code · step, off by at most half a step.

    The lowest code stands for "no value" (NaN, infinity).
    """
    dtype = np.int16 if values.size <= FINE_CELLS else np.int8
    info = np.iinfo(dtype)
    finite = np.isfinite(values)
    step = float(np.abs(values[finite]).max(initial=0.0)) / info.max or 1.0
    codes = np.round(np.where(finite, values, 0) / step).clip(-info.max, info.max)
    return np.where(finite, codes, info.min).astype(dtype), step


def in_base64(array: np.ndarray) -> str:
    array = np.ascontiguousarray(array)
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()).decode("ascii")


def shrink(values: np.ndarray, max_side: int, average: bool = True) -> np.ndarray:
    """(n, H, W, …) → no side longer than ``max_side``: block means, or every k-th value for indices."""
    factor = math.ceil(max(values.shape[1:3]) / max_side)
    if factor <= 1:
        return values
    n, height, width = values.shape[0], values.shape[1] // factor, values.shape[2] // factor
    values = values[:, : height * factor, : width * factor]
    if not average:
        return values[:, factor // 2 :: factor, factor // 2 :: factor]
    return values.reshape(n, height, factor, width, factor, *values.shape[3:]).mean((2, 4))


@singledispatch
def encode(chart: Chart, max_side: int = 64) -> Encoded:
    """One chart as JSON; a new chart type registers here and in ``page/charts.js``."""
    raise TypeError(
        f"chart: expected Trend, Bars, Intervals, Lines, Scatter, Maps, Table or Profiles; found {type(chart).__name__}"
    )


@encode.register
def _(chart: Trend, max_side: int = 64) -> Encoded:
    return Encoded({"type": "trend", **asdict(chart)})


@encode.register
def _(chart: Bars, max_side: int = 64) -> Encoded:
    return Encoded({"type": "bars", **asdict(chart)})


@encode.register
def _(chart: Intervals, max_side: int = 64) -> Encoded:
    return Encoded({"type": "intervals", **asdict(chart)})


@encode.register
def _(chart: Lines, max_side: int = 64) -> Encoded:
    return Encoded({"type": "lines", **asdict(chart)})


@encode.register
def _(chart: Scatter, max_side: int = 64) -> Encoded:
    if chart.details is not None and not chart.details.own_scale:
        raise ValueError(f"{chart.title}: details need own_scale=True; their rows belong to points, which may change")
    flat = {field.name: getattr(chart, field.name) for field in fields(chart) if field.name != "details"}
    if chart.details is None:
        return Encoded({"type": "scatter", **flat, "details": None})
    inner = encode(chart.details, max_side)
    return Encoded({"type": "scatter", **flat, "details": inner.chart}, inner.blobs)


@encode.register
def _(chart: Profiles, max_side: int = 64) -> Encoded:
    blobs: dict[str, str] = {}
    pictures = [[_image(cell, blobs) for cell in shrink(side, max_side)] for side in chart.images]
    height, width = shrink(chart.images[0], max_side).shape[1:3]
    plain_chart = {
        "type": "profiles",
        "title": chart.title,
        "nodes": [asdict(node) for node in chart.nodes],
        "edges": chart.edges,
        "layers": chart.layers,
        "colours": dict(chart.colours),
        "examples": chart.examples,
        "images": {"height": height, "width": width, "clean": pictures[0], "adv": pictures[1]},
        "classes": chart.classes,
        "strength": chart.strength,
        "position": np.round(chart.position.astype(np.float64), 4).tolist(),
        "turning": chart.turning,
        "perception": np.round(chart.perception, 3).tolist(),
        "pair": chart.pair,
        "bands": np.round(chart.bands.astype(np.float64), 3).tolist(),
        "units": [None if units is None else _units(units, blobs) for units in chart.units],
        "warnings": chart.warnings,
    }
    # One colour scale a quantity, and one a layer's maps, over all epochs.  A difference may exceed what it is between.
    largest = [max((abs(v) for v in values if math.isfinite(v)), default=0.0) for values in chart.colours.values()]
    maps = [0.0 if u is None else _largest(u.values, u.values[:, 1] - u.values[:, 0]) for u in chart.units]
    return Encoded(plain_chart, blobs, {"colours": largest, "maps": maps})


def _largest(*parts: np.ndarray) -> float:
    return max(float(np.abs(np.nan_to_num(part)).max(initial=0.0)) for part in parts)


def _units(units: UnitMaps, blobs: dict[str, str]) -> dict[str, Any]:
    """One block of int8 codes with one step for the whole layer, so that units and examples compare."""
    height, width = units.values.shape[3:]
    step = float(np.abs(units.values).max(initial=0.0)) / 127 or 1.0
    codes = np.round(np.nan_to_num(units.values) / step).clip(-127, 127).astype(np.int8)
    filters = None
    if units.filters is not None:
        filters = {
            "height": units.filters.shape[1],
            "width": units.filters.shape[2],
            "cells": [_image(cell, blobs) for cell in units.filters],
        }
    return {
        "units": units.units,
        "of": units.of,
        "height": height,
        "width": width,
        "step": step,
        "data": in_base64(codes),
        "columns": dict(units.columns),
        "filters": filters,
    }


@encode.register
def _(chart: Stored, max_side: int = 64) -> Encoded:
    return Encoded(dict(chart.chart), dict(chart.blobs), dict(chart.limits))


@encode.register
def _(chart: Table, max_side: int = 64) -> Encoded:
    table = {"type": "table", "title": chart.title, "columns": chart.columns, "rows": list(chart.rows)}
    return Encoded({**table, "open": chart.open, "command": chart.command})


@encode.register
def _(chart: Maps, max_side: int = 64) -> Encoded:
    blobs: dict[str, str] = {}
    limits: dict[str, list[float]] = {}
    columns = []
    for column in chart.columns:
        values = shrink(np.asarray(column.values), max_side, average=column.kind != "category")
        if len(values) != len(chart.row_titles):
            raise ValueError(f"{chart.title}: {column.title}: expected {len(chart.row_titles)} maps, found {len(values)}")
        columns.append(
            {
                "title": column.title,
                "kind": column.kind,
                "unit": column.unit,
                "categories": column.categories,
                "group": column.scale_group,
                "overlay": column.overlay,
                "height": values.shape[1],
                "width": values.shape[2],
                "cells": [_cell(column, cell, blobs) for cell in values],
            }
        )
        if column.kind in ("signed", "positive"):
            largest = [float(np.abs(cell[np.isfinite(cell)]).max(initial=0.0)) for cell in values]
            before = limits.get(column.scale_group, [0.0] * len(largest))
            limits[column.scale_group] = [max(a, b) for a, b in zip(before, largest, strict=True)]
    encoded: dict[str, Any] = {"type": "maps", "title": chart.title, "rows": chart.row_titles, "columns": columns}
    if chart.own_scale:
        return Encoded({**encoded, "limits": limits}, blobs)
    return Encoded(encoded, blobs, limits)


def _cell(column: MapColumn, values: np.ndarray, blobs: dict[str, str]) -> dict[str, Any]:
    if column.kind == "image":
        return _image(values, blobs)
    if column.kind == "category":
        return {"data": in_base64(values.astype(np.uint8))}
    codes, step = quantise(values.astype(np.float64))
    return {"data": in_base64(codes), "step": step, "bits": codes.dtype.itemsize * 8}


def _image(values: np.ndarray, blobs: dict[str, str]) -> dict[str, Any]:
    pixels = colour_image(values)
    if (pixels == pixels[..., :1]).all():
        pixels = pixels[..., :1]
    data = in_base64(pixels)
    key = hashlib.blake2b(data.encode(), digest_size=9).hexdigest()
    blobs[key] = data
    return {"blob": key, "channels": pixels.shape[-1]}
