"""Panel: does the attack move units more than noise of the same size does, and how does that grow with its strength?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from glassarmor.interpret.signals.sensitivity import SensitivityControl, StrengthCurves, strength_curves, unit_spread
from glassarmor.interpret.views.charts import Bars, Lines, Scatter, Trend
from glassarmor.interpret.views.draw.figures import charts_figure
from glassarmor.interpret.views.rows import numpy
from glassarmor.interpret.views.view import Probe, View


class SensitivityPanel:
    """Relative sensitivity beside its equal-norm noise control; units and logits against attack strength.

    Args:
        draws: noises to average over.
        points: attack strengths from 0 to the whole perturbation.
        top: units drawn against strength.
    """

    name = "sensitivity"

    def __init__(self, draws: int = 3, points: int = 11, top: int = 4) -> None:
        self.draws = draws
        self.points = points
        self.top = top

    def __call__(self, probe: Probe) -> View:
        obs = probe.obs
        if not probe.layers:
            return View(self.name, "Sensitivity against noise", "No layer is observed; name some to see their units.", ())
        controls = probe.sensitivity(self.draws)
        curves = strength_curves(probe.net, obs.clean.x, obs.adv.x, probe.layers, points=self.points)
        title = headline(controls)
        scatter, by_layer = control_scatter(controls), layer_bars(controls)
        logits, layers, units = logit_lines(probe, curves), layer_lines(probe, curves), unit_lines(probe, curves, self.top)
        scalars = summarise(controls)
        drawing = charts_figure([scatter, by_layer, logits], title)
        return View(
            name=self.name,
            title="Sensitivity against noise",
            headline=title,
            charts=(
                scatter,
                by_layer,
                logits,
                layers,
                units,
                Trend(
                    "Units that the attack moves more than noise does",
                    tuple(_key(x) for x in controls),
                    tuple(controls),
                    "%",
                ),
            ),
            drawing=drawing,
            scalars=scalars,
            how_to_read="The control is random noise of the attack's own L2 norm, image by image. A unit above the dashed "
            "line is attack-sensitive; one on it merely varies a lot. Strength 1 is the whole perturbation.",
        )


def _key(layer: str) -> str:
    return f"sensitivity/attack_sensitive/{layer}"


def summarise(controls: Mapping[str, SensitivityControl]) -> dict[str, float]:
    """By layer: share of units above their control, mean sensitivity to the attack and to noise."""
    found = {_key(layer): float(c.attack_sensitive.float().mean()) for layer, c in controls.items()}
    for layer, control in controls.items():
        found[f"sensitivity/attack/{layer}"] = float(control.attack.mean())
        found[f"sensitivity/noise/{layer}"] = float(control.noise.mean())
    return found


def headline(controls: Mapping[str, SensitivityControl]) -> str:
    ratios = {layer: float(c.attack.mean() / c.noise.mean().clamp_min(1e-12)) for layer, c in controls.items()}
    strongest = max(ratios, key=lambda layer: ratios[layer])
    above = sum(int(c.attack_sensitive.sum()) for c in controls.values())
    units = sum(len(c.attack) for c in controls.values())
    return (
        f"{above} of {units} units are moved more by the attack than by noise of equal norm; layer {strongest} stands out "
        f"most: {ratios[strongest]:.1f} times its noise control."
    )


def control_scatter(controls: Mapping[str, SensitivityControl]) -> Scatter:
    return Scatter(
        "Units: attack against noise of equal norm",
        "moved by noise (σ)",
        "moved by the attack (σ)",
        names=tuple(f"{layer}, unit {k}" for layer, c in controls.items() for k in range(len(c.attack))),
        x=tuple(float(v) for c in controls.values() for v in c.noise),
        y=tuple(float(v) for c in controls.values() for v in c.attack),
        size=tuple(1.0 for c in controls.values() for _ in c.attack),
        size_label="",
        group=tuple(i for i, c in enumerate(controls.values()) for _ in c.attack),
        groups=tuple(controls),
        diagonal="moved alike by both",
    )


def layer_bars(controls: Mapping[str, SensitivityControl]) -> Bars:
    return Bars(
        "Mean sensitivity by layer, input to output",
        tuple(controls),
        tuple(float(c.attack.mean()) for c in controls.values()),
        "σ",
        reference=tuple(float(c.noise.mean()) for c in controls.values()),
        reference_label="noise of equal norm",
    )


def logit_lines(probe: Probe, curves: StrengthCurves) -> Lines:
    """Mean logit of the true class and of the target along the perturbation."""
    y, target = probe.obs.y[None, :, None], probe.obs.target[None, :, None]
    labels = {"true class": y, "target": target}
    return Lines(
        "Logits against attack strength, mean over the images",
        tuple(curves.strength.tolist()),
        "attack strength",
        tuple(labels),
        tuple(
            tuple(curves.logits.gather(2, label.expand(len(curves.strength), -1, 1)).mean((1, 2)).tolist())
            for label in labels.values()
        ),
        "logits",
    )


def layer_lines(probe: Probe, curves: StrengthCurves) -> Lines:
    """Mean movement of a layer's units along the perturbation, in clean standard deviations of each unit's mean."""
    return Lines(
        "Mean activation of the units against attack strength, by layer",
        tuple(curves.strength.tolist()),
        "attack strength",
        tuple(curves.units),
        tuple(tuple(float(v) for v in np.abs(moved).mean((1, 2))) for moved in _moved(probe, curves).values()),
        "σ",
    )


def unit_lines(probe: Probe, curves: StrengthCurves, top: int) -> Lines:
    """The units of the last layer that end up furthest from where they began, signed."""
    layer, moved = list(_moved(probe, curves).items())[-1]
    mean = moved.mean(1)  # (S, C)
    units = np.argsort(-np.abs(mean[-1]), kind="stable")[:top]
    return Lines(
        f"Layer {layer}: units that move furthest, signed",
        tuple(curves.strength.tolist()),
        "attack strength",
        tuple(f"unit {k}" for k in units),
        tuple(tuple(float(v) for v in mean[:, k]) for k in units),
        "σ",
    )


def _moved(probe: Probe, curves: StrengthCurves) -> dict[str, np.ndarray]:
    """Change of every unit's mean activation since strength 0, in clean standard deviations, (S, N, C) by layer."""
    found = {}
    for layer, units in curves.units.items():
        spread = unit_spread(probe.obs, layer).detach()
        found[layer] = numpy((units - units[:1]) / spread.clamp_min(0.01 * spread.mean()))
    return found
