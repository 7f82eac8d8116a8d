"""Result cards beside each other: the same images, the same threat, image by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from defenses.card import VERSION, differences, read_card
from interpret.views.figures import charts_figure, to_array
from interpret.views.view import Bars, Lines, Table, View


def is_result_card(path: Path) -> bool:
    """Whether a file says that it is one; what it holds is checked when it is read."""
    return path.suffix == ".json" and path.is_file() and VERSION in path.read_text(encoding="utf-8")[:200]


def read_result_cards(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Cards by a name each.

    Raises:
        ValueError: fewer than two, no card, or cards that do not compare; says what differs.
    """
    if len(paths) < 2:
        raise ValueError(f"cards: expected at least two, found {len(paths)}")
    cards = [read_card(path) for path in paths]
    for path, card in zip(paths, cards, strict=True):
        differ = differences(cards[0], card)
        if differ:
            raise ValueError(f"cards: {paths[0]} and {path} do not compare: {'; '.join(differ)}")
    names = [card["model"]["name"] for card in cards]
    unique = names if len(set(names)) == len(names) else [path.parent.name or path.stem for path in paths]
    return dict(
        zip((f"{name} ({i})" if unique.count(name) > 1 else name for i, name in enumerate(unique)), cards, strict=True)
    )


def paired_images(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[int, int, float]:
    """Images that only ``a`` holds, that only ``b`` holds, and McNemar's exact two-sided p that this is chance.

    The images are the unit: the p speaks of these two networks, not of the methods that trained them.
    """
    first, second = (np.array(card["examples"]["standing"]) for card in (a, b))
    only_a, only_b = int((first & ~second).sum()), int((second & ~first).sum())
    return only_a, only_b, float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def cards_table(cards: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row a card; differences are to the first."""
    rows: list[tuple[str | float | int, ...]] = []
    first = next(iter(cards.values()))
    for name, card in cards.items():
        accuracy = card["accuracy"]
        low, high = accuracy["interval95"]
        lost, won, p = paired_images(first, card)
        rows.append(
            (
                name,
                round(100 * accuracy["clean"], 2),
                round(100 * accuracy["robust"], 2),
                f"{100 * low:.1f} to {100 * high:.1f}",
                card["sanity"]["verdict"],
                *(("–", "–", "–") if card is first else (won, lost, round(p, 4))),
                card["data"]["selection"],
            )
        )
    shown = (
        f"{first['threat']['norm']} ε = {first['threat']['eps']:.5g}, {first['suite']['name']}, {first['data']['n']} images"
    )
    columns = ("network", "clean (%)", "robust (%)", "95 % interval", "verdict", "images won", "lost", "p", "selection")
    return Table(f"Result cards, {shown}", columns, rows, open=True)


def cards_view(cards: Mapping[str, Mapping[str, Any]]) -> View:
    """Table, accuracy against ε and by class, of all cards."""
    table = cards_table(cards)
    every = list(cards.items())
    eps = sorted({point["eps"] for card in cards.values() for point in card["accuracy"]["by_eps"]})

    def along(card: Mapping[str, Any]) -> tuple[float, ...]:
        known = {point["eps"]: point["robust"] for point in card["accuracy"]["by_eps"]}
        return tuple(known.get(e, float("nan")) for e in eps)

    lines = Lines("Accuracy against ε", tuple(eps), "ε", tuple(cards), tuple(along(card) for card in cards.values()), "%")
    bars = [
        Bars(
            f"Robust accuracy by class: {name}",
            tuple(row["class"] for row in card["accuracy"]["by_class"]),
            tuple(row["robust"] for row in card["accuracy"]["by_class"]),
            "%",
        )
        for name, card in every
    ]
    best = max(every, key=lambda item: item[1]["accuracy"]["robust"])
    doubted = [f"{name} ({card['sanity']['verdict']})" for name, card in every if card["sanity"]["verdict"] != "trusted"]
    title = f"{best[0]} withstands most: {100 * best[1]['accuracy']['robust']:.1f} %"
    title += f"; not to be believed yet: {', '.join(doubted)}." if doubted else "; all verdicts are trusted."
    return View(
        "cards",
        "Result cards",
        title,
        (table, lines, *bars),
        figure=to_array(charts_figure([lines, *bars[:5]], title, columns=2)),
        how_to_read="Images won and lost are those that this network holds and the first does not, and the reverse; p is "
        "McNemar's exact test over the images, about these networks and not about the methods that trained them.",
    )
