"""What every type of chart keeps: one row a type; both renderers draw it, the page's and the one for papers."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from glassarmor.interpret import storage
from glassarmor.interpret.signals.pse import KIND_NAMES
from glassarmor.interpret.views.charts import (
    Bars,
    Chart,
    Intervals,
    LayerNode,
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
from glassarmor.interpret.views.draw import ablation, figures, text
from glassarmor.interpret.views.page.encode import encode

NAN = float("nan")
NAME = "</script> $x_1$ & [/b] \\alpha"  # somebody's class, in a page, a figure, a terminal and LaTeX


def maps(name: str = NAME) -> Maps:
    rng = np.random.default_rng(0)
    signed = rng.normal(size=(2, 8, 8))
    signed[0, 0, 0] = NAN
    return Maps(
        "Maps",
        (f"{name} 0", f"{name} 1"),
        (
            MapColumn("Clean", rng.random((2, 16, 16, 3)), "image"),
            MapColumn("Effect", signed, "signed", "logits"),
            MapColumn("Large", rng.normal(size=(2, 32, 32)), "signed", "logits", overlay=True, scale_group="cam"),
            MapColumn("Size", np.abs(signed), "positive", "logits"),
            MapColumn("Kind", rng.integers(0, 4, (2, 8, 8)), "category", categories=KIND_NAMES),
        ),
    )


def profiles(name: str = NAME) -> Profiles:
    rng = np.random.default_rng(0)
    units = UnitMaps((0, 2), 4, rng.normal(size=(2, 2, 2, 4, 4)), {"sensitivity (σ)": (0.5, NAN)})
    return Profiles(
        "Profiles",
        (LayerNode("conv", "Conv2d", "4×8×8", 40, 0, 0, 0), LayerNode(name, "Linear", "2", 10, 1, 0, 1)),
        ((0, 1),),
        ("conv", name),
        {"divergence": (0.1, 0.2)},
        (f"{name} 0", f"{name} 1"),
        rng.random((2, 2, 16, 16, 3)),
        (("a", "b"), ("b", name)),
        (0.0, 1.0),
        rng.random((2, 2, 2)),
        (-1, 1),
        rng.random((2, 2, 2)),
        (0, 0),
        rng.random((1, 2, 2, 3)),
        (units, None),
    )


# An example that shows all it can; what draws it beside the page (None: the page alone does).
CHARTS: Mapping[type, tuple[Chart, Callable[[Chart], object] | None]] = {
    Trend: (Trend("Accuracy", ("a", "b"), ("clean", NAME), "%", limits=(0, 1)), None),
    Bars: (
        Bars("Bars", (NAME, "unit 1"), (2.0, -1.0), "σ", reference=(1.0, 1.0), reference_label="mean"),
        lambda chart: figures.charts_figure([chart]),
    ),
    Intervals: (
        Intervals("Above", "points", (NAME, "b"), (1.0, 0.2), (0.5, NAN), (1.5, NAN), ("+1.0", NAME), 2.0),
        ablation.intervals_figure,
    ),
    Lines: (
        Lines("Curves", (0.0, 0.5, 1.0), "strength", (NAME, "b"), ((0.0, NAN, 1.0), (2.0, 1.0, 0.5)), "logits"),
        lambda chart: figures.charts_figure([chart]),
    ),
    Scatter: (
        Scatter(
            "Points", "x", "y", (NAME, "1", "2"), (0.0, 1.0, NAN), (1.0, 0.5, 2.0), (1.0, 2.0, 3.0), "σ", (0, 0, 0),
            (NAME,), "alike", replace(maps(), own_scale=True), (1, 0, -1),
        ),
        lambda chart: figures.charts_figure([chart]),
    ),
    Maps: (maps(), lambda chart: figures.maps_figure(chart, {"effect": 1.0}, NAME)),
    Table: (Table("Cells", ("id", "value"), [(NAME, 0.5), ("val-1", NAN)]), text.markdown),
    Profiles: (profiles(), None),
}  # fmt: skip
each = pytest.mark.parametrize("kind", CHARTS, ids=lambda kind: kind.__name__)


def test_every_type_of_chart_has_a_row() -> None:
    assert set(CHARTS) == set(typing.get_args(Chart)) - {Stored}  # what was encoded before
    assert all(isinstance(chart, kind) for kind, (chart, _) in CHARTS.items())


@each
def test_the_page_gets_strict_json_that_is_safe_inside_a_script(kind: type) -> None:
    chart, _ = CHARTS[kind]
    found = encode(chart)
    written = storage.to_json(found.chart)
    assert "<" not in written
    assert (
        json.loads(written, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))["type"] == kind.__name__.lower()
    )
    assert storage.to_json(encode(chart).chart) == written, "the same again"
    kept = encode(Stored(found.chart, found.blobs, found.limits))
    assert storage.to_json(kept.chart) == written, "stored and encoded again it is the same"


def test_only_what_grows_over_epochs_and_what_is_steered_is_drawn_by_the_page_alone() -> None:
    """A picture of one epoch holds no trend; of profiles it is made from the measurement, :func:`.flow_figure`."""
    assert {kind for kind, (_, draw) in CHARTS.items() if draw is None} == {Trend, Profiles}


@pytest.mark.parametrize("kind", [kind for kind, (_, draw) in CHARTS.items() if draw], ids=lambda kind: kind.__name__)
def test_it_is_drawn_beside_the_page_too(kind: type) -> None:
    chart, draw = CHARTS[kind]
    drawn = draw(chart)
    if isinstance(drawn, str):
        assert NAME not in drawn, "what has a meaning in Markdown is escaped"
        assert drawn.count("\n") >= 3
        return
    picture = figures.to_array(drawn)
    assert (picture.dtype, picture.ndim, picture.shape[2]) == (np.uint8, 3, 3)
    assert picture.max() > 200
    assert picture.std() > 5
