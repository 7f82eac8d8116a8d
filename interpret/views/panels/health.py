"""Panel: is the defense healthy?  Each reading against the limit above which it is bad news."""

from __future__ import annotations

from collections.abc import Mapping

from glassarmor.interpret.views.charts import Bars, Table, Trend
from glassarmor.interpret.views.rows import percent
from glassarmor.interpret.views.view import Answer, View

LABELS = {
    "gap": "FGSM − strongest PGD accuracy",
    "fall": "fall of PGD accuracy since the last reading",
    "guess": "a lucky guesser's accuracy, as a share of the clean one",
    "one_class": "other classes' images with the commonest answer",
    "zero_gradient": "images without an input gradient",
    "noise_wins": "right under PGD, wrong under noise",
    "margin_gain": "PGD stronger on the margin loss by",
    "step_gain": "PGD stronger with 4 × the steps by",
    "misalignment": "misaligned gradients, 1 − cos",
    "kind_drift": "kinds of units (PSE), FGSM against PGD",
    "turning_drift": "turning layers, FGSM against PGD",
    "dead": "dead units, worst layer",
    "behind": "held-out robust accuracy below its best",
}
ACCURACIES = {
    "clean": "clean",
    "noise": "noise",
    "fgsm": "FGSM",
    "pgd": "PGD",
    "margin": "PGD, margin",
    "longer": "PGD, long",
}

POINTS = ("gap", "fall", "margin_gain", "step_gain", "behind")  # differences of accuracies
FEW = ("zero_gradient", "misalignment", "kind_drift", "turning_drift", "dead")  # read from fewer images
NONE: Mapping[str, int] = {}
SIGNS = ("gap", "misalignment", "kind_drift", "turning_drift", "dead")


def health_view(
    values: Mapping[str, float],
    limits: Mapping[str, float | None],
    verdict: str = "",
    step: int = 0,
    measures: str = "",
    remedy: str = "",
    command: str = "",
    held: Mapping[str, int] = NONE,
    images: tuple[int, int] = (0, 0),
    guesses: bool = False,
) -> View:
    """The panel of one reading.

    Args:
        values: the indicators (``LABELS``), accuracies (``ACCURACIES``) and what else was read, shares in [0,1].
        limits: by indicator; None: not judged.
        verdict: what is wrong, in words; "" where nothing is.
        step: at which was read.
        measures: safety measures in force, in words.
        remedy, command: what to try against it, in words and as a command line; "" where nothing is wrong.
        held: by indicator that this reading did not measure, the step at which it was.
        images: of how many the accuracies are, and of how many gradients and signals; 0: not said.
        guesses: the net is no better than guessing, though that may be no alarm yet.
    """
    shown = [name for name in LABELS if name in values]
    here = f", at {percent(values['eps_share'])} of ε" if "eps_share" in values else ""  # the ball that training has reached
    rows = [
        (
            _label(name, held, images) + (here if name == "gap" else ""),
            _text(name, values[name]),
            *_state(name, values[name], limits.get(name)),
        )
        for name in shown
    ]
    judged = [(name, limit) for name in shown if (limit := limits.get(name)) is not None]
    used = Bars(
        "How much of its limit each reading uses",
        tuple(LABELS[name] for name, _ in judged),
        tuple(max(values[name], 0) / max(limit, 1e-9) for name, limit in judged),
        "%",
        reference=(1.0,) * len(judged),
        reference_label="limit: an alarm beyond",
    )
    readings = Table(f"Readings at step {step}", ("reading", "value", "limit", "verdict"), rows, open=True)
    headline = f"Not healthy: {verdict}." if verdict else f"Healthy: none of {len(judged)} readings is beyond its limit."
    if guesses and not verdict:
        headline = "No better than guessing so far; " + headline[0].lower() + headline[1:]
    if limits.get("noise_wins") is not None and "noise_wins" not in values:
        headline += " Masked gradients were not looked for this time."
    if measures:
        headline += f" Since a rollback: {measures}."
    return View(
        name="health",
        title="Health",
        headline=headline,
        charts=(
            readings,
            *((used,) if judged else ()),
            _trend("Accuracy on the held-out images read", ACCURACIES),
            _trend("Warning signs", {name: LABELS[name] for name in SIGNS}),
        ),
        table=readings,
        scalars={f"health/{name}": value for name, value in values.items() if name not in held},
        answers=(Answer("healthy", f"{headline} To try: {remedy}." if remedy else headline, command),),
        how_to_read="Few held-out images, attacked with one step and with several. A net that withstands FGSM and not "
        "PGD has collapsed (catastrophic overfitting); where noise, another loss or more steps beat PGD by much, its "
        "gradients are masked and its accuracies mean nothing. All accuracies, and what is made of them, are of the same "
        "images. A dashed line with ▼ on a curve marks an alarm.",
    )


def _label(name: str, held: Mapping[str, int], images: tuple[int, int]) -> str:
    """With what sets a number apart from the others of the panel: fewer images, or an earlier reading."""
    few = f", first {images[1]} images" if name in FEW and 0 < images[1] < images[0] else ""
    return LABELS[name] + few + (f", read at step {held[name]}" if name in held else "")


def _trend(title: str, names: Mapping[str, str]) -> Trend:
    return Trend(title, tuple(f"health/{name}" for name in names), tuple(names.values()), "%", limits=(0, 1))


def _text(name: str, value: float) -> str:
    return percent(value).replace("%", "points") if name in POINTS else percent(value)


def _state(name: str, value: float, limit: float | None) -> tuple[str, str]:
    if limit is None:
        return "–", "not judged"
    return _text(name, limit), "⚠ beyond" if value > limit else "✓ within"
