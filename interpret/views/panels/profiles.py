"""Panel: Activation Profiles.  Where on the way through the network does an attacked image leave its class?"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from glassarmor.interpret.network.layouts import Layout, layouts_of
from glassarmor.interpret.network.structure import Structure, layout, overview, structure
from glassarmor.interpret.observation import Observation, Side, find_layers, observe
from glassarmor.interpret.profiles.advice import Advice, advise
from glassarmor.interpret.profiles.background import Background, background_features, choose_background, pooled
from glassarmor.interpret.profiles.profiles import (
    ActivationProfiles,
    activation_profiles,
    coverage_warnings,
    strength_positions,
)
from glassarmor.interpret.signals.conductance import conductance
from glassarmor.interpret.signals.pse import PromotionSuppression
from glassarmor.interpret.signals.sensitivity import SensitivityControl, sensitivity_control
from glassarmor.interpret.views.charts import LayerNode, Lines, Profiles, Table, Trend, UnitMaps
from glassarmor.interpret.views.draw.flow import flow_figure
from glassarmor.interpret.views.rows import class_name, images, numpy, row_titles
from glassarmor.interpret.views.view import Answer, Probe, Question, View

TITLE = "Activation Profiles"
MASKING = "masking.by=hand masking.layers=[{layer}] masking.units={units}"
MORE = 128  # examples that a closer look takes
SIDES: tuple[Side, ...] = ("clean", "adv")
SIDE = 8  # cells a side that unit maps are kept at
CHUNK = 256  # background images a forward


@dataclass(frozen=True)
class Measured:
    """What one network's profiles say: the chart, the numbers that it draws, and what to try."""

    chart: Profiles
    found: ActivationProfiles
    background: Background
    advice: tuple[Advice, ...]


class ProfilesPanel:
    """Evidence lines, turning layers, the network as a graph, and the units of every layer, linked.

    Args:
        layers: of the Flow View; by default those of the Architecture View that can be recorded.
        most: boxes of the Architecture View.
        per_class: background images of each class, chosen from the probe's training images to cover it.
        neighbours: k of class perception.
        points: attack strengths.
        units: units shown a layer, those that carry most of the attack's margin.
        examples: of the probe images, drawn; turning layers and advice are over all of them.
        active: the run's regularisers, by name, with their ``weight``: advice builds on what is there.
    """

    name = "profiles"

    def __init__(
        self,
        layers: Sequence[str] = (),
        most: int = 16,
        per_class: int = 40,
        neighbours: int = 10,
        points: int = 6,
        units: int = 12,
        examples: int = 8,
        active: Mapping[str, Mapping[str, object]] | None = None,
    ) -> None:
        for key, value, least in (
            ("most", most, 1),
            ("per_class", per_class, 2),
            ("points", points, 2),
            ("units", units, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"panels.profiles.{key}: expected a whole number >= {least}, found {value!r}")
        self.examples = examples
        self.active = {name: final_weight(term.get("weight")) for name, term in (active or {}).items()}
        self.layers = tuple(layers)
        self.most = most
        self.per_class = per_class
        self.neighbours = neighbours
        self.points = points
        self.units = units

    def __call__(self, probe: Probe) -> View:
        if probe.training is None:
            return View(self.name, TITLE, "No background: the dashboard was given no training images to compare with.", ())
        measured = self.measure(probe)
        found, advice = measured.found, measured.advice
        title = headline(found, measured.background)
        lines = median_lines(found)
        drawing = flow_figure(title, ("clean and attacked",), (found,))
        keys = tuple(f"profiles/turning/{layer}" for layer in found.layers)
        return View(
            name=self.name,
            title=TITLE,
            headline=title,
            charts=(
                advice_table(advice),
                measured.chart,
                lines,
                Trend("Where examples turn", keys, found.layers, "%", "share"),
            ),
            drawing=drawing,
            scalars=summarise(found),
            how_to_read="Each line is one image on its way through the layers, on the axis from the centre of its true "
            "class (0) to that of what the attack promotes (1), measured on background images from the training set. Where "
            "the attacked line stays above ½ while the clean one is below, the image has turned.",
            answers=answers(found, advice),
        )

    def measure(self, probe: Probe) -> Measured:
        """Profiles, maps and advice of the probe's network.

        Raises:
            ValueError: a layer that it does not have, or a probe without training images.
        """
        if probe.training is None:
            raise ValueError("training: profiles need training images as their background, found none")
        net, x, x_adv = probe.net, probe.obs.clean.x, probe.obs.adv.x
        drawing = overview(structure(net, x[:2]), self.most)
        layers = self.layers or default_layers(drawing, layouts_of(net, x), x.shape[1])
        find_layers(net, layers, key="panels.profiles.layers")
        with torch.no_grad():
            obs = observe(net, x, x_adv, probe.obs.y, target=probe.obs.target, layers=layers)
        background = self.background(net, probe.training, layers)
        found = activation_profiles(obs, background, min(self.neighbours, len(background.labels)))
        path = strength_positions(net, x, x_adv, obs.y, obs.target, background, points=self.points)
        warnings = coverage_warnings(found, probe.class_names)
        controls = sensitivity_control(net, x, x_adv, obs.y, layers, draws=2)
        effects = conductance(net, x, x_adv, obs.y, obs.target, layers=layers, steps=5).units
        chart = self.chart(probe, obs, found, path, drawing, controls, effects, warnings)
        advice = self.advice(probe, found.layers, found.turning, controls, effects)
        return Measured(chart, found, background, advice)

    def advice(
        self,
        probe: Probe,
        layers: Sequence[str],
        turning: Tensor,
        controls: Mapping[str, SensitivityControl],
        effects: Mapping[str, PromotionSuppression],
    ) -> tuple[Advice, ...]:
        """What :func:`.advise` says, with whole commands: this run's own, or an analysis of it."""
        look = f"python evaluate.py {shlex.quote(f'checkpoint={probe.run}')} "
        masking = look.replace("{", "{{").replace("}", "}}") + MASKING
        more = f"{look}images={MORE}" if len(probe.ids) < MORE else ""
        said = advise(layers, turning, controls, effects, self.active, masking, more)
        return tuple(replace(a, config=f"{probe.command} {a.config}") if trains(a) else a for a in said)

    def background(self, net: nn.Module, training: tuple[Tensor, Tensor], layers: Sequence[str]) -> Background:
        """φ of the training images that cover each class at the last layer."""
        x, y = training
        every = background_features(net, zip(x.split(CHUNK), y.split(CHUNK), strict=True), layers)
        picks = choose_background(every.features[layers[-1]], y, self.per_class).indices
        return Background(
            {layer: phi[picks] for layer, phi in every.features.items()},
            y[picks],
            tuple(every.ids[i] for i in picks.tolist()),
        )

    def chart(
        self,
        probe: Probe,
        obs: Observation,
        found: ActivationProfiles,
        path: Tensor,
        drawing: Structure,
        controls: Mapping[str, SensitivityControl],
        effects: Mapping[str, PromotionSuppression],
        warnings: tuple[str, ...],
    ) -> Profiles:
        layers, n = found.layers, min(self.examples, len(probe.ids))
        units = {layer: self.unit_maps(probe, obs, layer, controls[layer], effects[layer], n) for layer in effects}
        places = layout(drawing)
        return Profiles(
            "Activation Profiles",
            nodes=tuple(
                LayerNode(
                    node.name,
                    node.type if node.kind == "block" else node.kind,
                    "×".join(map(str, node.shape)),
                    node.parameters,
                    column,
                    lane,
                    layers.index(node.layer) if node.layer in layers else -1,
                )
                for node, (column, lane) in zip(drawing.nodes, places, strict=True)
            ),
            edges=drawing.edges,
            layers=layers,
            colours=colours(found, controls, effects),
            examples=row_titles(probe, n),
            images=np.stack([images(obs.clean.x[:n]), images(obs.adv.x[:n])]),
            classes=tuple(
                (class_name(probe, int(y)), class_name(probe, int(t)))
                for y, t in zip(obs.y[:n], obs.target[:n], strict=True)
            ),
            strength=tuple(np.linspace(0, 1, len(path)).tolist()),
            position=numpy(path)[:, :, :n],
            turning=tuple(found.turning[:n].tolist()),
            perception=np.stack([numpy(found.clean_perception), numpy(found.adv_perception)])[:, :, :n],
            pair=tuple(found.pair[:n].tolist()),
            bands=numpy(found.bands),
            units=tuple(units.get(layer) for layer in layers),
            warnings=warnings,
        )

    def unit_maps(
        self,
        probe: Probe,
        obs: Observation,
        layer: str,
        control: SensitivityControl,
        effect: PromotionSuppression,
        n: int,
    ) -> UnitMaps:
        """The units of a layer that carry most of the margin, or move most, on the first ``n`` images."""
        promotion, suppression = numpy(effect.promotion.mean(0)), numpy(effect.suppression.mean(0))
        margin, beyond = promotion + suppression, numpy(control.attack - control.noise)
        chosen = _both(np.abs(margin), beyond, self.units)
        columns: dict[str, tuple[float | str, ...]] = {
            "margin (logits)": tuple(margin[chosen].tolist()),
            "promotion (logits)": tuple(promotion[chosen].tolist()),
            "suppression (logits)": tuple(suppression[chosen].tolist()),
            "sensitivity (σ)": tuple(numpy(control.attack)[chosen].tolist()),
            "above noise (σ)": tuple(beyond[chosen].tolist()),
        }
        if layer in probe.concepts:
            columns["concept"] = tuple(probe.concepts[layer][k] for k in chosen)
        return UnitMaps(
            units=tuple(int(k) for k in chosen),
            of=len(promotion),
            values=np.stack([_small(obs, layer, side, n, chosen.tolist()) for side in SIDES], 1),
            columns=columns,
            filters=filters(probe.net, layer, chosen),
        )


def colours(
    found: ActivationProfiles,
    controls: Mapping[str, SensitivityControl],
    effects: Mapping[str, PromotionSuppression],
) -> dict[str, tuple[float, ...]]:
    """By which a box of the Architecture View can be coloured: a number a layer, NaN where there is none."""

    def by_layer(values: Mapping[str, float]) -> tuple[float, ...]:
        return tuple(values.get(layer, float("nan")) for layer in found.layers)

    strongest = {layer: strongest_tenth(effect) for layer, effect in effects.items()}
    return {
        "divergence ‖ΔA‖ / ‖A‖": tuple(numpy(found.divergence.mean(1)).tolist()),
        "share of examples that turn here": tuple(numpy(found.turning_shares[:-1]).tolist()),
        "sensitivity (σ)": by_layer({k: float(c.attack.mean()) for k, c in controls.items()}),
        "sensitivity above noise (σ)": by_layer(
            {layer: float((c.attack - c.noise).mean()) for layer, c in controls.items()}
        ),
        "promotion by the strongest tenth of units (logits)": by_layer({k: v[1] for k, v in strongest.items()}),
        "suppression by the strongest tenth of units (logits)": by_layer({k: v[2] for k, v in strongest.items()}),
        "share of the margin that a tenth of units carries": by_layer({k: v[0] for k, v in strongest.items()}),
    }


def strongest_tenth(effect: PromotionSuppression) -> tuple[float, float, float]:
    """What a tenth of a layer's units carries: its share of the margin gained, promotion, suppression."""
    promotion, suppression = numpy(effect.promotion.mean(0)), numpy(effect.suppression.mean(0))
    gained = (promotion + suppression).clip(min=0)
    tenth = max(1, len(gained) // 10)
    return (
        float(np.sort(gained)[-tenth:].sum() / max(gained.sum(), 1e-12)),
        float(np.sort(promotion)[-tenth:].sum()),
        float(np.sort(suppression)[-tenth:].sum()),
    )


def default_layers(drawing: Structure, layouts: Mapping[str, Layout], channels: int) -> tuple[str, ...]:
    """The boxes that can be recorded, without those that only rescale the image's own channels; a cell counts once."""
    return tuple(
        dict.fromkeys(
            node.layer
            for node in drawing.nodes
            if node.layer in layouts
            and (node.observable or layouts[node.layer].recurrent)
            and not (len(node.shape) == 3 and node.shape[0] == channels)
        )
    )


def trains(advice: Advice) -> bool:
    """Words for another training run, without the command that they belong to."""
    return advice.config.startswith("regularizers")


def final_weight(weight: object) -> float:
    """A weight from a config: a number, or a ramp's end; 1 where none is said."""
    if isinstance(weight, Mapping):
        weight = weight.get("end")
    return float(weight) if isinstance(weight, int | float) else 1.0


def _both(gain: np.ndarray, movement: np.ndarray, count: int) -> np.ndarray:
    """Two thirds of ``count`` units by the first, the rest by the second, most first; none twice."""
    first = np.argsort(-gain, kind="stable")[: count - count // 3]
    rest = [unit for unit in np.argsort(-movement, kind="stable") if unit not in set(first.tolist())]
    return np.array([*first, *rest[: count - len(first)]], int)


def _small(obs: Observation, layer: str, side: Side, count: int, units: list[int]) -> np.ndarray:
    """Maps of units of the first images, (N, U, h, w), no side above ``SIDE``: block means; (1, 1) where there is no map."""
    act = obs.side(side).acts[layer][:count, units].detach().float()
    act = obs.maps(layer, act) if obs.spatial(layer) else pooled(act)[:, :, None, None]
    return numpy(nn.functional.adaptive_avg_pool2d(act, (min(SIDE, act.shape[2]), min(SIDE, act.shape[3]))))


def filters(net: nn.Module, layer: str, units: np.ndarray) -> np.ndarray | None:
    """Weights of the units as pictures (U, h, w, 3) in [0,1], ½ is zero, one scale; where the layer's only convolution
    looks at an image of one or three channels, else None.
    """
    module = net.get_submodule(layer)
    found = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    if len(found) != 1 or found[0].in_channels not in (1, 3) or found[0].out_channels <= int(units.max()):
        return None
    weights = numpy(found[0].weight)[units].transpose(0, 2, 3, 1)
    weights = 0.5 + 0.5 * weights / max(float(np.abs(weights).max()), 1e-12)
    return np.repeat(weights, 3, -1) if weights.shape[-1] == 1 else weights


def summarise(found: ActivationProfiles) -> dict[str, float]:
    """Share of examples that turn, by layer and in all; the least coverage; mean divergence by layer."""
    shares = found.turning_shares
    return {
        "profiles/turned": float(1 - shares[-1]),
        "profiles/coverage": float(found.coverage.min()),
        **{f"profiles/turning/{layer}": float(share) for layer, share in zip(found.layers, shares, strict=False)},
        **{
            f"profiles/divergence/{layer}": float(v) for layer, v in zip(found.layers, found.divergence.mean(1), strict=True)
        },
    }


def headline(found: ActivationProfiles, background: Background) -> str:
    turned = found.turning[found.turning >= 0]
    covered = 100 * float(found.coverage.min())
    over = f"seen before a background of {len(background.labels)} training images, which covers {covered:.0f} %"
    if not len(turned):
        return f"No attacked image crosses over to the target's side ({over} of the images)."
    counts = torch.bincount(turned, minlength=len(found.layers))
    most = int(counts.argmax())
    return (
        f"{len(turned)} of {len(found.turning)} attacked images end on the target's side of the background; they cross over "
        f"most often at layer {found.layers[most]} ({int(counts[most])}), {over} of the images."
    )


def advice_table(advice: Sequence[Advice]) -> Table:
    """What to try, each sentence with the numbers it was computed from and the words that do it."""
    return Table(
        "Advice: what the numbers say, and what to try",
        ("what the numbers say", "numbers", "command"),
        [(a.sentence, ", ".join(f"{name} {value:.3g}" for name, value in a.numbers.items()), a.config) for a in advice],
        open=True,
        command="command",
    )


def answers(found: ActivationProfiles, advice: Sequence[Advice]) -> tuple[Answer, ...]:
    """Where the attack wins, which units carry it, and what to try, as far as the advice says."""

    def question(place: int, said: Advice) -> Question:
        return "where" if place == 0 else "next" if said.config else "units"

    said = [Answer(question(i, a), a.sentence, a.config if i else "") for i, a in enumerate(advice)]
    if advice[0].config:
        said.insert(0, Answer("next", "Look at more images before changing anything.", advice[0].config))
    elif not any(answer.question == "next" for answer in said):
        turned = f"{int((found.turning >= 0).sum())} of {len(found.turning)} images turn"
        unmeasured = advice[0].layer != "" and len(advice) == 1
        why = (
            "the units of that layer were not measured, so nothing is proposed"
            if unmeasured
            else "that asks for no change here"
        )
        said.append(Answer("next", f"{turned}; {why}."))
    return tuple(said)


def median_lines(found: ActivationProfiles, title: str = "Evidence: 0 true class, 1 target; median, middle half") -> Lines:
    """Median evidence position of the examples, layer by layer, with its quartiles."""
    levels = torch.tensor([0.25, 0.5, 0.75], device=found.clean.device)
    sides = [numpy(lines.nanquantile(levels, dim=1)).tolist() for lines in (found.clean, found.adv)]
    return Lines(
        title,
        tuple(float(i) for i in range(len(found.layers))),
        "layer, input to output",
        ("clean", "attacked"),
        tuple(tuple(side[1]) for side in sides),
        x_names=found.layers,
        spread=tuple((tuple(side[0]), tuple(side[2])) for side in sides),
    )
