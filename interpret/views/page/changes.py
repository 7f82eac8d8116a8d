"""What changed between two epochs, in a sentence: the overview's answer to one of its questions (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

WATCHED: Final = (  # key of the scalars, what it is, unit; those that an epoch has are told, in this order
    ("val/robust_acc", "robust accuracy, held out", "%"),
    ("val/clean_acc", "clean accuracy, held out", "%"),
    ("profiles/turned", "probe images that turn", "%"),
    ("pse/promotion", "promotion of the target", "logits"),
    ("pse/suppression", "suppression of the true class", "logits"),
)
TURNING: Final = "profiles/turning/"


def changes(before: Mapping[str, float], now: Mapping[str, float]) -> str:
    """'robust accuracy, held out 15.3 → 73.6 %; …' of what both epochs measured; "" if that is nothing.

    A number that does not change within what is shown is told as unchanged.
    """
    told = []
    for key, name, unit in WATCHED:
        if _known(before, key) and _known(now, key):
            a, b = (_shown(scalars[key], unit) for scalars in (before, now))
            told.append(f"{name} {b} {unit} as before" if a == b else f"{name} {a} → {b} {unit}")
    first, last = _turns_at(before), _turns_at(now)
    if first and last:
        told.append(f"images turn most often at {last}, " + ("as before" if first == last else f"no longer at {first}"))
    return "; ".join(told)


def _known(scalars: Mapping[str, float], key: str) -> bool:
    return key in scalars and scalars[key] == scalars[key]  # NaN: nothing was measured


def _shown(value: float, unit: str) -> str:
    return f"{100 * value + 1e-9:.1f}" if unit == "%" else f"{value:.2f}".replace("-", "−")


def _turns_at(scalars: Mapping[str, float]) -> str:
    """The layer at which most examples turn; "" where none does, or several hold as many."""
    shares = {key.removeprefix(TURNING): value for key, value in scalars.items() if key.startswith(TURNING)}
    most = max(shares.values(), default=0.0)
    holding = [layer for layer, share in shares.items() if share == most]
    return holding[0] if most > 0 and len(holding) == 1 else ""
