"""Panel: how does the attack win?  Promotion of the target, suppression of the true class, region by region."""

from __future__ import annotations

from typing import Final

import numpy as np

from glassarmor.interpret.signals.pse import BALANCED, INACTIVE, KIND_NAMES, PROMOTION, SUPPRESSION, PromotionSuppression
from glassarmor.interpret.signals.running import KindShares
from glassarmor.interpret.views.charts import MapColumn, Maps, Table, Trend
from glassarmor.interpret.views.draw.figures import maps_figure
from glassarmor.interpret.views.rows import answers, class_name, flipped, image_columns, margins, numpy, row_titles
from glassarmor.interpret.views.view import Probe, View

SHARE_KEYS: Final = tuple(f"pse/share_{kind}" for kind in KIND_NAMES)


class PSEPanel:
    """Region effects of the probe images, from the same function that the PSE reports use.

    Args:
        grid: rows and columns of regions; capped by the image size.
        images: how many of the probe images are drawn; numbers are over all of them.
        limit: effect in logits at which the colours of the still picture saturate, the same every epoch.
    """

    name = "pse"

    def __init__(self, grid: tuple[int, int] = (8, 8), images: int = 8, limit: float = 1.0) -> None:
        self.grid = (int(grid[0]), int(grid[1]))
        self.images = images
        self.limit = limit

    def __call__(self, probe: Probe) -> View:
        effects = probe.region_effects(self.grid)
        maps = self.maps(probe, effects)
        scalars = summarise(effects)
        title = headline(probe, scalars)
        drawing, examples = maps_figure(maps, {"effect": self.limit}, title), example_table(probe, effects)
        return View(
            name=self.name,
            title="Promotion and suppression",
            headline=title,
            charts=(
                maps,
                Trend("Kinds of regions", SHARE_KEYS, KIND_NAMES, style="share"),
                Trend(
                    "Effect of the attack, mean per image",
                    ("pse/promotion", "pse/suppression", "pse/gap"),
                    ("promotion of the target", "suppression of the true class", "interaction gap"),
                    "logits",
                ),
                examples,
            ),
            drawing=drawing,
            scalars=scalars,
            table=examples,
            how_to_read="Each region is set back to clean in turn. Promotion is what the target's logit then loses, "
            "suppression what the true class regains; orange helped the attack, blue hindered it. Regions are dominated "
            "by one effect when it is more than twice the other.",
        )

    def maps(self, probe: Probe, effects: PromotionSuppression) -> Maps:
        obs, count = probe.obs, min(self.images, len(probe.ids))
        rows, columns = probe.grid(self.grid)
        delta = 255 * (obs.adv.x - obs.clean.x)[:count].mean(1)

        def grid(values: np.ndarray) -> np.ndarray:
            return values[:count].reshape(count, rows, columns)

        return Maps(
            "Where the attack acts",
            row_titles(probe, count),
            (
                *image_columns(probe, count),
                MapColumn("Perturbation, channel mean", numpy(delta), "signed", "1/255", scale_group="perturbation"),
                MapColumn("Promotion of the target", grid(numpy(effects.promotion)), "signed", "logits"),
                MapColumn("Suppression of the true class", grid(numpy(effects.suppression)), "signed", "logits"),
                MapColumn("Kind of region", grid(numpy(effects.kind)), "category", categories=KIND_NAMES),
            ),
        )


def kind_shares(kinds: np.ndarray) -> np.ndarray:
    """Share of each kind, (4,), summing to 1."""
    return np.bincount(kinds.ravel(), minlength=len(KIND_NAMES)) / max(kinds.size, 1)


def summarise(effects: PromotionSuppression) -> dict[str, float]:
    """Shares of kinds; mean sums of promotion and suppression and mean |interaction gap| per image, in logits."""
    shares = KindShares(shared=False)  # dashboards are drawn by one process
    shares.update(effects)
    return {
        **dict(zip(SHARE_KEYS, shares.compute().tolist(), strict=True)),
        "pse/promotion": float(effects.promotion.sum(1).mean()),
        "pse/suppression": float(effects.suppression.sum(1).mean()),
        "pse/gap": float(effects.gap.abs().mean()),
    }


def headline(probe: Probe, scalars: dict[str, float]) -> str:
    shares = [scalars[key] for key in SHARE_KEYS]
    active = 1 - shares[INACTIVE]
    right, turned = flipped(probe)
    outcome = f"{turned} of {right} correctly classified probe images are turned"
    if active <= 0:
        return f"The attack moves no region's evidence; {outcome}."
    by_suppression, by_promotion, both = (100 * shares[k] / active for k in (SUPPRESSION, PROMOTION, BALANCED))
    if abs(by_suppression - by_promotion) < 5:
        way = "suppression and promotion alike"
    else:
        way = "mainly by suppression" if by_suppression > by_promotion else "mainly by promotion"
    return (
        f"The attack works {way}: of the active regions {by_suppression:.0f} % suppress the true class, "
        f"{by_promotion:.0f} % promote the target, {both:.0f} % do both; {outcome}."
    )


def example_table(probe: Probe, effects: PromotionSuppression) -> Table:
    """One row a probe image, under its fixed id."""
    obs = probe.obs
    clean, adv = margins(obs.clean.logits, obs.y).tolist(), margins(obs.adv.logits, obs.y).tolist()
    promoted, suppressed = effects.promotion.sum(1).tolist(), effects.suppression.sum(1).tolist()
    kinds = numpy(effects.kind)
    before, after = answers(probe, "clean"), answers(probe, "adv")
    rows = [
        (
            name,
            class_name(probe, int(obs.y[i])),
            class_name(probe, int(obs.target[i])),
            before[i],
            after[i],
            round(promoted[i], 4),
            round(suppressed[i], 4),
            *(round(float(share), 4) for share in kind_shares(kinds[i])),
            round(clean[i], 4),
            round(adv[i], 4),
        )
        for i, name in enumerate(probe.ids)
    ]
    return Table(
        "Effects by image",
        (
            "id",
            "true",
            "target",
            "predicted clean",
            "predicted adversarial",
            "Σ promotion (logits)",
            "Σ suppression (logits)",
            *(f"share {kind}" for kind in KIND_NAMES),
            "margin clean (logits)",
            "margin adversarial (logits)",
        ),
        rows,
    )
