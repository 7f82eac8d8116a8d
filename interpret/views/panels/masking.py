"""View: the same attack on a network before and after units of it were masked, and with as many masked at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from glassarmor.interpret.views.charts import Bars, MapColumn, Maps, Table
from glassarmor.interpret.views.draw.figures import charts_figure
from glassarmor.interpret.views.panels import outcome, pse
from glassarmor.interpret.views.rows import image_columns, numpy, row_titles
from glassarmor.interpret.views.view import Probe, View

ROWS = {  # what is compared: scalar, unit
    "outcome/clean_acc": "accuracy, clean",
    "outcome/robust_acc": "accuracy under attack",
    "outcome/success": "success of the attack",
    "pse/promotion": "promotion of the target (logits)",
    "pse/suppression": "suppression of the true class (logits)",
    "pse/share_suppression": "regions dominated by suppression",
    "pse/share_promotion": "regions dominated by promotion",
    "pse/share_balanced": "balanced regions",
}
NAMES = ("as it was", "masked", "masked at random")


def masking_view(
    probes: Sequence[Probe],
    masked_units: Mapping[str, Sequence[int]],
    by: str,
    grid: tuple[int, int] = (8, 8),
    images: int = 4,
) -> View:
    """Before and after, each attacked anew through its own mask.

    Args:
        probes: the same images in the network as it was, masked, and masked at random.
        masked_units: by layer, the units that were masked.
        by: the criterion.
    """
    measured = [outcome.summarise(probe) | pse.summarise(probe.region_effects(grid)) for probe in probes]
    keys = ("outcome/clean_acc", "outcome/robust_acc")
    bars = tuple(Bars(f"{ROWS[key].capitalize()}", NAMES, tuple(m[key] for m in measured), "%") for key in keys)
    table = Table(
        "Before and after",
        ("quantity", *NAMES),
        [(label, *(round(m[key], 4) for m in measured)) for key, label in ROWS.items()],
    )
    rows, columns = probes[0].grid(grid)
    count = min(images, len(probes[0].ids))

    def gained(probe: Probe) -> np.ndarray:
        return numpy(probe.region_effects(grid).margin)[:count].reshape(count, rows, columns)

    maps = Maps(
        "Margin that the attack gains, region by region",
        row_titles(probes[0], count),
        (
            *image_columns(probes[0], count),
            *(
                MapColumn(
                    name, numpy(probe.region_effects(grid).margin)[:count].reshape(count, rows, columns), "signed", "logits"
                )
                for name, probe in zip(NAMES, probes, strict=True)
            ),
        ),
    )
    title = headline(measured, masked_units, by)
    drawing = charts_figure(bars, title, columns=2)
    return View(
        name="masking",
        title="The network with masked units",
        headline=title,
        charts=(*bars, table, maps, units_table(masked_units)),
        drawing=drawing,
        scalars={f"masking/{key}/{name}": m[key] for name, m in zip(NAMES, measured, strict=True) for key in keys},
        how_to_read="The units were chosen on validation images and answer a constant; each network is attacked anew, "
        "through its mask. Only a gain beyond the random mask belongs to the choice of units.",
    )


def headline(measured: Sequence[Mapping[str, float]], masked_units: Mapping[str, Sequence[int]], by: str) -> str:
    before, after, control = ([100 * m[f"outcome/{key}_acc"] for key in ("clean", "robust")] for m in measured)
    count = sum(len(units) for units in masked_units.values())
    verdict = "helps" if after[1] > max(before[1], control[1]) + 1 else "does not help"
    if after[1] < min(before[1], control[1]) - 1:
        verdict = "hurts"
    return (
        f"Masking {count} units by {by.replace('_', '-')} {verdict}: accuracy under attack {before[1]:.1f} → "
        f"{after[1]:.1f} % ({control[1]:.1f} % with a random mask), "
        f"clean {before[0]:.1f} → {after[0]:.1f} % ({control[0]:.1f} %)."
    )


def units_table(masked_units: Mapping[str, Sequence[int]]) -> Table:
    return Table(
        "Masked units",
        ("layer", "units"),
        [(layer, ", ".join(str(unit) for unit in units)) for layer, units in masked_units.items()],
    )
