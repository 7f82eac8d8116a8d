"""Panel: which pixels speak for the true class?  Any attribution method of Captum, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from glassarmor.interpret.signals.captum_bridge import METHODS, attribute
from glassarmor.interpret.views.charts import MapColumn, Maps, Trend
from glassarmor.interpret.views.draw.figures import maps_figure
from glassarmor.interpret.views.rows import image_columns, numpy, row_titles
from glassarmor.interpret.views.view import Probe, View


class AttributionPanel:
    """Attribution of the true class's logit to the pixels, clean and adversarial, summed over channels, on one scale.

    Args:
        method: a name that :func:`.attribute` knows.
        images: how many of the probe images are attributed and drawn.
        limit: attribution at which the colours of the still picture saturate, the same every epoch.

    Raises:
        ValueError: unknown method.
    """

    name = "attribution"

    def __init__(self, method: str = "integrated_gradients", images: int = 8, limit: float = 0.5) -> None:
        if method not in METHODS:
            raise ValueError(f"panels.attribution.method: expected one of {', '.join(METHODS)}; found {method!r}")
        self.method = method
        self.images = images
        self.limit = limit

    def __call__(self, probe: Probe) -> View:
        clean, adv = self.measure(probe)
        maps = self.maps(probe, clean, adv)
        similarity = torch.cosine_similarity(clean.flatten(1), adv.flatten(1))
        change = float((adv - clean).abs().sum((1, 2)).mean() / clean.abs().sum((1, 2)).mean().clamp_min(1e-12))
        title = (
            f"Clean and adversarial attributions of the true class agree by {float(similarity.mean()):.2f} (cosine, 1 is "
            f"the same); the attack moves {100 * change:.0f} % as much attribution as there is."
        )
        drawing = maps_figure(maps, {"attribution": self.limit}, title)
        return View(
            name=self.name,
            title="Pixel attribution",
            headline=title.replace("-", "−"),
            charts=(
                maps,
                Trend(
                    "Agreement of clean and adversarial attribution",
                    ("attribution/similarity",),
                    ("cosine",),
                    limits=(0.0, 1.0),
                ),
            ),
            drawing=drawing,
            scalars={"attribution/similarity": float(similarity.mean()), "attribution/change": change},
            how_to_read=f"Orange pixels raise the true class's logit, blue ones lower it ({self.method.replace('_', ' ')} "
            "by Captum, summed over channels).",
        )

    def measure(self, probe: Probe) -> tuple[Tensor, Tensor]:
        """Attribution at x and at x', (n, H, W)."""
        obs, count = probe.obs, min(self.images, len(probe.ids))
        y = obs.y[:count]
        sides = (obs.clean.x[:count].detach(), obs.adv.x[:count].detach())
        clean, adv = (attribute(probe.net, x, y, method=self.method).detach().sum(1) for x in sides)
        return clean, adv

    def maps(self, probe: Probe, clean: Tensor, adv: Tensor) -> Maps:
        def column(title: str, values: Tensor) -> MapColumn:
            return MapColumn(title, numpy(values), "signed", "logits", scale_group="attribution")

        return Maps(
            f"Attribution to pixels: {self.method.replace('_', ' ')}",
            row_titles(probe, len(clean)),
            (
                *image_columns(probe, len(clean)),
                column("True class, clean", clean),
                column("True class, adversarial", adv),
                column("Difference", adv - clean),
            ),
        )
