"""The result card of an evaluation: everything that a reader needs to trust, compare or repeat a robust accuracy.

A card is plain JSON that follows ``card.schema.json``; :func:`markdown` shows it to people.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import jsonschema
import torch
from torch import Tensor, nn

from glassarmor.defenses.attacks.objectives import Margin
from glassarmor.defenses.attacks.pgd import PGD, Attack
from glassarmor.defenses.evaluation.consistency import SCALES, contradictions
from glassarmor.defenses.evaluation.inputs import answered, device_of, predict
from glassarmor.defenses.evaluation.robustness import Evaluation
from glassarmor.defenses.evaluation.sanity import SanityReport
from glassarmor.defenses.threat import Threat
from glassarmor.interpret.inputs import checked
from glassarmor.interpret.storage import read_object

SCHEMA: Final = Path(__file__).with_name("card.schema.json")
VERSION: Final = "glassarmor-card/1"
MUST_AGREE: Final = {  # what makes the accuracies of two cards comparable, and how a reader calls it
    ("threat", "norm"): "norm of the threat",
    ("threat", "eps"): "ε",
    ("data", "images"): "images",
    ("suite", "name"): "suite",
    ("examples", "labels"): "labels",
    ("data", "classes"): "classes",
}


def margin_pgd(threat: Threat) -> Attack:
    """PGD-20 on the margin."""
    return PGD(threat, 20, objective=Margin(), seed=7)


def accuracy_curve(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    scales: Sequence[float] = SCALES,
    attack: Callable[[Threat], Attack] = margin_pgd,
    batch: int = 256,
) -> tuple[tuple[float, float], ...]:
    """Accuracy against ε: pairs of (ε, share that stands), from ε = 0 on, never rising (ours).

    An attack at each radius, on what still stands: an image that fell in a smaller ball falls in a larger one.

    Args:
        x, y: images (N, C, H, W) in [0,1] and labels (N,).
        scales: radii over that of ``threat``, increasing.
        attack: for a ball; one that needs no gradient for a net that has none.

    Raises:
        ValueError: scales that do not increase from above 0.
    """
    if not scales or scales[0] <= 0 or any(b <= a for a, b in pairwise(scales)):
        raise ValueError(f"scales: expected increasing numbers above 0, found {tuple(scales)}")
    x, y, labels = checked(net, x, y)
    device = device_of(net)
    predict(net, x[:2].to(device), labels)
    standing = torch.cat(
        [answered(predict(net, a.to(device)).cpu(), b.cpu()) for a, b in zip(x.split(batch), y.split(batch), strict=True)]
    )
    curve = [(0.0, float(standing.float().mean()))]
    for scale in scales:
        ball = threat.scaled(scale)
        search = attack(ball)
        for rows in standing.nonzero().flatten().split(batch) if standing.any() else ():
            a, b = x[rows.to(x.device)].to(device), y[rows.to(y.device)].to(device)
            standing[rows] = answered(predict(net, search(net, a, b)), b).cpu()
        curve.append((float(ball.eps), float(standing.float().mean())))
    return tuple(curve)


def make_card(
    found: Evaluation,
    threat: Threat,
    *,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    class_names: Sequence[str],
    curve: Sequence[tuple[float, float]],
    sanity: SanityReport,
    interpretation: Mapping[str, float],
    seed: int,
    versions: Mapping[str, str],
    commit: str,
    config: Mapping[str, Any] | None = None,
    places: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The card as plain JSON.

    Args:
        model: ``name``, ``source`` (where its weights come from) and ``parameters``; ``training``, where its run is known:
            the hash of the config, and what was ``changed`` while it was trained.
        data: ``name``, ``split``, and ``selection``: what chose the checkpoint; ``fingerprint`` of the whole split, and
            ``differs``: how the images differ from those that the network was trained and chosen on.
        class_names: by label; a label without one is called by its number.
        curve: of :func:`accuracy_curve`; through the radius of ``threat`` if it has more points than ε = 0.
        interpretation: what the panels measured, by name; numbers that are not finite are left out.
        places: of the images of the checks and of the curve among those that were judged, increasing.

    Raises:
        ValueError: the card would not follow the schema, or contradict itself.
    """
    names = [*class_names, *(str(label) for label in range(len(class_names), int(found.labels.max()) + 1))]
    card = {
        "schema": VERSION,
        "model": {**model, "weights": found.fingerprint["weights"]},
        "data": {**data, "n": found.n, "images": found.fingerprint["images"], "classes": names},
        "threat": {"norm": type(threat).__name__, "eps": float(threat.eps)},
        "suite": {
            "name": found.suite,
            "settings": found.fingerprint["settings"],
            "attacks": [asdict(attack) for attack in found.attacks],
            "forwards": found.forwards,
            "backwards": found.backwards,
            "seconds": found.seconds,
        },
        "accuracy": {
            "clean": found.clean_accuracy,
            "robust": found.accuracy,
            "interval95": list(found.interval),
            "by_class": _by_class(found, names),
            "by_eps": [{"eps": eps, "robust": accuracy} for eps, accuracy in curve],
            "by_corruption": {name: list(values) for name, values in found.corruptions.items()},
        },
        "sanity": {
            "verdict": sanity.verdict,
            "reasons": list(sanity.reasons),
            "images": sanity.images,
            "checks": [asdict(check) for check in sanity.checks],
            **({} if places is None else {"places": list(places)}),
        },
        "interpretation": {name: float(value) for name, value in interpretation.items() if abs(value) < float("inf")},
        "examples": {
            "rows": found.rows.tolist(),
            "labels": found.labels.tolist(),
            "correct": (found.felled != -2).tolist(),
            "standing": found.standing.tolist(),
            "felled_by": list(found.felled_by),
        },
        "seed": seed,
        "versions": dict(versions),
        "commit": commit,
        "notes": list(found.notes),
        "config": dict(config or {}),
    }
    check_card(card)
    return card


def _by_class(found: Evaluation, names: Sequence[str]) -> list[dict[str, Any]]:
    """Accuracy without attack and with, by class that was judged."""
    classes = []
    for label in found.labels.unique().tolist():
        mine = found.labels == label
        shares = (float(kept[mine].float().mean()) for kept in (found.felled != -2, found.standing))
        classes.append({"class": names[label], "n": int(mine.sum())} | dict(zip(("clean", "robust"), shares, strict=True)))
    return classes


def check_card(card: object) -> None:
    """Raises ValueError, naming the place, unless ``card`` follows ``card.schema.json`` and holds together."""
    error = jsonschema.exceptions.best_match(_validator().iter_errors(card))
    if error is not None:
        place = "/".join(map(str, error.absolute_path)) or "the whole"
        raise ValueError(f"card: {place}: {error.message[:200]}")
    assert isinstance(card, Mapping)
    if found := contradictions(card):
        more = f"; and {len(found) - 3} more" * (len(found) > 3)
        raise ValueError(f"card: it contradicts itself: {'; '.join(found[:3])}{more}")


@cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def read_card(path: str | Path) -> dict[str, Any]:
    """A card from its file.

    Raises:
        ValueError: no such file, no JSON, no card, or one whose numbers do not follow from its own entries; names the file.
    """
    card = read_object(Path(path), "card", finite=False)  # check_card names the entry
    try:
        check_card(card)
    except ValueError as error:
        raise ValueError(f"{error} ({path})") from error
    return card


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Why the accuracies of two cards do not compare; empty where they do."""
    return [
        f"{name} {_brief(a[room][key])} and {_brief(b[room][key])}"
        for (room, key), name in MUST_AGREE.items()
        if key in a[room] and key in b[room] and a[room][key] != b[room][key]  # older cards have no classes
    ]


def _brief(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
