"""A result card for people, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glassarmor.interpret.views.draw.text import markdown_text
from glassarmor.interpret.views.summary import summarised


def markdown(card: Mapping[str, Any]) -> str:
    """The card for people; names in it are shown letter by letter."""
    card = _escaped(card)
    accuracy, suite, sanity = card["accuracy"], card["suite"], card["sanity"]
    low, high = accuracy["interval95"]
    lines = [
        f"# Result card: {card['model']['name']}",
        "",
        f"**{100 * accuracy['robust']:.2f} %** robust accuracy against {card['threat']['norm']} "
        f"ε = {card['threat']['eps']:.5g} "
        f"by the {suite['name']} suite (95 % interval {100 * low:.2f} to {100 * high:.2f} %), "
        f"{100 * accuracy['clean']:.2f} % clean, on {card['data']['n']} images of {card['data']['name']} "
        f"({card['data']['split']} split).",
        "",
        "; ".join([f"Verdict of the sanity checks: **{sanity['verdict']}**", *sanity["reasons"]]) + ".",
        "",
    ]
    lines += _rows(
        ("attack", "attacked", "felled", "accuracy after it", "gradients", "seconds"),
        [
            (a["name"], a["attacked"], a["felled"], _percents([a["accuracy"]]), a["backwards"], f"{a['seconds']:.1f}")
            for a in suite["attacks"]
        ],
    )
    lines += _rows(("attack", "settings"), [(a["name"], settings_of(a["settings"])) for a in suite["attacks"]])
    lines += _rows(
        ("class", "images", "clean", "robust"),
        [(c["class"], c["n"], f"{100 * c['clean']:.1f} %", f"{100 * c['robust']:.1f} %") for c in accuracy["by_class"]],
    )
    lines += _rows(("ε", "accuracy"), [(f"{p['eps']:.5g}", f"{100 * p['robust']:.1f} %") for p in accuracy["by_eps"]])
    if accuracy["by_corruption"]:
        shown = accuracy["by_corruption"].items()
        lines += _rows(("corruption", "accuracy, severities 1 to 5"), [(k, _percents(v)) for k, v in shown])
    lines += _rows(
        ("sanity check", "outcome", "expected", "found"),
        [(c["name"], "passed" if c["passed"] else "**failed**", c["expected"], c["sentence"]) for c in sanity["checks"]],
    )
    if card["interpretation"]:
        sentences, tables = summarised(card["interpretation"])
        lines += ["## Why it fails", "", *(f"- {sentence}" for sentence in sentences), ""]
        for head, rows in tables:
            lines += _rows(head, rows)
        lines += ["## About this card", ""]
    lines += [f"- {note}" for note in (*card["notes"], *card["data"].get("differs", ()), *_changes(card))]
    about = {
        "weights": f"{card['model']['weights']} ({card['model']['source']}, {card['model']['parameters']:,} parameters)",
        "images": card["data"]["images"],
        "selection": card["data"]["selection"],
        "seed": card["seed"],
        "commit": card["commit"],
        "versions": ", ".join(f"{name} {version}" for name, version in card["versions"].items()),
    }
    return "\n".join([*lines, *(f"- {key}: {value}" for key, value in about.items()), ""])


def _escaped(value: Any) -> Any:
    """With every text in it, keys too, as Markdown shows it letter by letter."""
    if isinstance(value, Mapping):
        return {_escaped(key): _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(inner) for inner in value]
    return markdown_text(value) if isinstance(value, str) else value


def _changes(card: Mapping[str, Any]) -> list[str]:
    """What was changed while the network was trained."""
    return [f"changed while it was trained: {each}" for each in card["model"].get("training", {}).get("changed", ())]


def settings_of(settings: Mapping[str, Any]) -> str:
    """The settings of an attack in one line: class, then what it was given; the ball, which all share, is left out."""
    settings = dict(settings)
    own = settings.pop("attack", None)
    if isinstance(own, Mapping):  # an attack on another net
        return f"{settings.get('class', '')} of {settings_of(own)}"
    kind = settings.pop("class", "")
    if kind == "AutoAttackPart":
        kind = f"{settings.pop('part', '')} of AutoAttack's standard version"
        if not kind.startswith("square"):
            settings.pop("queries", None)
    if "loss" in settings:
        settings.pop("objective", None)  # of the class that it extends
    words = [f"{_called(key)} {_called(value)}" for key, value in settings.items() if key not in ("name", "threat", "rho")]
    return ", ".join([kind, *words])


def _called(value: object) -> str:
    if isinstance(value, Mapping):
        return str(value.get("class", "…"))
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("_", " ")


def _percents(values: Sequence[float]) -> str:
    return " · ".join(f"{100 * value:.1f}" for value in values) + " %"


def _rows(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    return [line(head), line(["---"] * len(head)), *map(line, rows), ""]
