"""Panel: which units does the attack move, and which of them carry the change of the decision?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from interpret.pse import unit_effects
from interpret.sensitivity import relative_unit_sensitivity, unit_spread
from interpret.views.figures import bars_figure, to_array
from interpret.views.rows import numpy
from interpret.views.view import Bars, Probe, Table, View

SILENT = 0.01  # a unit whose clean spread is below this part of its layer's mean: a ratio to nothing says nothing


@dataclass(frozen=True)
class LayerUnits:
    """One layer's units, each (C,).  ``promotion``, ``suppression``: mean over the probe images, logits."""

    layer: str
    sensitivity: np.ndarray  # mean |ΔA| in standard deviations of the unit over clean data; 0 for silent units
    promotion: np.ndarray
    suppression: np.ndarray

    def top(self, count: int) -> np.ndarray:
        """The most sensitive units, most first."""
        return np.argsort(-self.sensitivity, kind="stable")[:count]

    def share(self, units: np.ndarray) -> float:
        """Share of the layer's sensitivity that these units carry."""
        return float(self.sensitivity[units].sum() / max(self.sensitivity.sum(), 1e-12))


class UnitsPanel:
    """Relative sensitivity of every unit of every observed layer; promotion and suppression by unit.

    Args:
        top: units shown a layer.
        max_layers: layers drawn as bars, spread evenly over the observed ones, first and last included.
    """

    name = "units"

    def __init__(self, top: int = 8, max_layers: int = 6) -> None:
        self.top = top
        self.max_layers = max_layers

    def __call__(self, probe: Probe) -> View:
        layers = measure(probe)
        if not layers:
            return View(self.name, "Attack-sensitive units", "No layer is observed; name some to see their units.", ())
        title = headline(layers, self.top)
        by_layer = layer_bars(layers)
        by_unit = [unit_bars(layer, self.top) for layer in pick_spread(layers, self.max_layers)]
        decision = margin_bars(layers[-1], self.top)
        return View(
            name=self.name,
            title="Attack-sensitive units",
            headline=title,
            charts=(by_layer, decision, *by_unit, unit_table(layers, self.top)),
            figure=to_array(bars_figure([by_layer, *by_unit, decision], title)),
            scalars={f"units/sensitivity/{layer.layer}": float(layer.sensitivity.mean()) for layer in layers},
            table=unit_table(layers, self.top),
            how_to_read="1 σ means that the attack moves the unit as far as clean images vary it. The mark on each bar is "
            "the mean of the layer; units that stay silent on clean images are left out. A unit can move far without "
            "mattering: the margin bars show which ones carry the change of the decision.",
        )


def measure(probe: Probe) -> list[LayerUnits]:
    """All units of the observed layers, in execution order."""
    found = []
    for layer in probe.layers:
        effects = unit_effects(probe.obs, layer)
        spread = numpy(unit_spread(probe.obs, layer))
        sensitivity = numpy(relative_unit_sensitivity(probe.obs, layer))
        found.append(
            LayerUnits(
                layer,
                np.where(spread < SILENT * spread.mean(), 0.0, sensitivity),
                numpy(effects.promotion.mean(0)),
                numpy(effects.suppression.mean(0)),
            )
        )
    return found


def pick_spread(layers: list[LayerUnits], count: int) -> list[LayerUnits]:
    """At most ``count`` of the layers, evenly over the depth."""
    picks = np.unique(np.linspace(0, len(layers) - 1, min(count, len(layers))).round().astype(int))
    return [layers[i] for i in picks]


def headline(layers: list[LayerUnits], top: int) -> str:
    moved = max(layers, key=lambda layer: float(layer.sensitivity.mean()))
    units = moved.top(top)
    peak = int(units[0])
    return (
        f"The attack moves layer {moved.layer} most, by {moved.sensitivity.mean():.2f} σ on average; its unit {peak} moves "
        f"{moved.sensitivity[peak]:.2f} σ, and its top {len(units)} of {len(moved.sensitivity)} units carry "
        f"{100 * moved.share(units):.0f} % of the layer's sensitivity."
    )


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
    margin = layer.promotion + layer.suppression
    units = np.argsort(-margin, kind="stable")[:top]
    return Bars(
        f"Layer {layer.layer}: units that carry the change of the decision",
        tuple(f"unit {k}" for k in units),
        tuple(margin[units].tolist()),
        "logits of margin",
    )


def unit_table(layers: list[LayerUnits], top: int) -> Table:
    """The most sensitive units of every layer with their part in the decision."""
    rows = [
        (
            layer.layer,
            int(k),
            round(float(layer.sensitivity[k]), 4),
            round(float(layer.promotion[k]), 4),
            round(float(layer.suppression[k]), 4),
        )
        for layer in layers
        for k in layer.top(top)
    ]
    return Table(
        "Most sensitive units of every layer",
        ("layer", "unit", "relative sensitivity (σ)", "promotion (logits)", "suppression (logits)"),
        rows,
    )
