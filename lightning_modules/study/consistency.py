"""What runs leave behind, read with suspicion: a file that is no JSON, and numbers that do not follow from each other."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, get_args

import numpy as np

from glassarmor.defenses.evaluation.sanity import Verdict
from glassarmor.defenses.threat import L2, Linf

if TYPE_CHECKING:
    from glassarmor.lightning_modules.study.records import Accuracies, RunRecord

ROUNDED: Final = 1e-6  # six digits are kept
MEMBER: Final = re.compile(r"_s(\d+)_([0-9a-f]{12})")  # how the name of a study's member ends


def unpack(text: str) -> np.ndarray:
    """Bits from "N:hexadecimal", (N,) bool.

    Raises:
        ValueError: another number of bits than N, which numpy would fill up with zeros.
    """
    count, _, digits = text.partition(":")
    packed = np.frombuffer(bytes.fromhex(digits), np.uint8)
    bits = np.unpackbits(packed)
    n = int(count)
    if n < 1 or len(packed) != math.ceil(n / 8) or bits[n:].any():
        raise ValueError(f"expected {n} bits, one an image, found {len(digits)} digits ({text[:40]})")
    return bits[:n].astype(bool)


def check_evaluations(found: Mapping[str, Accuracies]) -> None:
    """Raises ValueError where an accuracy is none, or not that of its images; says which network and attack."""
    images: dict[str, tuple[int, str]] = {}
    for network, row in found.items():
        for attack, share in row.accuracy.items():
            _in_unit(f"{network}: the accuracy under {attack}", share)
        if odd := row.correct.keys() - row.accuracy.keys():
            raise ValueError(f"{network}: no accuracy under {', '.join(sorted(odd))}, whose images are there")
        for attack, right in row.correct.items():
            share = float(np.mean(right))
            if abs(share - row.accuracy[attack]) > ROUNDED:
                said = f"{row.accuracy[attack]:.4f} under {attack}, its images {share:.4f}"
                raise ValueError(f"{network}: the accuracy says {said}")
            n, first = images.setdefault(attack, (len(right), network))
            if n != len(right):
                raise ValueError(f"{network}: {len(right)} images under {attack}, {first}: {n}")


def _in_unit(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{what}: expected a number in [0,1], found {value!r}")


def check_run(card: RunRecord) -> None:
    """Raises ValueError, naming the entry, for a card that contradicts itself."""
    check_evaluations(card.evaluations)
    for place, said, follows in _claims(card):
        if said != follows:
            raise ValueError(f"{place} is {said!r}, but the card's other entries give {follows!r}")
    for key, value in card.selected.items():
        if key.endswith("_acc"):
            _in_unit(f"selected/{key}", value)
    for room in ("selected", "cost"):
        for key, value in getattr(card, room).items():
            if not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"{room}/{key}: expected a number >= 0, found {value!r}")
    epoch, epochs = card.selected.get("epoch", 0), card.settled.get("trainer.max_epochs")
    if epoch != int(epoch) or (isinstance(epochs, int) and 0 < epochs <= epoch):
        raise ValueError(f"selected/epoch: expected one of {epochs} epochs, from 0, found {epoch}")
    for key, value in card.measured.items():
        if not isinstance(value, int | float) or math.isinf(value):
            raise ValueError(f"measured/{key}: expected a number, found {value!r}")


def _claims(card: RunRecord) -> Iterator[tuple[str, Any, Any]]:
    """Entries that other entries give."""
    if type(card.seed) is not int or card.seed < 0:
        yield "seed", card.seed, "a whole number >= 0"
    if member := MEMBER.search(card.name):
        yield "seed", card.seed, int(member[1])
        yield "config", card.config, member[2]
    for override in card.about.get("overrides", ()):
        if str(override).startswith("seed="):
            yield "seed", str(card.seed), str(override).partition("=")[2]
    if not card.evaluations and not card.failure:
        yield "failure", card.failure, "why there are no evaluations"
    suites, verdicts = card.settled.get("suites", {}), card.about.get("verdicts", {})
    for suite, verdict in verdicts.items():
        yield f"about/verdicts/{suite}", verdict, verdict if verdict in get_args(Verdict) else get_args(Verdict)
        yield f"about/verdicts/{suite}", suite, suite if suite in suites else ", ".join(suites) or "no suite"
    judged = {attack for row in card.evaluations.values() for attack in row.accuracy}
    for suite in () if card.failure else suites:
        yield f"evaluations: {suite}", suite if suite in judged else "missing", suite
        yield f"about/verdicts: {suite}", suite if suite in verdicts else "missing", suite


def check_results(results: Mapping[str, Any], metrics: Sequence[Mapping[str, float]], config: Mapping[str, Any]) -> None:
    """Raises ValueError where ``results.json`` says another threat than the config, or another best epoch than the metrics.

    Results of before said neither how the best epoch was chosen nor its held-out accuracy.
    """
    threat = config.get("threat") or {}
    norm = {"glassarmor.defenses.Linf": Linf, "glassarmor.defenses.L2": L2}.get(str(threat.get("_target_")))
    said = str(results.get("threat", ""))
    if norm is not None and re.fullmatch(r"\w+\(eps=.*\)", said) and said != str(norm(threat["eps"])):
        raise ValueError(f"results.json: threat is {said!r}, config.yaml has {norm(threat['eps'])}")
    if "best_epoch" not in results or not metrics:
        return
    row = next((row for row in metrics if row["epoch"] == results["best_epoch"]), None)
    if row is None:
        raise ValueError(f"results.json: best_epoch is {results['best_epoch']!r}, which metrics.csv does not have")
    if not str(results.get("selection", "")).startswith(f"epoch {row['epoch']:.0f}:"):
        raise ValueError(f"results.json: best_epoch is {results['best_epoch']}, selection says {results.get('selection')!r}")
    held, kept = row.get("val/robust_acc"), results.get("held_out_robust")
    if held is not None and kept is not None and abs(held - float(kept)) > ROUNDED:
        raise ValueError(f"results.json: held_out_robust is {kept}, metrics.csv has {held} in epoch {row['epoch']:.0f}")


def check_metrics(rows: list[dict[str, float]]) -> None:
    """Raises ValueError where the epochs of ``metrics.csv`` do not rise, or an accuracy is none."""
    epochs = [row.get("epoch", math.nan) for row in rows]
    if any(epoch != epoch or epoch != int(epoch) for epoch in epochs) or epochs != sorted(set(epochs)):
        raise ValueError(f"expected epochs that rise, found {epochs[:20]}")
    for row in rows:
        for key in ("val/robust_acc", "val/clean_acc"):
            if key in row and not math.isnan(row[key]):  # of an epoch whose net broke
                _in_unit(f"{key} of epoch {row['epoch']:.0f}", row[key])
