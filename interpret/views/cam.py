"""Panel: where does the network see the true class and the target, before and after the attack?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from interpret.cam import class_activation_map
from interpret.observation import Label, Side
from interpret.views.figures import maps_figure, to_array
from interpret.views.rows import image_columns, numpy, row_titles
from interpret.views.view import MapColumn, Maps, Probe, Trend, View

TITLE = "Class activation"


class CAMPanel:
    """Signed class activation maps in logits and their differences, one scale a row.

    Args:
        layer: the layer to map; by default the last observed one with positions.
        images: how many of the probe images are drawn; numbers are over all of them.
        limit: logits at which the colours of the still picture saturate, the same every epoch.
    """

    name = "cam"

    def __init__(self, layer: str | None = None, images: int = 8, limit: float = 40.0) -> None:
        self.layer = layer
        self.images = images
        self.limit = limit

    def __call__(self, probe: Probe) -> View:
        layer = self.layer or last_map(probe)
        if layer is None:
            return View(self.name, TITLE, "No observed layer has positions, so there is no class activation map.", ())
        cams = measure(probe, layer)
        maps = draw(probe, cams, layer, min(self.images, len(probe.ids)))
        scalars = summarise(cams)
        title = headline(cams, layer)
        return View(
            name=self.name,
            title=TITLE,
            headline=title,
            charts=(
                maps,
                Trend(
                    "Class evidence that the attack moves, mean |difference|",
                    ("cam/change_true", "cam/change_target"),
                    ("true class", "target"),
                    "logits",
                ),
            ),
            figure=to_array(maps_figure(maps, {"class evidence": self.limit}, title)),
            scalars=scalars,
            how_to_read="Orange places speak for the class, blue ones against it; the mean of a map is the class's logit "
            "up to the bias (exact where pooling and a linear head follow). Differences are adversarial minus clean.",
        )


def last_map(probe: Probe) -> str | None:
    """The last observed layer whose output has positions."""
    spatial = [layer for layer in probe.layers if probe.obs.adv.acts[layer].dim() == 4]
    return spatial[-1] if spatial else None


def measure(probe: Probe, layer: str) -> dict[tuple[Label, Side], Tensor]:
    """Maps (N, h, w) of both labels on both sides."""
    labels: tuple[Label, ...] = ("true", "target")
    sides: tuple[Side, ...] = ("clean", "adv")
    return {
        (label, side): class_activation_map(probe.obs, layer, label=label, side=side).detach()
        for label in labels
        for side in sides
    }


def draw(probe: Probe, cams: dict[tuple[Label, Side], Tensor], layer: str, count: int) -> Maps:
    size = probe.obs.adv.x.shape[-2:]

    def column(title: str, values: Tensor) -> MapColumn:
        large = interpolate(values[:count, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]
        return MapColumn(title, numpy(large), "signed", "logits", scale_group="class evidence", overlay=True)

    return Maps(
        f"Class activation maps of layer {layer}, upsampled over the image",
        row_titles(probe, count),
        (
            *image_columns(probe, count),
            column("True class, clean", cams["true", "clean"]),
            column("True class, adversarial", cams["true", "adv"]),
            column("True class, difference", cams["true", "adv"] - cams["true", "clean"]),
            column("Target, adversarial", cams["target", "adv"]),
            column("Target, difference", cams["target", "adv"] - cams["target", "clean"]),
        ),
    )


def change(cams: dict[tuple[Label, Side], Tensor], label: Label) -> Tensor:
    """CAM(x') − CAM(x), (N, h, w)."""
    return cams[label, "adv"] - cams[label, "clean"]


def summarise(cams: dict[tuple[Label, Side], Tensor]) -> dict[str, float]:
    """Mean |difference| for both labels, and cosine similarity of the true class's maps before and after."""
    clean, adv = cams["true", "clean"].flatten(1), cams["true", "adv"].flatten(1)
    return {
        "cam/change_true": float(change(cams, "true").abs().mean()),
        "cam/change_target": float(change(cams, "target").abs().mean()),
        "cam/similarity_true": float(torch.cosine_similarity(clean, adv).mean()),
    }


def headline(cams: dict[tuple[Label, Side], Tensor], layer: str) -> str:
    lost, gained = float(change(cams, "true").mean()), float(change(cams, "target").mean())
    similarity = summarise(cams)["cam/similarity_true"]
    kept = "keeps its place" if similarity > 0.9 else "partly moves" if similarity > 0.6 else "is torn apart"
    return (
        f"Under attack the evidence for the true class {kept} at layer {layer} (map similarity "
        f"{_signed(similarity)[1:]}); it changes by {_signed(lost)} logits, the target's by {_signed(gained)}."
    )


def _signed(value: float) -> str:
    return f"{np.round(value, 2):+.2f}".replace("-", "−")
