"""Panel: which units does the attack move, and which of them carry the change of the decision?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from glassarmor.interpret.signals.sensitivity import SILENT, relative_unit_sensitivity
from glassarmor.interpret.views.charts import Bars, MapColumn, Maps, Scatter, Table
from glassarmor.interpret.views.draw.figures import charts_figure
from glassarmor.interpret.views.rows import class_name, numpy
from glassarmor.interpret.views.view import Answer, Probe, View

SHOWN_IMAGES = 2  # whose activation maps a chosen unit shows
SIDE = 8  # cells a side that they are kept at


@dataclass(frozen=True)
class LayerUnits:
    """One layer's units, each (C,).  ``promotion``, ``suppression``: mean over the probe images, logits."""

    layer: str
    sensitivity: np.ndarray  # mean |ΔA| in standard deviations of the unit over clean data; 0 for silent units
    promotion: np.ndarray
    suppression: np.ndarray
    gap: float  # how far the effects are from complete, as a share of the change of the margin

    @property
    def margin(self) -> np.ndarray:
        return self.promotion + self.suppression

    def top(self, count: int) -> np.ndarray:
        """The most sensitive units, most first."""
        return np.argsort(-self.sensitivity, kind="stable")[:count]

    def share(self, units: np.ndarray) -> float:
        """Share of the layer's sensitivity that these units carry."""
        return float(self.sensitivity[units].sum() / max(self.sensitivity.sum(), 1e-12))


class UnitsPanel:
    """Relative sensitivity, promotion and suppression of every unit of every observed layer.

    Effects are layer conductance along the straight path from x to x', all layers and both labels in one streamed pass.

    Args:
        top: units shown a layer.
        max_layers: layers drawn as bars, spread evenly over the observed ones, first and last included.
        steps: intervals of the path.
        detailed: units a layer whose activation maps are kept for a closer look.
    """

    name = "units"

    def __init__(self, top: int = 8, max_layers: int = 6, steps: int = 10, detailed: int = 8) -> None:
        self.top = top
        self.max_layers = max_layers
        self.steps = steps
        self.detailed = detailed

    def __call__(self, probe: Probe) -> View:
        layers = measure(probe, self.steps)
        if not layers:
            return View(self.name, "Attack-sensitive units", "No layer is observed; name some to see their units.", ())
        title = headline(layers, self.top)
        by_layer = layer_bars(layers)
        by_unit = [unit_bars(layer, self.top) for layer in pick_spread(layers, self.max_layers)]
        decision = margin_bars(layers[-1], self.top)
        points = unit_scatter(probe, layers, self.detailed)
        drawing, table = charts_figure([points, by_layer, decision], title), unit_table(layers)
        return View(
            name=self.name,
            title="Attack-sensitive units",
            headline=title,
            charts=(points, by_layer, decision, *by_unit, table),
            drawing=drawing,
            scalars={
                **{f"units/sensitivity/{layer.layer}": float(layer.sensitivity.mean()) for layer in layers},
                **{f"units/gap/{layer.layer}": layer.gap for layer in layers},
            },
            table=table,
            answers=(Answer("units", carriers(layers[-1], self.top)),),
            how_to_read="Right: the unit lowers the true class's logit under attack; up: it raises the target's. 1 σ means "
            "that the attack moves the unit as far as clean images vary it. The mark on each bar is the mean of the layer; "
            "units that stay silent on clean images are left out. A unit can move far without mattering: the margin bars "
            "show which ones carry the change of the decision.",
        )


def measure(probe: Probe, steps: int = 10) -> list[LayerUnits]:
    """All units of the observed layers, in execution order."""
    if not probe.layers:
        return []
    obs = probe.obs
    effects = probe.conductance(steps)
    gaps = effects.relative_gaps
    return [
        LayerUnits(
            layer,
            numpy(relative_unit_sensitivity(obs, layer, SILENT)),
            numpy(effects.units[layer].promotion.mean(0)),
            numpy(effects.units[layer].suppression.mean(0)),
            gaps[layer],
        )
        for layer in probe.layers
    ]


def pick_spread(layers: list[LayerUnits], count: int) -> list[LayerUnits]:
    """At most ``count`` of the layers, evenly over the depth."""
    picks = np.unique(np.linspace(0, len(layers) - 1, min(count, len(layers))).round().astype(int))
    return [layers[i] for i in picks]


def headline(layers: list[LayerUnits], top: int) -> str:
    moved = max(layers, key=lambda layer: float(layer.sensitivity.mean()))
    units = moved.top(top)
    peak = int(units[0])
    carriers = np.sort(layers[-1].margin)[::-1]
    gained = carriers.clip(min=0)
    share = gained[:top].sum() / max(gained.sum(), 1e-12)
    return (
        f"The attack moves layer {moved.layer} most, by {moved.sensitivity.mean():.2f} σ on average; its unit {peak} moves "
        f"{moved.sensitivity[peak]:.2f} σ, and its top {len(units)} of {len(moved.sensitivity)} units carry "
        f"{100 * moved.share(units):.0f} % of the layer's sensitivity (evenly spread: "
        f"{100 * len(units) / len(moved.sensitivity):.0f} %). In layer {layers[-1].layer} "
        f"{min(top, len(carriers))} of {len(carriers)} units carry {100 * share:.0f} % of the margin that the attack gains."
    )


def carriers(layer: LayerUnits, top: int) -> str:
    """Who carries the margin that the attack gains, by name."""
    gained = layer.margin.clip(min=0)
    order = np.argsort(-gained, kind="stable")[:top]
    total = gained.sum()
    if total <= 0:
        return f"No unit of layer {layer.layer} gives the attack any margin."
    share, even = 100 * gained[order].sum() / total, 100 * len(order) / len(gained)
    return (
        f"In layer {layer.layer} units {', '.join(map(str, order))} carry {share:.0f} % of the margin the attack gains, "
        f"where {len(order)} of {len(gained)} evenly spread would carry {even:.0f} %."
    )


def unit_scatter(probe: Probe, layers: list[LayerUnits], detailed: int) -> Scatter:
    """Suppression of the true class against promotion of the target; the maps of the units that stand out."""
    shown = {
        layer.layer: np.union1d(
            np.argsort(-np.abs(layer.margin), kind="stable")[: detailed - detailed // 2], layer.top(detailed // 2)
        )
        for layer in layers
    }
    details, rows = _details(probe, layers, shown)
    return Scatter(
        "Units: suppression of the true class against promotion of the target",
        "suppression of the true class (logits)",
        "promotion of the target (logits)",
        names=tuple(f"{layer.layer}, unit {k}" for layer in layers for k in range(len(layer.margin))),
        x=tuple(float(v) for layer in layers for v in layer.suppression),
        y=tuple(float(v) for layer in layers for v in layer.promotion),
        size=tuple(float(v) for layer in layers for v in layer.sensitivity),
        size_label="relative sensitivity (σ)",
        group=tuple(i for i, layer in enumerate(layers) for _ in layer.margin),
        groups=tuple(layer.layer for layer in layers),
        details=details,
        detail_rows=rows,
    )


def _details(probe: Probe, layers: list[LayerUnits], shown: dict[str, np.ndarray]) -> tuple[Maps | None, tuple[int, ...]]:
    """Activation maps of the shown units: one row a unit, for a few images clean, adversarial and difference.

    With them the row of every unit, −1 for those without.
    """
    obs = probe.obs
    spatial = [layer.layer for layer in layers if obs.spatial(layer.layer)]
    if not spatial:
        return None, ()
    count = min(SHOWN_IMAGES, len(probe.ids))
    largest = min(SIDE, max(max(obs.layout(name).grid) for name in spatial))
    titles: list[str] = []
    cells: list[list[np.ndarray]] = [[] for _ in range(3 * count)]
    rows: list[int] = []
    for layer in layers:
        kept = {int(k): len(titles) + i for i, k in enumerate(shown[layer.layer])} if layer.layer in spatial else {}
        rows += [kept.get(k, -1) for k in range(len(layer.margin))]
        titles += [f"unit {k} · layer {layer.layer}" for k in kept]
        if not kept:
            continue
        clean, adv = (
            numpy(obs.maps(layer.layer, obs.side(side).acts[layer.layer][:count, list(kept)])) for side in ("clean", "adv")
        )
        for i in range(count):
            for j, values in enumerate((clean[i], adv[i], adv[i] - clean[i])):
                cells[3 * i + j] += list(_resized(values, largest))
    columns = tuple(
        MapColumn(f"{probe.ids[i]} ({class_name(probe, int(obs.y[i]))}), {side}", np.stack(cells[3 * i + j]), "signed")
        for i in range(count)
        for j, side in enumerate(("clean", "adversarial", "difference"))
    )
    return Maps("Activation of the unit", tuple(titles), columns, own_scale=True), tuple(rows)


def _resized(values: np.ndarray, side: int) -> np.ndarray:
    """(k, h, w) → (k, side, side): block means, or repetition; layers of all resolutions in one chart."""
    return numpy(adaptive_avg_pool2d(torch.from_numpy(values), (side, side)))


def layer_bars(layers: list[LayerUnits]) -> Bars:
    """Mean relative sensitivity, layer by layer in execution order."""
    means = tuple(float(layer.sensitivity.mean()) for layer in layers)
    return Bars("Mean relative sensitivity by layer, input to output", tuple(x.layer for x in layers), means, "σ")


def unit_bars(layer: LayerUnits, top: int) -> Bars:
    """The layer's most sensitive units beside the layer's mean."""
    units = layer.top(top)
    mean = float(layer.sensitivity.mean())
    share = f"{100 * layer.share(units):.0f} % of its sensitivity"
    return Bars(
        f"Layer {layer.layer}: top {len(units)} of {len(layer.sensitivity)} units, {share}",
        tuple(f"unit {k}" for k in units),
        tuple(layer.sensitivity[units].tolist()),
        "σ",
        reference=(mean,) * len(units),
        reference_label="mean of the layer",
    )


def margin_bars(layer: LayerUnits, top: int) -> Bars:
    """The units of a layer through which the attack gains most margin: promotion + suppression, mean per image."""
    units = np.argsort(-layer.margin, kind="stable")[:top]
    return Bars(
        f"Layer {layer.layer}: units that carry the change of the decision",
        tuple(f"unit {k}" for k in units),
        tuple(layer.margin[units].tolist()),
        "logits of margin",
    )


def unit_table(layers: list[LayerUnits]) -> Table:
    """Every unit of every layer with its part in the decision."""
    rows = [
        (
            layer.layer,
            int(k),
            round(float(layer.sensitivity[k]), 4),
            round(float(layer.promotion[k]), 4),
            round(float(layer.suppression[k]), 4),
        )
        for layer in layers
        for k in layer.top(len(layer.sensitivity))
    ]
    return Table(
        "Units of every layer",
        ("layer", "unit", "relative sensitivity (σ)", "promotion (logits)", "suppression (logits)"),
        rows,
    )
