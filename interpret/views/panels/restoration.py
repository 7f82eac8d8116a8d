"""Panel: is the map of promotion and suppression faithful?  Undo the attack where it acts most, and see."""

from __future__ import annotations

import numpy as np

from glassarmor.interpret.signals.restoration import RestorationCurve, restoration_curve
from glassarmor.interpret.views.charts import Bars, Lines, Trend
from glassarmor.interpret.views.draw.figures import charts_figure
from glassarmor.interpret.views.rows import numpy
from glassarmor.interpret.views.view import Probe, View

TITLE = "Restoration"
FEWEST = 10  # turned images, below which nothing is concluded
HOW = (
    "Regions are set back to clean one after the other until the true label returns. If the map tells the truth, its order "
    "brings labels back sooner than the order of the perturbation's size and than chance."
)
ORDERS = {"effect": "largest effect first", "norm": "largest perturbation first", "chance": "random order"}


class RestorationPanel:
    """Restoration curves of the probe images that the attack turned, with both controls.

    Args:
        grid: rows and columns of regions; capped by the image size.
        draws: random orders.
    """

    name = "restoration"

    def __init__(self, grid: tuple[int, int] = (8, 8), draws: int = 5) -> None:
        self.grid = (int(grid[0]), int(grid[1]))
        self.draws = draws

    def __call__(self, probe: Probe) -> View:
        obs = probe.obs
        effects, grid = probe.region_effects(self.grid), probe.grid(self.grid)
        curve = restoration_curve(probe.net, obs.clean.x, obs.adv.x, obs.y, effects, grid, draws=self.draws)
        title = headline(curve)
        if not curve.samples:
            return View(self.name, TITLE, title, (), how_to_read=HOW)
        lines, areas = draw(curve), area_bars(curve)
        drawing = charts_figure([lines, areas], title, columns=2)
        return View(
            name=self.name,
            title=TITLE,
            headline=title,
            charts=(
                lines,
                Trend(
                    "Area under the restoration curve",
                    tuple(f"restoration/{order}" for order in ORDERS),
                    tuple(ORDERS.values()),
                    limits=(0.0, 1.0),
                ),
            ),
            drawing=drawing,
            scalars={f"restoration/{order}": curve.areas[order] for order in ORDERS},
            how_to_read=HOW,
        )


def headline(curve: RestorationCurve) -> str:
    if not curve.samples:
        return "The attack turned no correctly classified image, so there is nothing to restore."
    areas, regions = curve.areas, len(curve.share) - 1
    needed = float(np.median(numpy(curve.needed[curve.needed >= 0])))
    beats = areas["effect"] > max(areas["norm"], areas["chance"])
    verdict = "the map tells where the attack acts" if beats else "the map is no better than its controls here"
    if curve.samples < FEWEST:
        verdict = "too few images to judge the map by"
    return (
        f"Setting back {needed:.0f} of {regions} regions in order of effect brings the true label back (median of "
        f"{count(curve)}); area {areas['effect']:.2f} against {areas['norm']:.2f} by size and "
        f"{areas['chance']:.2f} ± {areas['chance_std']:.2f} by chance: {verdict}."
    )


def count(curve: RestorationCurve) -> str:
    return f"{curve.samples} turned image" + ("s" if curve.samples != 1 else "")


def draw(curve: RestorationCurve) -> Lines:
    return Lines(
        f"Labels brought back, {count(curve)}",
        tuple(curve.share.tolist()),
        "regions set back to clean",
        tuple(ORDERS.values()),
        (tuple(curve.by_effect.tolist()), tuple(curve.by_norm.tolist()), tuple(curve.by_chance.mean(0).tolist())),
        "%",
        "%",
        (0.0, 1.0),
    )


def area_bars(curve: RestorationCurve) -> Bars:
    areas = curve.areas
    return Bars(
        "Area under the curve, 1 is best",
        (ORDERS["effect"], ORDERS["norm"]),
        (areas["effect"], areas["norm"]),
        "",
        reference=(areas["chance"],) * 2,
        reference_label="random order",
    )
