"""Panel: which concepts do the units carry, and are those that the attack moves the ones that carry them?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from glassarmor.interpret.concepts.association import Association, UnitRow, link, unit_rows
from glassarmor.interpret.concepts.dissection import ConceptData, Dissection, Union, dissect, upsampling
from glassarmor.interpret.network.layouts import layouts_of
from glassarmor.interpret.observation import Observation, record
from glassarmor.interpret.statistics import holm
from glassarmor.interpret.views.charts import MapColumn, Maps, Scatter, Table, Trend
from glassarmor.interpret.views.draw.figures import charts_figure
from glassarmor.interpret.views.rows import images as pictures
from glassarmor.interpret.views.rows import numpy
from glassarmor.interpret.views.view import Probe, View


class DissectionPanel:
    """Network dissection of the observed layers each epoch, and its link to sensitivity.

    Args:
        concepts: (size, channels) → annotated images, made once for the images of the probe.
        quantile, union, detection: see :func:`.dissect`.
        patches: images shown a unit card.
        cards: units shown as cards, the best detectors of every layer in turn.
        draws: noises of equal norm behind the corrected sensitivity.
    """

    name = "dissection"

    def __init__(
        self,
        concepts: Callable[..., ConceptData],
        quantile: float = 0.02,
        union: Union = "global",
        detection: float = 0.04,
        patches: int = 2,
        cards: int = 6,
        draws: int = 3,
    ) -> None:
        self.concepts = concepts
        self.quantile, self.union, self.detection = quantile, union, detection
        self.patches, self.cards, self.draws = patches, cards, draws
        self._data: dict[tuple[int, int], ConceptData] = {}

    def data(self, probe: Probe) -> ConceptData:
        """Annotated images of the probe's size and channels."""
        channels, height, width = probe.obs.adv.x.shape[1:]
        key = (min(height, width), channels)
        if key not in self._data:
            self._data[key] = self.concepts(size=key[0], channels=channels)
        return self._data[key]

    def __call__(self, probe: Probe) -> View:
        layers = [layer for layer in probe.layers if probe.obs.adv.acts[layer].dim() == 2 or probe.obs.spatial(layer)]
        if not layers:
            return View(self.name, "Concepts of units", "No observed layer can be dissected.", ())
        data = self.data(probe)
        found = dissect(
            probe.net, data, layers, quantile=self.quantile, union=self.union, detection=self.detection, top=self.patches
        )
        controls, effects = probe.sensitivity(self.draws), probe.conductance(10).units
        rows = [row for layer in layers for row in unit_rows(layer, found[layer], controls[layer], effects[layer])]
        for layer in layers:  # for panels that come after
            probe.concepts[layer] = tuple(row.concept for row in rows if row.layer == layer)
        links = {layer: link(found[layer], controls[layer]) for layer in layers}
        title = headline(found, links)
        scatter = link_scatter(rows, layers)
        scalars = summarise(found, links)
        drawing, units = charts_figure([scatter], title), unit_table(rows)
        return View(
            name=self.name,
            title="Concepts of units",
            headline=title,
            charts=(
                unit_cards(probe, data, found, self.cards, self.patches),
                scatter,
                Trend(
                    "Detectors by concept category",
                    tuple(key for key in scalars if key.startswith("dissection/detectors/")),
                    tuple(key.rsplit("/", 1)[1] for key in scalars if key.startswith("dissection/detectors/")),
                    "units",
                ),
                Trend(
                    "Sensitivity against IoU: Spearman's rank correlation",
                    tuple(f"dissection/spearman/{layer}" for layer in layers),
                    tuple(layers),
                    limits=(-1.0, 1.0),
                ),
                link_table(links),
                units,
            ),
            drawing=drawing,
            scalars=scalars,
            table=units,
            how_to_read=f"A unit detects a concept if its strongest {100 * self.quantile:g} % of positions overlap the "
            f"concept's pixels with IoU above {self.detection:g}. Concepts come from drawn scenes with exact masks unless "
            "others were chosen. In the cards, the outlined part is where the unit exceeds its threshold.",
        )


def summarise(found: Mapping[str, Dissection], links: Mapping[str, Mapping[str, Association]]) -> dict[str, float]:
    """Detectors by category over all layers; by layer the share of detectors and the link to attack sensitivity."""
    scalars: dict[str, float] = {}
    for dissection in found.values():
        for category, count in dissection.detectors_by_category.items():
            key = f"dissection/detectors/{category}"
            scalars[key] = scalars.get(key, 0.0) + count
    for layer, dissection in found.items():
        scalars[f"dissection/detector_share/{layer}"] = float(dissection.detectors.float().mean())
        scalars[f"dissection/unique/{layer}"] = float(sum(dissection.unique_detectors.values()))
        for kind, association in links[layer].items():
            suffix = "" if kind == "attack" else f"_{kind}"
            scalars[f"dissection/spearman{suffix}/{layer}"] = association.spearman
            scalars[f"dissection/auc{suffix}/{layer}"] = association.auc
    return scalars


def headline(found: Mapping[str, Dissection], links: Mapping[str, Mapping[str, Association]]) -> str:
    detectors = sum(int(d.detectors.sum()) for d in found.values())
    units = sum(len(d.detectors) for d in found.values())
    by_category: dict[str, int] = {}
    for dissection in found.values():
        for category, count in dissection.detectors_by_category.items():
            by_category[category] = by_category.get(category, 0) + count
    most = max(by_category, key=lambda name: by_category[name])
    text = f"{detectors} of {units} units detect a concept" + (f", most of them {most}." if detectors else ".")
    adjusted = holm([a["attack"].spearman_p for a in links.values()])
    told = [layer for layer, p in zip(links, adjusted, strict=True) if p < 0.05]
    if not told:
        return text + " In no layer is sensitivity to the attack tied to interpretability (p ≥ 0.05, Holm over layers)."
    parts = []
    for layer in told:
        rho, p = links[layer]["attack"].spearman, links[layer]["attack"].spearman_p
        sure = "p < 0.001" if p < 0.001 else f"p {p:.3f}"
        parts.append(
            f"{'falls' if rho < 0 else 'rises'} with IoU in {layer} (Spearman {rho:+.2f}, {sure})".replace("-", "−")
        )
    return text + f" Sensitivity {', '.join(parts)}."


def link_scatter(rows: list[UnitRow], layers: list[str]) -> Scatter:
    return Scatter(
        "Units: sensitivity against interpretability",
        "best IoU with a concept",
        "moved by the attack (σ)",
        names=tuple(f"{row.layer}, unit {row.unit}: {row.concept or row.state}" for row in rows),
        x=tuple(row.iou for row in rows),
        y=tuple(row.sensitivity for row in rows),
        size=tuple(max(row.corrected, 0.0) for row in rows),
        size_label="above noise of equal norm (σ)",
        group=tuple(layers.index(row.layer) for row in rows),
        groups=tuple(layers),
    )


def link_table(links: Mapping[str, Mapping[str, Association]]) -> Table:
    rows: list[tuple[str | float | int, ...]] = [
        (
            layer,
            kind,
            a.units,
            a.detectors,
            *(round(v, 4) for v in (a.spearman, a.spearman_p, a.auc, a.auc_p, a.overlap, a.overlap_expected, a.overlap_p)),
        )
        for layer, kinds in links.items()
        for kind, a in kinds.items()
    ]
    return Table(
        "Sensitivity against interpretability, layer by layer",
        (
            "layer",
            "moved by",
            "units",
            "detectors",
            "Spearman",
            "p",
            "AUC of detectors",
            "p (AUC)",
            "top overlap",
            "by chance",
            "p (overlap)",
        ),
        rows,
    )


def unit_table(rows: list[UnitRow]) -> Table:
    cells: list[tuple[str | float | int, ...]] = [
        (
            row.unit,
            row.layer,
            row.concept or row.state,
            row.category,
            "yes" if row.detector else "",
            *(round(v, 4) for v in (row.iou, row.sensitivity, row.corrected, row.promotion, row.suppression)),
        )
        for row in sorted(rows, key=lambda row: -row.iou)
    ]
    return Table(
        "Units and their concepts",
        (
            "unit",
            "layer",
            "concept",
            "category",
            "detector",
            "IoU",
            "sensitivity (σ)",
            "above noise (σ)",
            "promotion (logits)",
            "suppression (logits)",
        ),
        cells,
    )


def unit_cards(probe: Probe, data: ConceptData, found: Mapping[str, Dissection], cards: int, patches: int) -> Maps:
    """The best detectors of every layer: the images that excite them most, and the unit on the first probe image."""
    chosen: list[tuple[str, int]] = []
    order = {layer: d.best_iou.masked_fill(d.dead, -1).argsort(descending=True).tolist() for layer, d in found.items()}
    for place in range(max(len(units) for units in order.values())):
        chosen += [(layer, units[place]) for layer, units in order.items() if place < len(units)]
    chosen = sorted(chosen[:cards], key=lambda card: list(found).index(card[0]))
    wanted = sorted({int(i) for layer, unit in chosen for i in found[layer].top_images[unit, :patches]})
    kept = _images_of(data, wanted)
    images = kept.to(probe.obs.adv.x.device)
    with torch.no_grad(), record(probe.net, list(found), layouts_of(probe.net, images, list(found))) as acts:
        probe.net(images)
    columns = []
    for place in range(patches):
        tiles = []
        for layer, unit in chosen:
            numbers = found[layer].top_images[unit].tolist()
            at = wanted.index(numbers[min(place, len(numbers) - 1)])
            tiles.append(
                _outlined(kept[at], _map(probe.obs, layer, acts[layer][at, unit]), float(found[layer].thresholds[unit]))
            )
        columns.append(MapColumn(f"Excited most, {place + 1}", np.stack(tiles), "image"))
    side = probe.obs.adv.x.shape[-1]
    for name, view in (("clean", "clean"), ("adversarial", "adv")):
        values = []
        for layer, unit in chosen:
            act = numpy(_map(probe.obs, layer, probe.obs.side(view).acts[layer][0, unit]))  # type: ignore[arg-type]
            values.append(np.kron(act, np.ones((-(-side // act.shape[0]), -(-side // act.shape[1]))))[:side, :side])
        columns.append(MapColumn(f"{probe.ids[0]}, {name}", np.stack(values), "signed", scale_group="activation"))
    titles = tuple(_card(found[layer], layer, unit) for layer, unit in chosen)
    return Maps("Cards of the best detectors", titles, tuple(columns), own_scale=True)


def _map(obs: Observation, layer: str, act: Tensor) -> Tensor:
    """One unit of one image as a map, (h, w); (1, 1) where the layer has no positions."""
    return obs.maps(layer, act.detach().float(), lead=0) if obs.spatial(layer) else act.detach().float().reshape(1, 1)


def _card(dissection: Dissection, layer: str, unit: int) -> str:
    concept = dissection.concepts[int(dissection.best_concept[unit])]
    detects = "detects" if dissection.detectors[unit] else "nearest to"
    best = int(dissection.best_concept[unit])
    chance = float(dissection.chance[unit, best])
    return f"{layer}, unit {unit} · {detects} {concept} · IoU {float(dissection.best_iou[unit]):.3f} (chance {chance:.3f})"


def _images_of(data: ConceptData, wanted: list[int]) -> Tensor:
    """The images of these numbers, ascending, (n, C, H, W), in one pass over the data."""
    kept: list[Tensor] = []
    start = 0
    for images, _ in data:
        kept += [images[n - start] for n in wanted if start <= n < start + len(images)]
        start += len(images)
    return torch.stack(kept)


def _outlined(image: Tensor, act: Tensor, threshold: float) -> np.ndarray:
    """The image with the edge of where the activation exceeds the threshold drawn in magenta."""
    height, width = image.shape[1:]
    down, across = upsampling(act.shape[0], height, act), upsampling(act.shape[1], width, act)
    mask = (down @ (act - threshold) @ across.T > 0)[None, None].float()
    inner = numpy(1 - torch.nn.functional.max_pool2d(1 - mask, 3, 1, 1))[0, 0] > 0.5
    picture = pictures(image[None])[0].copy()
    picture[(numpy(mask)[0, 0] > 0.5) & ~inner] = (1.0, 0.0, 0.8)
    return picture
