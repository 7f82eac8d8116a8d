"""Panel: which classes are turned into which, and how?  The examples that fell, grouped by class pair (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from glassarmor.interpret.profiles.background import background_features
from glassarmor.interpret.profiles.profiles import activation_profiles
from glassarmor.interpret.signals.cam import class_activation_map
from glassarmor.interpret.signals.pse import BALANCED, PROMOTION, SUPPRESSION
from glassarmor.interpret.views.charts import Bars, Chart, MapColumn, Maps, Table
from glassarmor.interpret.views.draw.figures import maps_figure
from glassarmor.interpret.views.panels.cam import last_map
from glassarmor.interpret.views.rows import class_name, images, numpy, percent
from glassarmor.interpret.views.view import Probe, View

TITLE = "Why they fell"
CHUNK = 256  # training images a forward
HOW = (
    "A pair is the true class and what the attack made of it. Maps are means over a pair's fallen images, on one scale a "
    "row; the picture beside them is the image whose change of margin is the median of its pair."
)


@dataclass(frozen=True)
class Pair:
    """The fallen images of one class pair, by index into the probe."""

    true: int
    became: int
    members: np.ndarray  # (n,)


def fallen_pairs(probe: Probe) -> list[Pair]:
    """Rightly classified images that the attack turned, by (true class, answer under attack), the largest group first."""
    obs = probe.obs
    y, clean, adv = (numpy(v) for v in (obs.y, obs.clean.logits.argmax(1), obs.adv.logits.argmax(1)))
    fell = np.flatnonzero((clean == y) & (adv != y))
    codes = y[fell] * obs.clean.logits.shape[1] + adv[fell]
    pairs = [
        Pair(int(y[group[0]]), int(adv[group[0]]), group) for group in (fell[codes == code] for code in np.unique(codes))
    ]
    return sorted(pairs, key=lambda pair: -len(pair.members))


class FailuresPanel:
    """How the attack wins, class pair by class pair: kinds of regions, evidence moved, maps, and where the turn happens.

    Args:
        grid: rows and columns of regions; capped by the image size.
        pairs: how many of the largest pairs are drawn; the table holds all.
    """

    name = "failures"

    def __init__(self, grid: tuple[int, int] = (8, 8), pairs: int = 8) -> None:
        if not isinstance(pairs, int) or pairs < 1:
            raise ValueError(f"panels.failures.pairs: expected a whole number >= 1, found {pairs!r}")
        self.grid = (int(grid[0]), int(grid[1]))
        self.pairs = pairs

    def __call__(self, probe: Probe) -> View:
        pairs = fallen_pairs(probe)
        if not pairs:
            return View(self.name, TITLE, "No rightly classified image fell.", (), how_to_read=HOW)
        table = self.table(probe, pairs)
        maps = self.maps(probe, pairs[: self.pairs])
        total = sum(len(pair.members) for pair in pairs)
        shown = pairs[: self.pairs]
        bars = Bars(
            "Fallen images by class pair",
            tuple(pair_name(probe, pair) for pair in shown),
            tuple(len(pair.members) / total for pair in shown),
            "%",
        )
        title = headline(probe, pairs)
        charts: tuple[Chart, ...] = (bars, maps, table)
        return View(
            self.name,
            TITLE,
            title,
            charts,
            drawing=maps_figure(maps, {}, title),
            scalars={"failures/fallen": float(total), "failures/largest_pair": len(pairs[0].members) / total},
            table=table,
            how_to_read=HOW,
        )

    def table(self, probe: Probe, pairs: Sequence[Pair]) -> Table:
        effects = probe.region_effects(self.grid)
        kinds, promotion, suppression = (
            numpy(v) for v in (effects.kind, effects.promotion.sum(1), effects.suppression.sum(1))
        )
        turning, names = turns(probe)
        rows: list[tuple[str | float | int, ...]] = []
        for pair in pairs:
            mine = pair.members
            active = np.isin(kinds[mine], (SUPPRESSION, PROMOTION, BALANCED))
            count = max(int(active.sum()), 1)
            layers = turning[mine]
            known = layers[layers >= 0]
            rows.append(
                (
                    pair_name(probe, pair),
                    len(mine),
                    *(round(float((kinds[mine] == kind).sum()) / count, 4) for kind in (SUPPRESSION, PROMOTION, BALANCED)),
                    round(float(promotion[mine].mean()), 4),
                    round(float(suppression[mine].mean()), 4),
                    names[int(np.bincount(known).argmax())] if len(known) else "none",
                    round(len(known) / len(mine), 4),
                )
            )
        return Table(
            "How each pair was turned",
            (
                "true → became",
                "images",
                "regions by suppression",
                "by promotion",
                "by both",
                "Σ promotion (logits)",
                "Σ suppression (logits)",
                "turns most often at",
                "share that turns at a layer",
            ),
            rows,
            open=True,
        )

    def maps(self, probe: Probe, pairs: Sequence[Pair]) -> Maps:
        effects, obs = probe.region_effects(self.grid), probe.obs
        rows, columns = probe.grid(self.grid)
        promotion, suppression = (
            numpy(values).reshape(-1, rows, columns) for values in (effects.promotion, effects.suppression)
        )
        gain = numpy(effects.margin.sum(1))
        typical = [
            int(pair.members[np.argsort(gain[pair.members], kind="stable")[len(pair.members) // 2]]) for pair in pairs
        ]
        picks = torch.as_tensor(typical, device=obs.adv.x.device)

        def mean(values: np.ndarray) -> np.ndarray:
            return np.stack([values[pair.members].mean(0) for pair in pairs])

        shown = [
            MapColumn("Clean, typical", images(obs.clean.x[picks]), "image"),
            MapColumn("Adversarial, typical", images(obs.adv.x[picks]), "image"),
            MapColumn("Promotion of the target, mean", mean(promotion), "signed", "logits"),
            MapColumn("Suppression of the true class, mean", mean(suppression), "signed", "logits"),
        ]
        layer = last_map(probe)
        if layer is not None:
            for label in ("true", "target"):
                change = class_activation_map(obs, layer, label, "adv") - class_activation_map(obs, layer, label, "clean")
                side = "true class" if label == "true" else "target"
                shown.append(
                    MapColumn(f"Map of the {side}, mean change", mean(numpy(change)), "signed", "logits", scale_group="cam")
                )
        names = tuple(f"{pair_name(probe, pair)} · {len(pair.members)} fell" for pair in pairs)
        return Maps("Where each pair is turned", names, tuple(shown))


def turns(probe: Probe) -> tuple[np.ndarray, tuple[str, ...]]:
    """Index of the observed layer where each image turns, (N,), −1 for none or without training images; and the layers."""
    if probe.training is None:
        return np.full(len(probe.ids), -1), probe.layers
    x, y = probe.training
    background = background_features(probe.net, zip(x.split(CHUNK), y.split(CHUNK), strict=True), probe.layers)
    return numpy(activation_profiles(probe.obs, background, min(10, len(y))).turning), probe.layers


def pair_name(probe: Probe, pair: Pair) -> str:
    return f"{class_name(probe, pair.true)} → {class_name(probe, pair.became)}"


def headline(probe: Probe, pairs: Sequence[Pair]) -> str:
    total = sum(len(pair.members) for pair in pairs)
    few = len(pairs[:3])
    share = sum(len(pair.members) for pair in pairs[:few]) / total
    largest = ", ".join(f"{pair_name(probe, pair)} ({len(pair.members)})" for pair in pairs[:few])
    if len(pairs) == 1:
        return f"All {total} fallen images are of one class pair: {largest}."
    return f"{total} images fell in {len(pairs)} class pairs; the largest, {largest}, hold {percent(share)} of them."
