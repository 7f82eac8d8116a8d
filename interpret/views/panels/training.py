"""Panel: is the defense learning?  Loss terms, clean and robust accuracy."""

from __future__ import annotations

from collections.abc import Mapping

from glassarmor.interpret.views.charts import Trend
from glassarmor.interpret.views.rows import percent
from glassarmor.interpret.views.view import Answer, Probe, View

ACCURACIES = {
    "val/clean_acc": "clean, held out",
    "val/robust_acc": "robust, held out",
    "train/clean_acc": "clean, training",
    "train/robust_acc": "robust, training",
}


class TrainingPanel:
    """Reads ``probe.scalars`` alone: ``val/clean_acc``, ``val/robust_acc``, ``train/loss``, ``train/loss/<term>``…

    Args:
        overfitting: a gap of training over held-out robust accuracy above this share is named in the headline.
    """

    name = "training"

    def __init__(self, overfitting: float = 0.15) -> None:
        self.overfitting = overfitting

    def __call__(self, probe: Probe) -> View:
        said = headline(probe.scalars, self.overfitting)
        return View(
            name=self.name,
            title="Training",
            headline=said,
            answers=(Answer("healthy", said),),
            charts=charts(probe.scalars),
            how_to_read="Robust accuracy is the share of images that stay right under attack. A loss term is shown as it "
            "enters the total, its weight included.",
        )


def charts(scalars: Mapping[str, float]) -> tuple[Trend, ...]:
    """Accuracies, the total loss and its terms: whichever were measured."""
    known = [key for key in ACCURACIES if key in scalars]
    terms = sorted(key for key in scalars if key.startswith("train/loss/"))
    found = []
    if known:
        labels = tuple(ACCURACIES[key] for key in known)
        found.append(Trend("Accuracy", tuple(known), labels, "%", limits=(0.0, 1.0)))
    if "train/loss" in scalars or terms:
        total = ("train/loss",) if "train/loss" in scalars else ()
        names = tuple(key.removeprefix("train/loss/").replace("_", " ") for key in terms)
        found.append(Trend("Training loss and its terms", (*total, *terms), (*("total" for _ in total), *names)))
    return tuple(found)


def headline(scalars: Mapping[str, float], overfitting: float) -> str:
    robust, clean = scalars.get("val/robust_acc"), scalars.get("val/clean_acc")
    if robust is None and clean is None:
        loss = scalars.get("train/loss")
        return "No accuracy measured yet." if loss is None else f"Training loss {loss:.3g}; no accuracy measured yet."
    parts = [
        f"{name} {percent(value)}" for name, value in (("robust accuracy", robust), ("clean", clean)) if value is not None
    ]
    text = f"Held-out {', '.join(parts)}."
    gap = scalars.get("train/robust_acc", 0.0) - robust if robust is not None else 0.0
    if gap > overfitting:
        text += f" Training robust accuracy is {100 * gap:.0f} points higher: part of it does not carry over to new images."
    return text
