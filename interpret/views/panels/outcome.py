"""Panel: what did the attack achieve, and at what price?"""

from __future__ import annotations

import math

import numpy as np

from glassarmor.interpret.views.charts import Bars, Table
from glassarmor.interpret.views.draw.figures import charts_figure
from glassarmor.interpret.views.rows import class_name, numpy, percent
from glassarmor.interpret.views.view import Answer, Probe, View


class OutcomePanel:
    """Accuracy clean and under attack, success rate, size of the perturbation; class by class."""

    name = "outcome"

    def __call__(self, probe: Probe) -> View:
        scalars, classes = summarise(probe), class_table(probe)
        robust = Bars(
            "Accuracy under attack by class",
            tuple(str(row[0]) for row in classes.rows),
            tuple(float(row[3]) for row in classes.rows),
            "%",
            reference=tuple(float(row[2]) for row in classes.rows),
            reference_label="clean",
        )
        title = headline(scalars)
        drawing = charts_figure([robust], title)
        return View(
            name=self.name,
            title="What the attack achieved",
            headline=title,
            charts=(robust, size_table(scalars), classes),
            drawing=drawing,
            scalars=scalars,
            answers=(Answer("healthy", title),),
            table=classes,
            how_to_read="Success is the share of rightly classified images that the attack turns. Sizes are medians over "
            "the turned images; a pixel counts as changed if any of its channels moved.",
        )


def summarise(probe: Probe) -> dict[str, float]:
    """Accuracies and success in [0,1]; medians of the norms of x' − x over the turned images (NaN if there are none)."""
    obs = probe.obs
    right = obs.clean.logits.argmax(1) == obs.y
    still = obs.adv.logits.argmax(1) == obs.y
    turned = right & ~still
    delta = (obs.adv.x - obs.clean.x).flatten(2)
    norms = {
        "linf": delta.abs().amax((1, 2)),
        "l2": delta.flatten(1).norm(dim=1),
        "l1": delta.abs().sum((1, 2)),
        "pixels": (delta != 0).any(1).float().mean(1),
    }
    return {
        "outcome/clean_acc": float(right.float().mean()),
        "outcome/robust_acc": float(still.float().mean()),
        "outcome/success": float(turned.sum() / right.sum().clamp_min(1)),
        **{f"outcome/{name}": float(size[turned].median()) if turned.any() else math.nan for name, size in norms.items()},
    }


def headline(scalars: dict[str, float]) -> str:
    text = (
        f"Accuracy falls from {percent(scalars['outcome/clean_acc'])} to {percent(scalars['outcome/robust_acc'])}: "
        f"the attack turns {percent(scalars['outcome/success'])} of the rightly classified images"
    )
    if scalars["outcome/success"] == 0:
        return text + "."
    return text + (
        f", changing {100 * scalars['outcome/pixels']:.0f} % of the pixels of a turned image by at most "
        f"{scalars['outcome/linf']:.3f} (medians)."
    )


def size_table(scalars: dict[str, float]) -> Table:
    rows = [
        ("largest change of a pixel, L∞", scalars["outcome/linf"]),
        ("Euclidean length, L2", scalars["outcome/l2"]),
        ("sum of changes, L1", scalars["outcome/l1"]),
        ("share of pixels changed", scalars["outcome/pixels"]),
    ]
    return Table("Size of the perturbation, median over the turned images", ("norm", "value"), rows)


def class_table(probe: Probe) -> Table:
    """By true class: images, accuracy clean and under attack, and what the turned images become most often."""
    obs = probe.obs
    y, clean, adv = (numpy(v) for v in (obs.y, obs.clean.logits.argmax(1), obs.adv.logits.argmax(1)))
    rows: list[tuple[str | float | int, ...]] = []
    for label in np.unique(y):
        mine = y == label
        turned = adv[mine & (clean == label) & (adv != label)]
        most = class_name(probe, int(np.bincount(turned).argmax())) if len(turned) else "–"
        rows.append(
            (
                class_name(probe, int(label)),
                int(mine.sum()),
                round(float((clean[mine] == label).mean()), 4),
                round(float((adv[mine] == label).mean()), 4),
                most,
            )
        )
    return Table("By class", ("class", "images", "accuracy clean", "accuracy under attack", "turned most often into"), rows)
