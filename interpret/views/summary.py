"""What the panels measured, told in sentences and tables: the interpretation summary of a result card (ours).

Reads the scalars of the panels by their names (``pse/promotion``, ``profiles/turning/LAYER``, …); what it does not know is
listed by its name, so that nothing measured goes untold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

Rows = tuple[Sequence[str], Sequence[Sequence[str]]]  # head, rows

KINDS: Final = ("pse/share_inactive", "pse/share_suppression", "pse/share_promotion", "pse/share_balanced")
PROFILES: Final = {  # room/quantity of a layer → column, unit
    "profiles/turning": ("images that turn here", "%"),
    "profiles/divergence": ("the attack moves activations by", "of their length"),
}
UNITS: Final = {
    "sensitivity/attack": ("the attack moves a unit by", "σ"),
    "sensitivity/noise": ("noise of equal length by", "σ"),
    "sensitivity/attack_sensitive": ("units moved more by the attack", "%"),
    "units/gap": ("unit effects miss of the margin's change", "%"),
}
DETECTORS: Final = {
    "dissection/detector_share": ("units that detect a concept", "%"),
    "dissection/unique": ("concepts detected", ""),
    "dissection/spearman": ("Spearman's ρ of sensitivity and IoU", ""),
    "dissection/spearman_corrected": ("ρ, beyond noise", ""),
    "dissection/spearman_noise": ("ρ, noise alone", ""),
    "dissection/auc": ("AUC of sensitivity for detectors", ""),
    "dissection/auc_corrected": ("AUC, beyond noise", ""),
    "dissection/auc_noise": ("AUC, noise alone", ""),
}


def told(value: float, unit: str = "") -> str:
    """A number for people: shares in percent, counts whole, the rest to three digits."""
    if unit == "%":
        return f"{100 * value:.1f} %"
    number = str(int(value)) if value == int(value) and not unit else f"{value:.3g}"
    return f"{number} {unit}".rstrip()


class _Left:
    """The values that no sentence told yet."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self.values = dict(values)

    def take(self, *keys: str) -> list[float] | None:
        """The values of these names, once; None unless all are there."""
        return [self.values.pop(key) for key in keys] if all(key in self.values for key in keys) else None

    def below(self, room: str) -> dict[str, float]:
        """What stands below ``room``, by the rest of its name."""
        keys = [key for key in self.values if key.startswith(f"{room}/")]
        return {key.removeprefix(f"{room}/"): self.values.pop(key) for key in keys}

    def by_layer(self, columns: Mapping[str, tuple[str, str]]) -> Rows | None:
        """A row a layer and a column a quantity; None where there is none."""
        found = {title: (unit, self.below(room)) for room, (title, unit) in columns.items()}
        found = {title: column for title, column in found.items() if column[1]}
        layers = list(dict.fromkeys(layer for _, column in found.values() for layer in column))
        rows = [
            [layer, *(told(column[layer], unit) if layer in column else "–" for unit, column in found.values())]
            for layer in layers
        ]
        return (("layer", *found), rows) if rows else None


def summarised(values: Mapping[str, float]) -> tuple[list[str], list[Rows]]:
    """Sentences and tables that hold every number of ``values``, with its unit."""
    left, sentences = _Left(values), []
    if found := left.take("outcome/clean_acc", "outcome/robust_acc", "outcome/success"):
        clean, robust, success = (told(value, "%") for value in found)
        sentences.append(
            f"Images of the page: {clean} are classified rightly, {robust} under attack; {success} of those that were right "
            "fall (three in four were chosen because they fall, where so many do)."
        )
    if found := left.take("outcome/linf", "outcome/l2", "outcome/l1", "outcome/pixels"):
        linf, l2, l1, pixels = found
        sentences.append(
            f"Size of a perturbation that turned an image (median): L∞ {told(linf)}, L2 {told(l2)}, L1 {told(l1)}, on "
            f"{told(pixels, '%')} of the pixels; pixels lie in [0, 1]."
        )
    if found := left.take("failures/fallen", "failures/largest_pair"):
        sentences.append(f"Fallen images: {told(found[0])}; the largest class pair holds {told(found[1], '%')} of them.")
    if found := left.take(*KINDS):
        inactive, *kinds = found
        suppression, promotion, both = (told(kind / max(1 - inactive, 1e-12), "%") for kind in kinds)
        sentences.append(
            f"Kinds of regions: of those that the attack moves, {suppression} are dominated by suppression of the true "
            f"class, {promotion} by promotion of the target, {both} by both; {told(inactive, '%')} of all are inactive."
        )
    if found := left.take("pse/promotion", "pse/suppression", "pse/gap"):
        promotion, suppression, gap = (told(value, "logits") for value in found)
        sentences.append(
            f"Evidence moved, mean of an image: promotion {promotion}, suppression {suppression}; the parts miss the whole "
            f"by {gap}."
        )
    if found := left.take("restoration/effect", "restoration/norm", "restoration/chance"):
        effect, norm, chance = map(told, found)
        sentences.append(
            f"Restoring regions by their effect wins labels back with an area of {effect} (1: at once); in the order of the "
            f"perturbation's length {norm}, by chance {chance}."
        )
    profiles = left.by_layer(PROFILES)
    if found := left.take("profiles/turned", "profiles/coverage"):
        turning = _Left(values).below("profiles/turning")
        most = max(turning, key=lambda layer: turning[layer], default="")
        where = f", most often at {most} ({told(turning[most], '%')} of all)" if turning and turning[most] else ""
        sentences.append(
            f"Turning layer: {told(found[0], '%')} of the images cross over to the target's side{where}; the background "
            f"covers {told(found[1], '%')} of them at least."
        )
    left.below("units/sensitivity")  # the same as sensitivity/attack
    units = left.by_layer(UNITS)
    if units is not None:
        sentences.append("Sensitive units: below are means over a layer's units; 1 σ is as far as clean images vary a unit.")
    if detectors := left.below("dissection/detectors"):
        counts = sorted(detectors.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{category} {told(count)}" for category, count in counts)
        sentences.append(f"Detectors, units by the category of their concept: {listed}.")
    if found := left.take("cam/change_true", "cam/change_target", "cam/similarity_true"):
        sentences.append(
            f"Class activation maps: the attack moves the true class's by {told(found[0], 'logits')} and the target's by "
            f"{told(found[1], 'logits')} (mean of |difference|); the true class's keeps a cosine of {told(found[2])}."
        )
    if found := left.take("cam/explained"):
        sentences.append(
            f"The means of the maps move by {told(found[0], '%')} of what the logits do; 100 %: they are these."
        )
    score = [f"cam/interpretability{kind}" for kind in ("", "_chance", "_shuffled", "_swapped", "_target")]
    if found := left.take(*score):
        own, chance, shuffled, swapped, target = (told(value, "%") for value in found)
        sentences.append(
            f"Interpretability score: {own} of the perturbation's length lie where the true class's map is strongest (a "
            f"perturbation spread evenly {chance}, shuffled maps {shuffled}, another image's map {swapped}), {target} where "
            "the target's is."
        )
    if found := left.take("attribution/similarity", "attribution/change"):
        sentences.append(
            f"Attribution of the true class: cosine {told(found[0])} before and after the attack, which "
            f"moves {told(found[1], '%')} of what there is."
        )
    tables = [table for table in (profiles, units, left.by_layer(DETECTORS)) if table is not None]
    return [*sentences, *(f"{key}: {value:.4g}" for key, value in sorted(left.values.items()))], tables
