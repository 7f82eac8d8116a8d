"""What a result card says twice: every number that follows from its other entries is computed anew (ours).

A card is believed by whoever reads it; one whose numbers do not follow from its own images says nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Final, NamedTuple

from glassarmor.defenses.evaluation.fingerprint import settings_hash
from glassarmor.defenses.evaluation.sampling import wilson
from glassarmor.defenses.evaluation.sanity import (
    LIMITS,
    SAME,
    Check,
    SanityReport,
    finite_check,
    guess_check,
    share_check,
)
from glassarmor.defenses.evaluation.sanity import (
    ROUNDED as ROUNDINGS,
)
from glassarmor.defenses.threat import L2, Linf, Threat, parse_eps

THREATS: Final[Mapping[str, type[Threat]]] = {"Linf": Linf, "L2": L2}
# Checks without which nobody's number was ever called trusted.
ALWAYS: Final = frozenset(
    {
        "outputs are logits",
        "deterministic",
        "independent of the batch",
        "no autograd inside forward",
        "full precision inside",
    }
    | {"gradients are not zero", "gradient is the slope", "outputs do not jump", "PGD ≥ FGSM", "enough steps"}
    | {"enough restarts", "losses agree", "scale of the logits", "success grows with ε", "nothing withstands a large ε"}
    | {"gradients beat noise", "gradients beat Square", "suite against the checks"}
)
ASKED: Final = frozenset({"checkpoint", "suite", "split", "seed", "batch"})  # keys by which evaluate.py's config is known
SCALES: Final = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0)  # radii of a curve over that of the threat
CLOSE: Final = 2e-6  # shares are written in fp32
ROUNDED: Final = 1e-5  # a config keeps six digits


class Claim(NamedTuple):
    """An entry of a card, what it says, what follows for it, and from what."""

    place: str
    said: Any
    follows: Any
    source: str


def contradictions(card: Mapping[str, Any]) -> list[str]:
    """Where a card that follows the schema contradicts itself, a sentence each; empty for one that holds together."""
    for claims in (_finite(card), _lengths(card), _examples(card)):
        if found := _broken(claims):
            return found  # what follows is computed from these
    rest = (_accuracy(card), _classes(card), _curve(card), _attacks(card), _ball(card), _sanity(card), _asked(card))
    return [sentence for claims in rest for sentence in _broken(claims)]


def _broken(claims: Iterator[Claim]) -> list[str]:
    return [
        f"{c.place} is {_told(c.said)}, but {c.source} gives {_told(c.follows)}"
        for c in claims
        if not _same(c.said, c.follows)
    ]


def _same(said: Any, follows: Any) -> bool:
    if isinstance(said, list) and isinstance(follows, list):
        return len(said) == len(follows) and all(map(_same, said, follows))
    if isinstance(said, int | float) and isinstance(follows, int | float):
        return math.isclose(said, follows, rel_tol=CLOSE, abs_tol=CLOSE)
    return bool(said == follows)


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str([_told(each) if isinstance(each, float) else each for each in value] if isinstance(value, list) else value)
    return text if len(text) <= 120 else f"{text[:120]}…"


def _finite(value: Any, place: str = "") -> Iterator[Claim]:
    """JSON has no NaN and no infinity; Python reads both."""
    if isinstance(value, float) and not math.isfinite(value):
        yield Claim(place, value, "a finite number", "JSON")
    entries = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from _finite(inner, f"{place}/{key}" if place else str(key))


def _lengths(card: Mapping[str, Any]) -> Iterator[Claim]:
    for key, values in card["examples"].items():
        if isinstance(values, list):
            yield Claim(f"examples/{key}", f"{len(values)} entries", f"{card['data']['n']} entries", "data/n")
    names = [attack["name"] for attack in card["suite"]["attacks"]]
    yield Claim("suite/attacks", names, list(dict.fromkeys(n for n in names if n != "clean")), "one name an attack")


def _examples(card: Mapping[str, Any]) -> Iterator[Claim]:
    """Image by image: which are judged, and whether what became of each is one story."""
    of = card["examples"]
    yield Claim("examples/rows", of["rows"], sorted(set(of["rows"])), "every image once, in order,")
    known = {attack["name"] for attack in card["suite"]["attacks"]}
    for i, (correct, standing, by) in enumerate(zip(of["correct"], of["standing"], of["felled_by"], strict=True)):
        fell = by if by in known else "an attack of suite/attacks"
        follows = None if standing else fell if correct else "clean"
        if by != follows or (standing and not correct):
            said = f"correct={correct}, standing={standing}, felled_by={by}"
            yield Claim(
                f"examples/felled_by/{i}", said, f"felled_by={follows}" if correct else "standing=False", "the image"
            )
    split = card["data"].get("fingerprint")
    if split is not None and of["rows"]:
        yield Claim("examples/rows", max(of["rows"]) < split["n"], True, "images of the split")


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def _accuracy(card: Mapping[str, Any]) -> Iterator[Claim]:
    of, accuracy = card["examples"], card["accuracy"]
    yield Claim("accuracy/clean", accuracy["clean"], _share(of["correct"]), "examples/correct")
    yield Claim("accuracy/robust", accuracy["robust"], _share(of["standing"]), "examples/standing")
    interval = list(wilson(sum(of["standing"]), len(of["standing"])))
    yield Claim("accuracy/interval95", accuracy["interval95"], interval, "examples/standing")
    for name, values in accuracy["by_corruption"].items():
        yield Claim(f"accuracy/by_corruption/{name}", len(values), 5, "a value a severity")
        yield from _of_images(f"accuracy/by_corruption/{name}", values, (card["data"]["n"],))


def _of_images(place: str, shares: Sequence[float], counts: Sequence[int]) -> Iterator[Claim]:
    """Shares of so many images are whole numbers of them."""
    for share in shares:
        near = [round(share * count) / count for count in counts]
        if not any(abs(share - each) < CLOSE for each in near):
            yield Claim(place, share, near[0], f"a whole number of {counts[0]} images")


def _classes(card: Mapping[str, Any]) -> Iterator[Claim]:
    of, rows, names = card["examples"], card["accuracy"]["by_class"], card["data"].get("classes")
    labels = sorted(set(of["labels"]))
    yield Claim("accuracy/by_class", f"{len(rows)} classes", f"{len(labels)} classes", "examples/labels")
    if names is not None:
        yield Claim("examples/labels", labels[-1] < len(names), True, "an index of data/classes")
    for row, label in zip(rows, labels, strict=False):
        mine = [i for i, each in enumerate(of["labels"]) if each == label]
        place = f"accuracy/by_class/{row['class']}"
        yield Claim(f"{place}/n", row["n"], len(mine), "examples/labels")
        yield Claim(f"{place}/clean", row["clean"], _share([of["correct"][i] for i in mine]), "examples/correct")
        yield Claim(f"{place}/robust", row["robust"], _share([of["standing"][i] for i in mine]), "examples/standing")
        if names is not None and label < len(names):
            yield Claim(place, row["class"], names[label], "data/classes")


def _curve(card: Mapping[str, Any]) -> Iterator[Claim]:
    """Accuracy against ε starts at 0 with the clean accuracy of the images of the checks, passes the claim's ε, falls."""
    radii, shares = ([point[key] for point in card["accuracy"]["by_eps"]] for key in ("eps", "robust"))
    n, some, correct = card["data"]["n"], card["sanity"]["images"], card["examples"]["correct"]
    yield Claim("accuracy/by_eps", radii, sorted([0.0, *radii[1:]]), "radii that rise from 0")  # to 1, where balls end
    yield Claim("accuracy/by_eps", shares, sorted(shares, reverse=True), "a curve that never rises")
    if len(radii) > 1 and not any(math.isclose(eps, card["threat"]["eps"], rel_tol=CLOSE) for eps in radii):
        yield Claim("accuracy/by_eps", radii, "a point at it", f"threat/eps = {card['threat']['eps']:.5g}")
    if card["config"].keys() >= ASKED and len(radii) > 1 and card["threat"]["norm"] in THREATS:
        ball = THREATS[card["threat"]["norm"]](card["threat"]["eps"])
        follows = [0.0, *(float(ball.scaled(scale).eps) for scale in SCALES)]
        yield Claim("accuracy/by_eps", radii, follows, "threat/eps")
    yield from _of_images("accuracy/by_eps", shares, [count for count in dict.fromkeys((some, n)) if count])
    places = card["sanity"].get("places", [*range(n)] if some == n else None)
    if places is not None and shares and all(place < n for place in places):
        clean = _share([correct[i] for i in places]) if places else 0.0
        yield Claim("accuracy/by_eps/0", shares[0], clean, "examples/correct")


def _attacks(card: Mapping[str, Any]) -> Iterator[Claim]:
    """Each attack meets what the one before it left."""
    suite, of = card["suite"], card["examples"]
    fell, stood = Counter(of["felled_by"]), sum(of["correct"])
    for attack in suite["attacks"]:
        place, felled = f"suite/attacks/{attack['name']}", fell[attack["name"]]
        yield Claim(f"{place}/attacked", attack["attacked"], stood, "examples/felled_by")
        yield Claim(f"{place}/felled", attack["felled"], felled, "examples/felled_by")
        stood -= felled
        yield Claim(f"{place}/accuracy", attack["accuracy"], stood / len(of["rows"]), "examples/felled_by")
        if attack["attacked"] == 0:
            yield Claim(f"{place}/forwards", attack["forwards"], 0, "no image to attack")
    for key in ("forwards", "backwards", "seconds"):
        yield Claim(f"suite/{key}", suite[key], sum(attack[key] for attack in suite["attacks"]), "suite/attacks")


def _ball(card: Mapping[str, Any]) -> Iterator[Claim]:
    """The threat is that of every attack that names one, and the settings are those of the hash."""
    threat, suite = card["threat"], card["suite"]
    for attack in suite["attacks"]:
        place = f"suite/attacks/{attack['name']}/settings"
        ball = attack["settings"].get("threat")
        if isinstance(ball, Mapping) and {"class", "eps"} <= ball.keys():
            yield Claim("threat/norm", threat["norm"], ball["class"], f"{place}/threat")
            yield Claim("threat/eps", threat["eps"], ball["eps"], f"{place}/threat")
        if "name" in attack["settings"]:
            yield Claim(f"suite/attacks/{attack['name']}", attack["name"], attack["settings"]["name"], f"{place}/name")
    config = card["config"]
    if config.keys() >= ASKED and threat["norm"] in THREATS:
        ball = repr(THREATS[threat["norm"]](threat["eps"]))
        settings = [attack["settings"] for attack in suite["attacks"]]
        follows = settings_hash(settings, ball, threat["eps"], config["batch"])
        yield Claim("suite/settings", suite["settings"], follows, "threat/eps, suite/attacks/…/settings and config/batch")


def _sanity(card: Mapping[str, Any]) -> Iterator[Claim]:
    of, n = card["sanity"], card["data"]["n"]
    known = {each.name for each in fields(Check)}
    report = SanityReport(tuple(Check(**{k: v for k, v in check.items() if k in known}) for check in of["checks"]))
    yield Claim("sanity/verdict", of["verdict"], report.verdict, "sanity/checks")
    yield Claim("sanity/reasons", of["reasons"], list(report.reasons), "sanity/checks")
    yield Claim("sanity/images", of["images"], min(of["images"], n), "data/n")
    if "places" in of:
        yield Claim("sanity/images", of["images"], len(of["places"]), "sanity/places")
        yield Claim("sanity/places", of["places"], sorted({p for p in of["places"] if p < n}), "places of the judged images")
    unit = sum(check["figure"] for check in of["checks"] if check["name"] == "full precision inside")
    for check in of["checks"]:
        yield from _counted(check)
        yield from _measured(check, unit)


def _counted(check: Mapping[str, Any]) -> Iterator[Claim]:
    """Of a check that counts images, its sentence says how many; figure and outcome follow, by the limits of that check."""
    place = f"sanity/checks/{check['name']}"
    count = re.match(r"(\d+) of (\d+) images", check["sentence"])
    if check["name"] not in LIMITS or count is None or not 0 < int(count[2]) >= int(count[1]):
        return
    some, n = int(count[1]), int(count[2])
    follows = share_check(check["name"], some, n, "")
    yield Claim(f"{place}/figure", check["figure"], follows.figure, "its sentence")
    yield Claim(f"{place}/expected", check["expected"], follows.expected, "the limit of that check")
    yield Claim(f"{place}/passed", check["passed"], follows.passed, "its sentence")
    # Of a slope that is missed, those that are missed by much make it grave, and are not told.
    if check["name"] != "gradient is the slope" or not follows.grave:
        yield Claim(f"{place}/grave", check["grave"], follows.grave, "its sentence")


def _measured(check: Mapping[str, Any], unit: float) -> Iterator[Claim]:
    """Of a check that compares passes or counts calls, its sentence tells the figure, and the outcome follows.

    unit: the rounding inside the net, which the checks of passes allow for.
    """
    place, figure, said = f"sanity/checks/{check['name']}", check["figure"], check["sentence"]
    if check["name"] in ("deterministic", "independent of the batch"):
        told = re.search(r"differ by (\S+) standard deviations", said)
        yield Claim(f"{place}/sentence", told[1] if told else said, f"{figure:.2g}", f"{place}/figure")
        passed = figure <= SAME + ROUNDINGS * unit
        yield Claim(f"{place}/passed", check["passed"], passed, f"{place}/figure")
        yield Claim(f"{place}/grave", check["grave"], not passed, f"{place}/figure")
    elif check["name"] in ("full precision inside", "no autograd inside forward"):
        yield Claim(f"{place}/passed", check["passed"], figure == 0, f"{place}/figure")
        words = "none" if "rounds to no half" in said or "calls nothing" in said else "some"
        yield Claim(f"{place}/sentence", words, "some" if figure else "none", f"{place}/figure")
    elif check["name"] == "better than guessing":
        yield from _guessing(check)
    elif check["name"] == "logits are finite":
        follows = finite_check(round(figure), int(of[1]) if (of := re.search(r" of (\d+) images", said)) else 1)
        for key in ("passed", "sentence", "grave"):
            yield Claim(f"{place}/{key}", check[key], getattr(follows, key), f"{place}/figure")


def _guessing(check: Mapping[str, Any]) -> Iterator[Claim]:
    """Of the check for guessing, the sentence tells the figure (in cards of before only where it failed)."""
    place, figure, said = f"sanity/checks/{check['name']}", check["figure"], check["sentence"]
    right, n = (int(count[1]), int(count[2])) if (count := re.match(r"(\d+) of (\d+) images", said)) else (0, 0)
    follows = guess_check(figure, right, n, 1 if "one and the same answer" in said else 2)
    if said != follows.sentence.partition(";")[0]:
        yield Claim(f"{place}/sentence", said, follows.sentence, f"{place}/figure")
    for key in ("passed", "expected", "grave"):
        yield Claim(f"{place}/{key}", check[key], getattr(follows, key), f"{place}/figure")


def _asked(card: Mapping[str, Any]) -> Iterator[Claim]:
    """What evaluate.py was asked for is what the card is about; another config is its author's business."""
    config, data = card["config"], card["data"]
    if not config.keys() >= ASKED:
        return
    yield Claim("seed", card["seed"], config["seed"], "config/seed")
    held = {check["name"] for check in card["sanity"]["checks"]}
    missing = sorted(ALWAYS - held) if card["sanity"]["verdict"] == "trusted" else []
    yield Claim("sanity/checks that were left out", missing, [], "sanity/verdict")
    yield Claim("data/split", data["split"], config["split"], "config/split")
    yield Claim("suite/name", card["suite"]["name"], config["suite"], "config/suite")
    if isinstance(config.get("images"), int):
        yield Claim("data/n", data["n"], config["images"], "config/images")
    if isinstance(source := config.get("data"), Mapping):
        yield Claim("data/name", data["name"], str(source.get("_target_", "")).rpartition(".")[2], "config/data")
    if isinstance(threat := config.get("threat"), Mapping) and "eps" in threat:
        eps, given = card["threat"]["eps"], parse_eps(threat["eps"])
        yield Claim(
            "threat/norm", card["threat"]["norm"], str(threat.get("_target_", "")).rpartition(".")[2], "config/threat"
        )
        if not math.isclose(eps, given, rel_tol=ROUNDED):
            yield Claim("threat/eps", eps, given, "config/threat")
