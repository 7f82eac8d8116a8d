"""Panel: where does the network see the true class and the target, before and after the attack?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from glassarmor.interpret.observation import Label, Observation, Side
from glassarmor.interpret.signals.cam import Interpretability, class_activation_map, interpretability
from glassarmor.interpret.signals.overlap import Overlap, region_overlap
from glassarmor.interpret.signals.pse import KIND_NAMES
from glassarmor.interpret.views.charts import Bars, MapColumn, Maps, Table, Trend
from glassarmor.interpret.views.draw.figures import maps_figure
from glassarmor.interpret.views.rows import image_columns, numpy, row_titles
from glassarmor.interpret.views.view import Probe, View

LABELS: tuple[Label, ...] = ("true", "target")
EXACT = 0.05  # how far from all of the logit's change the maps' means may be to be called the logit
TITLE = "Class activation"
MAPS: dict[str, tuple[Label, Side]] = {  # the four maps of the paper's image-level question
    "true class, clean": ("true", "clean"),
    "target, clean": ("target", "clean"),
    "true class, adversarial": ("true", "adv"),
    "target, adversarial": ("target", "adv"),
}


class CAMPanel:
    """Signed class activation maps in logits and their differences, one scale a row.

    Args:
        layer: the layer to map; by default the last observed one with positions.
        images: how many of the probe images are drawn; numbers are over all of them.
        limit: logits at which the colours of the still picture saturate, the same every epoch.
        quantile: q of the discriminative region B_c = [CAM_c ≥ its q-quantile].
        grid: rows and columns of the regions whose kinds are compared with the maps; capped by the image size.
    """

    name = "cam"

    def __init__(
        self,
        layer: str | None = None,
        images: int = 8,
        limit: float = 40.0,
        quantile: float = 0.8,
        grid: tuple[int, int] = (8, 8),
    ) -> None:
        self.layer = layer
        self.images = images
        self.limit = limit
        self.quantile = quantile
        self.grid = (int(grid[0]), int(grid[1]))

    def __call__(self, probe: Probe) -> View:
        layer = self.layer or last_map(probe)
        if layer is None:
            return View(self.name, TITLE, "No observed layer has positions, so there is no class activation map.", ())
        cams = measure(probe, layer)
        maps = draw(probe, cams, layer, min(self.images, len(probe.ids)))
        delta = probe.obs.adv.x - probe.obs.clean.x
        scores = {name: interpretability(cams[key], delta, self.quantile) for name, key in MAPS.items()}
        overlap = region_overlap(
            probe.region_effects(self.grid),
            cams["true", "clean"],
            cams["target", "adv"],
            (delta.shape[-2], delta.shape[-1]),
            probe.grid(self.grid),
            quantile=self.quantile,
        )
        explained = explained_change(probe.obs, cams)
        scalars = summarise(cams) | {"cam/explained": explained} | summarise_scores(scores)
        title = headline(cams, layer, explained) + score_sentence(scores)
        drawing = maps_figure(maps, {"class evidence": self.limit}, title)
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
                score_bars(scores),
                Trend(
                    "Interpretability score, mean over the images",
                    ("cam/interpretability", "cam/interpretability_shuffled", "cam/interpretability_chance"),
                    ("true class, clean", "its map shuffled", "δ spread evenly"),
                    limits=(0.0, 1.0),
                ),
                overlap_table(overlap),
            ),
            drawing=drawing,
            scalars=scalars,
            how_to_read=f"Orange places speak for the class, blue ones against it: gradient times activation, place by "
            f"place. {mean_sentence(explained)} Differences are adversarial minus clean. The "
            "interpretability score is the share of the perturbation's norm inside the discriminative region of a map; it "
            "says something only where it beats its controls.",
        )


def last_map(probe: Probe) -> str | None:
    """The last observed layer whose positions form a map over the image."""
    spatial = [layer for layer in probe.layers if probe.obs.spatial(layer)]
    return spatial[-1] if spatial else None


def measure(probe: Probe, layer: str) -> dict[tuple[Label, Side], Tensor]:
    """Maps (N, h, w) of both labels on both sides."""
    sides: tuple[Side, ...] = ("clean", "adv")
    return {
        (label, side): class_activation_map(probe.obs, layer, label=label, side=side).detach()
        for label in LABELS
        for side in sides
    }


def draw(probe: Probe, cams: dict[tuple[Label, Side], Tensor], layer: str, count: int) -> Maps:
    # Half the image's resolution shows all that a bilinear map holds, at a quarter of the bytes.
    size = [-(-side // 2) for side in probe.obs.adv.x.shape[-2:]]

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


def _mean(values: Tensor) -> float:
    return float(values[values.isfinite()].mean())


def summarise_scores(scores: dict[str, Interpretability]) -> dict[str, float]:
    """Mean score of the clean map of the true class with its controls, and of the target's adversarial map."""
    true, target = scores["true class, clean"], scores["target, adversarial"]
    return {
        "cam/interpretability": _mean(true.score),
        "cam/interpretability_chance": _mean(true.chance),
        "cam/interpretability_shuffled": _mean(true.shuffled),
        "cam/interpretability_swapped": _mean(true.swapped),
        "cam/interpretability_target": _mean(target.score),
    }


def score_bars(scores: dict[str, Interpretability]) -> Bars:
    """The score of each of the four maps beside the level of a δ spread evenly; below it its shuffled control."""
    labels, values, chance = [], [], []
    for name, found in scores.items():
        labels += [name, f"{name}, shuffled"]
        values += [_mean(found.score), _mean(found.shuffled)]
        chance += [_mean(found.chance)] * 2
    return Bars(
        "Interpretability score: share of ‖δ‖ inside the discriminative region",
        tuple(labels),
        tuple(values),
        reference=tuple(chance),
        reference_label="δ spread evenly",
    )


def score_sentence(scores: dict[str, Interpretability]) -> str:
    found = scores["true class, clean"]
    score, shuffled = _mean(found.score), _mean(found.shuffled)
    if not np.isfinite(score):
        return ""
    return (
        f" Interpretability score {score:.2f} against {_mean(found.chance):.2f} for a perturbation spread evenly and "
        f"{shuffled:.2f} with the map shuffled."
    )


def overlap_table(overlap: Overlap) -> Table:
    """Where the kinds of regions lie relative to C(x, true) and C(x', target)."""
    rows: list[tuple[str | float | int, ...]] = []
    for k, kind in enumerate(KIND_NAMES):
        for j, name in enumerate(("true class, clean", "target, adversarial")):
            rows.append(
                (
                    kind,
                    name,
                    int(overlap.count[k]),
                    *(
                        round(float(values[k, j]), 4)
                        for values in (
                            overlap.percentile,
                            overlap.percentile_shuffled,
                            overlap.percentile_p,
                            overlap.iou,
                            overlap.iou_shuffled,
                            overlap.iou_p,
                        )
                    ),
                )
            )
    return Table(
        "Where the kinds of regions lie relative to the maps",
        ("kind", "map", "regions", "CAM percentile", "by chance", "p", "IoU with the region", "by chance (IoU)", "p (IoU)"),
        rows,
    )


def explained_change(obs: Observation, cams: dict[tuple[Label, Side], Tensor]) -> float:
    """Of the change of both logits under attack, the part by which the maps' means change: 1 where they sum to the logits.

    The slope through the origin of Δ mean(map) on Δ logit over all images and both labels; NaN if no logit changes.
    """
    mean = torch.cat([change(cams, label).mean((1, 2)) for label in LABELS])
    logit = torch.cat([(obs.logit(label, "adv") - obs.logit(label, "clean")).detach() for label in LABELS])
    return float((mean * logit).sum() / logit.square().sum())


def exact(explained: float) -> bool:
    return abs(explained - 1) < EXACT


def mean_sentence(explained: float) -> str:
    """What the mean of a map is, as measured."""
    if exact(explained):
        return f"The mean of a map is the class's logit up to the bias: it moves by {100 * explained:.0f} % of the logit."
    if explained != explained:
        return "No logit changed, so what the mean of a map is cannot be told."
    return (
        f"The mean of a map is not the logit here: it moves by {100 * explained:.0f} % of what the logit does, so read "
        "where, and not how much."
    )


def headline(cams: dict[tuple[Label, Side], Tensor], layer: str, explained: float) -> str:
    lost, gained = float(change(cams, "true").mean()), float(change(cams, "target").mean())
    similarity = summarise(cams)["cam/similarity_true"]
    kept = "keeps its place" if similarity > 0.9 else "partly moves" if similarity > 0.6 else "is torn apart"
    amounts = f"it changes by {_signed(lost)} logits, the target's by {_signed(gained)}."
    if not exact(explained):
        amounts = "how much of a logit that is, this layer's maps do not say."
    return (
        f"Under attack the evidence for the true class {kept} at layer {layer} (map similarity "
        f"{_signed(similarity)[1:]}); {amounts}"
    )


def _signed(value: float) -> str:
    return f"{np.round(value, 2):+.2f}".replace("-", "−")
