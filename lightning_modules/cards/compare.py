"""Result cards beside each other: the same images, the same threat, image by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.stats import binomtest

from glassarmor.defenses.evaluation.card import VERSION, differences, read_card
from glassarmor.interpret.statistics import holm
from glassarmor.interpret.views.charts import Bars, Lines, Table
from glassarmor.interpret.views.draw.figures import charts_figure
from glassarmor.interpret.views.view import View

Card = Mapping[str, Any]
LEVEL: Final = 0.05  # p below which two networks differ


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


def paired_images(a: Card, b: Card) -> tuple[int, int, float]:
    """Images that only ``a`` holds, that only ``b`` holds, and McNemar's exact two-sided p that this is chance.

    The images are the unit: the p speaks of these two networks, not of the methods that trained them.
    """
    first, second = (np.array(card["examples"]["standing"]) for card in (a, b))
    only_a, only_b = int((first & ~second).sum()), int((second & ~first).sum())
    return only_a, only_b, float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def trusted_cards(cards: Mapping[str, Card]) -> dict[str, Card]:
    """Those whose number can be believed: only they are ranked."""
    return {name: card for name, card in cards.items() if card["sanity"]["verdict"] == "trusted"}


def cards_tables(cards: Mapping[str, Card]) -> list[Table]:
    """A row a card: the trusted, with differences to the first of them; and, apart, those that are not, and why."""
    trusted = trusted_cards(cards)
    tables = [trusted_table(trusted)] if trusted else []
    doubted: list[tuple[str | float | int, ...]] = []
    for name, card in cards.items():
        if name not in trusted:
            shares = (round(100 * card["accuracy"][kind], 2) for kind in ("clean", "robust"))
            doubted.append((name, card["sanity"]["verdict"], "; ".join(card["sanity"]["reasons"]), *shares))
    columns = ("network", "verdict", "why", "clean (%)", "robust as found (%)")
    return [*tables, Table("Not ranked: their sanity checks failed", columns, doubted, open=True)] if doubted else tables


def trusted_table(cards: Mapping[str, Card]) -> Table:
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
                *(("–", "–", "–") if card is first else (str(won), str(lost), told_p(p))),
            )
        )
    shown = (
        f"{first['threat']['norm']} ε = {first['threat']['eps']:.5g}, {first['suite']['name']}, {first['data']['n']} images"
    )
    columns = ("network", "clean (%)", "robust (%)", "95 % interval", "images won", "lost", "p")
    return Table(f"Result cards, {shown}", columns, rows, open=True)


def told_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def level_with_the_best(cards: Mapping[str, Card]) -> dict[str, float]:
    """The card of highest robust accuracy, and those that these images do not tell from it: names and p (1 for the first).

    p is McNemar's, corrected by Holm over all pairs, for which of them is highest was not known beforehand.
    """
    names = sorted(cards, key=lambda name: -cards[name]["accuracy"]["robust"])
    pairs = list(combinations(names, 2))
    adjusted = dict(zip(pairs, holm([paired_images(cards[a], cards[b])[2] for a, b in pairs]), strict=True))
    against = {name: adjusted[names[0], name] for name in names[1:]}
    return {names[0]: 1.0} | {name: p for name, p in against.items() if p >= LEVEL}


def headline(cards: Mapping[str, Card]) -> str:
    """Which network withstands most, where these images tell; which cards are not to be believed."""
    trusted = trusted_cards(cards)
    robust = {name: f"{name} ({100 * card['accuracy']['robust']:.1f} %)" for name, card in cards.items()}
    doubted = [f"{robust[name]}: {card['sanity']['verdict']}" for name, card in cards.items() if name not in trusted]
    apart = f" Not ranked, because not to be believed yet: {'; '.join(doubted)}." if doubted else ""
    if not trusted:
        return f"No card is trusted, so that nothing is ranked.{apart}"
    if len(trusted) == 1:
        return f"Only {robust[next(iter(trusted))]} is trusted.{apart}"
    level = level_with_the_best(trusted)
    below = sorted(trusted.keys() - level, key=lambda name: -trusted[name]["accuracy"]["robust"])
    behind = ", ".join(robust[name] for name in below)
    if len(level) == 1:
        text = f"{robust[next(iter(level))]} withstands most; behind it {behind}"
    else:
        text = f"No network withstands most: these images do not tell {', '.join(robust[name] for name in level)} apart "
        text += f"(p ≥ {min(p for p in level.values()):.2f})" + (f"; behind them {behind}" if below else "")
    return f"{text}.{apart}"


def cards_view(cards: Mapping[str, Card]) -> View:
    """Tables, accuracy against ε and by class, of all cards."""
    trusted = trusted_cards(cards)
    named = {name if name in trusted else f"{name} ({card['sanity']['verdict']})": card for name, card in cards.items()}
    eps = sorted({point["eps"] for card in cards.values() for point in card["accuracy"]["by_eps"]})

    def along(card: Card) -> tuple[float, ...]:
        known = {point["eps"]: point["robust"] for point in card["accuracy"]["by_eps"]}
        return tuple(known.get(e, float("nan")) for e in eps)

    lines = Lines("Accuracy against ε", tuple(eps), "ε", tuple(named), tuple(along(card) for card in named.values()), "%")
    bars = [
        Bars(
            f"Robust accuracy by class: {name}",
            tuple(row["class"] for row in card["accuracy"]["by_class"]),
            tuple(row["robust"] for row in card["accuracy"]["by_class"]),
            "%",
        )
        for name, card in named.items()
    ]
    title = headline(cards)
    return View(
        "cards",
        "Result cards",
        title,
        (*cards_tables(cards), lines, *bars),
        drawing=charts_figure([lines, *bars[:5]], title, columns=2),
        how_to_read="Images won and lost are those that this network holds and the first does not, and the reverse; p is "
        "McNemar's exact test over the images, about these networks and not about the methods that trained them. One "
        f"network withstands most only if it differs from every other with p < {LEVEL} (Holm over all pairs).",
    )
