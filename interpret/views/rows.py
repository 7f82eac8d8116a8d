"""What every panel of pictures says about its rows: which image, what is true, what the network answers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from glassarmor.interpret.observation import Side
from glassarmor.interpret.views.charts import MapColumn
from glassarmor.interpret.views.view import Probe


def numpy(values: Tensor) -> np.ndarray:
    """A tensor of any device, in graph or not, as float32 or its own integer type."""
    values = values.detach().cpu()
    return values.float().numpy() if values.is_floating_point() else values.numpy()


def percent(value: float) -> str:
    """0.5625 → "56.3 %": halves go up, as on the page, where Python alone would round to even."""
    return f"{100 * value + 1e-9:.1f} %"


def class_name(probe: Probe, label: int) -> str:
    """Name of a class, its number where the data set has no names."""
    return probe.class_names[label] if label < len(probe.class_names) else str(label)


def answers(probe: Probe, side: Side) -> list[str]:
    """Predicted class of each probe image."""
    return [class_name(probe, int(c)) for c in probe.obs.side(side).logits.argmax(1)]


def row_titles(probe: Probe, count: int) -> tuple[str, ...]:
    """'val-17 · true 3 · predicted clean 3 → adversarial 8' for the first ``count`` images."""
    labels = [class_name(probe, int(y)) for y in probe.obs.y]
    rows = zip(probe.ids, labels, answers(probe, "clean"), answers(probe, "adv"), strict=True)
    return tuple(
        f"{name} · true {y} · predicted clean {clean} → adversarial {adv}" + (" · fooled" if clean == y != adv else "")
        for name, y, clean, adv in list(rows)[:count]
    )


def images(x: Tensor) -> np.ndarray:
    """(n, C, H, W) in [0,1] → (n, H, W, 3); one channel becomes grey, more than three show the first three."""
    pictures = numpy(x).transpose(0, 2, 3, 1)
    return np.repeat(pictures[..., :1], 3, -1) if pictures.shape[-1] < 3 else pictures[..., :3]


def image_columns(probe: Probe, count: int) -> tuple[MapColumn, MapColumn]:
    """The clean and the adversarial image."""
    return (
        MapColumn("Clean", images(probe.obs.clean.x[:count]), "image"),
        MapColumn("Adversarial", images(probe.obs.adv.x[:count]), "image"),
    )


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """Logit of the true class less the strongest other, (N,): positive where the answer is right."""
    other = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return logits.gather(1, y[:, None]).squeeze(1) - other


def flipped(probe: Probe) -> tuple[int, int]:
    """How many images were right when clean, and how many of these the attack turned."""
    right = probe.obs.clean.logits.argmax(1) == probe.obs.y
    turned = right & (probe.obs.adv.logits.argmax(1) != probe.obs.y)
    return int(right.sum()), int(turned.sum())
