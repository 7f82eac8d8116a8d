"""Runs as cards: what a comparison needs to know of one run, small enough to be committed.

A card is read from a run folder, or from the JSON that an earlier comparison wrote.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import Tensor

from glassarmor.interpret.storage import plain, read_lines, read_numbers, read_object, write_atomic
from glassarmor.lightning_modules.run.changes import CHANGED, changes, flat
from glassarmor.lightning_modules.run.data_record import data_changes, recorded
from glassarmor.lightning_modules.run.saved_config import read_yaml
from glassarmor.lightning_modules.run.targets import canonical
from glassarmor.lightning_modules.study.consistency import check_evaluations, check_metrics, check_results, check_run, unpack

ARCHIVE: Final = "runs.jsonl"
CHANGE: Final = {"key", "from", "to", "step", "epoch"}  # what an entry of ``changed`` says
SAME: Final = {  # key of the config → what it is about; only seeds may differ
    "data": "split",
    "threat": "threat model",
    "budget": "threat model",
    "val_attack": "selection",
    "select": "selection",
    "test_attacks": "evaluation",
    "suites": "evaluation",
    "probe": "dashboard images",
    CHANGED: "changes while it was trained (--any-effort compares all the same)",
}
# What a config without ``select`` stands for (the first), and what it is composed to today: as nothing in training differs,
# a card keeps its hash in both, and what must agree tells them apart.
SELECTED: Final = ({"by": "robust", "within": None}, {"by": None, "within": 1})
EFFORT: Final = ("trainer.max_epochs", "trainer.limit_train_batches", "trainer.limit_val_batches", "trainer.precision")
# They say where things lie, not what is computed.
ELSEWHERE: Final = ("out", "name", "resume", "trust", "debug", "hash_images", "hydra", "wandb")
SHOWN: Final = ("panels", "checkpoint_every", "compare_undefended", "probe.every_n_epochs")  # nothing that is trained
PLACES: Final = ("path", "test_path", "root", "download")  # of the data
# A key at this value, or at null, says what a config without it says.  It is no part of a hash nor of what must agree, so
# that a key that is new leaves the records of before as they are.
NEUTRAL: Final[dict[str, object]] = {}
_ABSENT: Final = object()


@dataclass(frozen=True)
class Accuracies:
    """What a network reached: accuracy in [0,1] by attack and, where it was kept, correctness (N,) bool of each test image.

    Any other judge of a network (a suite, say) plugs in by filling this.
    """

    accuracy: Mapping[str, float]
    correct: Mapping[str, np.ndarray] = field(default_factory=dict)
    finite: bool = True  # else its weights or logits are not, and its accuracies mean nothing
    guesses: bool = False  # no better than guessing, so they mean nothing either


@dataclass(frozen=True)
class RunRecord:
    """One run.  ``settled``: the config's entries that must agree, without seeds and places.

    ``selected``: epoch, clean and robust held-out accuracy of the best epoch; ``measured``: what the dashboards said of the
    first epoch drawn from it on (the last where few are drawn: an earlier one would be of a net that has hardly learnt);
    ``cost``: seconds and cpu_seconds of training, passes over the batch a step, steps an epoch.
    ``failure``: why there are no evaluations, empty where there are.
    """

    name: str
    method: str
    setting: str  # the point of the method's grid, "" for its only
    seed: int
    config: str  # hash of the composed config
    settled: Mapping[str, Any]
    evaluations: Mapping[str, Accuracies]
    selected: Mapping[str, float]
    measured: Mapping[str, float]
    cost: Mapping[str, float]
    about: Mapping[str, Any]  # overrides, commit, versions, machine, hash of the probe images
    failure: str = ""


def write_correct(folder: Path, correct: Mapping[str, Mapping[str, Tensor]]) -> None:
    """``correct.json`` of a run folder: correctness (N,) bool of each test image, by network and attack."""
    packed = {name: {attack: _pack(right.numpy()) for attack, right in row.items()} for name, row in correct.items()}
    write_atomic(folder / "correct.json", json.dumps(packed) + "\n")


def _pack(right: np.ndarray) -> str:
    """Bits as "N:hexadecimal"."""
    return f"{len(right)}:{np.packbits(right.astype(bool)).tobytes().hex()}"


def read_evaluations(folder: Path) -> dict[str, Accuracies]:
    """By network, from ``results.json`` and, where it is there, ``correct.json``; empty for a run that has not finished.

    Raises:
        ValueError: names the file that cannot be read, or whose numbers are not those of the other.
    """
    results, correct = (
        read_object(folder / name, "runs") if (folder / name).is_file() else {} for name in ("results.json", "correct.json")
    )
    broken, guessing = results.get("not_finite", []), results.get("guessing", [])
    try:
        right = {name: {attack: unpack(bits) for attack, bits in row.items()} for name, row in correct.items()}
        found = {
            name: Accuracies(row, right.get(name, {}), name not in broken, name in guessing)
            for name, row in results.items()
            if isinstance(row, dict)
        }
        check_evaluations(found)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"runs: {folder / 'results.json'} and correct.json do not fit: {error}") from error
    return found


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A composed config as it is compared: by public names, without neutral keys and what only says where things lie."""
    kept = {key: value for key, value in canonical(config).items() if key not in ELSEWHERE}
    if kept.get("select") in SELECTED:
        del kept["select"]
    if isinstance(kept.get("data"), Mapping):
        kept["data"] = {key: value for key, value in kept["data"].items() if key not in PLACES}
    changed = [entry for entry in kept.pop(CHANGED, None) or () if _is_trained(entry["key"])]
    told: dict[str, Any] = without_neutral(kept)
    return told | ({CHANGED: changed} if changed else {})


def without_neutral(value: Any, place: str = "") -> Any:
    """Plain values without the keys that say nothing: at null, or as ``NEUTRAL`` has them."""
    if isinstance(value, Mapping):
        inner = {key: without_neutral(one, f"{place}.{key}" if place else str(key)) for key, one in value.items()}
        said = {key: f"{place}.{key}" if place else str(key) for key in inner}
        return {k: one for k, one in inner.items() if one is not None and one != NEUTRAL.get(said[k], _ABSENT)}
    return [without_neutral(one, place) for one in value] if isinstance(value, list) else value


def _is_trained(key: str) -> bool:
    """Whether another value of this key is another training, not another place or picture."""
    elsewhere = key.split(".")[0] in ELSEWHERE or key in {f"data.{place}" for place in PLACES}
    return not elsewhere and not any(key == shown or key.startswith(f"{shown}.") for shown in SHOWN)


def config_hash(config: Mapping[str, Any]) -> str:
    """Of a composed config: the same wherever it runs, another as soon as anything that is computed differs."""
    text = json.dumps(portable(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config that must agree before numbers compare, seeds left out."""
    kept = {key: _without_seeds(value) for key, value in portable(config).items() if key in SAME}
    trainer = config.get("trainer") or {}
    chosen = dict(config.get("select") or SELECTED[0])
    kept.pop("select", None)
    kept |= {"select": without_neutral(chosen)} if chosen != SELECTED[0] else {}
    effort = {key: trainer.get(key.removeprefix("trainer.")) for key in EFFORT}
    return kept | {key: value for key, value in effort.items() if value is not None}


def _without_seeds(value: Any) -> Any:
    """Seeds may differ: runs that differ in nothing else are what means and deviations are made of."""
    if isinstance(value, Mapping):
        return {key: _without_seeds(inner) for key, inner in value.items() if key != "seed"}
    if isinstance(value, list):
        return [_without_seeds(inner) for inner in value]
    return value


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """``metrics.csv``, a row an epoch; empty where there is none.

    Raises:
        ValueError: the file is no table of numbers by rising epoch.
    """
    if not (folder / "metrics.csv").is_file():
        return []
    rows = read_numbers(folder / "metrics.csv", "runs")
    try:
        check_metrics(rows)
    except ValueError as error:
        raise ValueError(f"runs: {folder / 'metrics.csv'}: {error}") from error
    return rows


def record_of(folder: Path, method: str = "", setting: str = "", name: str = "", failure: str = "") -> RunRecord:
    """A run folder as a card.

    Args:
        method, setting: by default what ``run.json`` says was trained, without the seed.
        name: by default that of the folder.
        failure: why it did not finish, where that is known.

    Raises:
        ValueError: no run folder.
    """
    if not (folder / "config.yaml").is_file() or not (folder / "run.json").is_file():
        raise ValueError(f"runs: expected a run folder with config.yaml and run.json, or a card, found none at {folder}")
    config = _config(folder)
    info = read_object(folder / "run.json", "runs")
    if earlier := data_changes(info):
        config[CHANGED] = [*config.get(CHANGED, []), *earlier]
    metrics, evaluations = read_metrics(folder), read_evaluations(folder)
    best = best_row(metrics, folder)
    drawn = [row for row in metrics if any(_is_measure(key) and not key.startswith("health/") for key in row)]
    shown = [row for row in drawn if row["epoch"] >= best.get("epoch", 0)][:1] or drawn[-1:] or [{}]
    selected = ("epoch", "val/robust_acc", "val/clean_acc")
    record = RunRecord(
        name=name or folder.name,
        method=method or str(info.get("what", folder.name)).removesuffix(f"-s{config.get('seed', 0)}"),
        setting=setting,
        seed=int(config.get("seed", 0)),
        config=config_hash(config),
        settled=settled(config),
        evaluations=evaluations,
        selected={key: best[key] for key in selected if key in best},
        measured={key: value for key, value in shown[0].items() if _is_measure(key)},
        cost=read_cost(folder),
        about={
            **{key: info[key] for key in ("commit", "versions", "machine", "probe") if key in info},
            **_data_of(folder),
            **({CHANGED: changes(portable(config))} if CHANGED in portable(config) else {}),
        },
        failure="" if evaluations else failure or "not finished",
    )
    try:
        check_run(record)
        check_results(_results(folder), metrics, canonical(config))
    except ValueError as error:
        raise ValueError(f"runs: {folder} contradicts itself: {error}") from error
    return record


def _results(folder: Path) -> dict[str, Any]:
    """``results.json``; empty for a run that has not finished."""
    return read_object(folder / "results.json", "runs") if (folder / "results.json").is_file() else {}


def training_of(folder: Path) -> dict[str, Any]:
    """Of a run folder: the hash of the config with which it was trained, and what was changed on the way."""
    config = _config(folder)
    if earlier := data_changes(read_object(folder / "run.json", "runs")) if (folder / "run.json").is_file() else []:
        config[CHANGED] = [*config.get(CHANGED, []), *earlier]
    return {"config": config_hash(config), CHANGED: changes(portable(config))}


def _data_of(folder: Path) -> dict[str, Any]:
    """The classes and the splits that a run was about, not where they lay."""
    data = recorded(folder)
    return {} if data is None else {"data": {"classes": data["classes"], "splits": data["splits"]}}


def best_row(metrics: Sequence[Mapping[str, float]], folder: Path) -> Mapping[str, float]:
    """The row of the epoch that ``best.ckpt`` holds.

    As ``results.json`` says; without it, of a run that goes on or is older, the first of the highest held-out robust
    accuracy.  Empty where no epoch was the best.
    """
    results = _results(folder)
    if "guessing" in results:  # says what was chosen, or that nothing was
        return next((row for row in metrics if row["epoch"] == results.get("best_epoch")), {})
    return max(metrics, key=lambda row: row.get("val/robust_acc", -math.inf), default={})


def _is_measure(key: str) -> bool:
    return key not in ("epoch", "step") and not key.startswith(("train/", "val/"))


def read_cost(folder: Path) -> dict[str, float]:
    """Sums of ``cost.json`` (:class:`.Cost`); empty for runs that have none."""
    if not (folder / "cost.json").is_file():
        return {}
    found = read_object(folder / "cost.json", "runs")
    try:
        cost = {key: sum(value) if isinstance(value, list) else value for key, value in found.items()}
        wrong = [key for key, value in cost.items() if isinstance(value, bool) or not 0 <= value < math.inf]
    except TypeError as error:
        raise ValueError(f"runs: {folder / 'cost.json'}: expected numbers ({error})") from error
    if wrong:
        raise ValueError(f"runs: {folder / 'cost.json'}: expected numbers >= 0, found {wrong[0]} = {cost[wrong[0]]}")
    return cost


def write_record(card: RunRecord, path: Path) -> None:
    """As JSON, correctness as packed bits; a few kilobytes."""
    write_atomic(path, json.dumps(_plain(card), indent=1) + "\n")


def _plain(card: RunRecord) -> dict[str, Any]:
    record = asdict(card) | {
        "evaluations": {
            name: {
                "accuracy": dict(found.accuracy),
                "correct": {attack: _pack(right) for attack, right in found.correct.items()},
                "finite": found.finite,
                **({"guesses": True} if found.guesses else {}),
            }
            for name, found in card.evaluations.items()
        }
    }
    # Numbers are rounded to what they mean; what must agree with other runs is not.
    return {**plain(record), "settled": dict(card.settled)}


def read_record(path: Path) -> RunRecord:
    """What :func:`write_record` wrote.

    Raises:
        ValueError: another kind of file, or a card whose numbers do not follow from its own entries; names the file.
    """
    return _record(read_object(path, "runs"), path)


def _record(said: Mapping[str, Any], path: Path) -> RunRecord:
    record = {**said, **{room: canonical(said.get(room, {})) for room in ("settled", "about")}}
    record["settled"] = without_neutral(record["settled"])
    try:
        evaluations = {
            name: Accuracies(
                row["accuracy"],
                {attack: unpack(bits) for attack, bits in row["correct"].items()},
                row.get("finite", True),  # cards of before did not say
                row.get("guesses", False),
            )
            for name, row in record["evaluations"].items()
        }
        card = RunRecord(**{**record, "evaluations": evaluations, "measured": _known(record["measured"])})
        check_run(card)
        return card
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"runs: {path} is no card of a run ({type(error).__name__}: {error})") from error


def _known(measured: Mapping[str, float | None]) -> dict[str, float]:
    """JSON has no NaN: what could not be measured is null there."""
    return {key: math.nan if value is None else value for key, value in measured.items()}


def archive(records: Sequence[RunRecord], path: Path) -> None:
    """All records of a study in one file, a line each."""
    write_atomic(path, "".join(json.dumps(_plain(record), separators=(",", ":")) + "\n" for record in records))


def read_archive(path: Path) -> list[RunRecord]:
    """What :func:`archive` wrote.

    Raises:
        ValueError: as :func:`read_record`; names the file.
    """
    return [_record(said, path) for said in read_lines(path, "runs")]


def read_records(paths: Sequence[Path]) -> list[RunRecord]:
    """Records of run folders, their files (``.json``, ``.jsonl``), and folders of such files.

    Run folders of one name that differ in more than the seed are told apart by the keys in which they differ.

    Raises:
        ValueError: something else, or two runs that differ in nothing, the seed included.
    """
    cards: list[RunRecord] = []
    folders: list[tuple[int, dict[str, Any]]] = []
    for path in paths:
        inside = _files(path) if path.is_dir() and not (path / "config.yaml").exists() else [path]
        if inside and all(one.suffix in (".json", ".jsonl") for one in inside):
            for one in inside:
                cards += read_archive(one) if one.suffix == ".jsonl" else [read_record(one)]
        else:
            folders.append((len(cards), {}))
            cards.append(record_of(path))
            trained = {key: value for key, value in portable(_config(path)).items() if key != "panels"}  # drawn, not trained
            if CHANGED in trained:
                trained[CHANGED] = "; ".join(changes(trained))
            folders[-1][1].update(flat(_without_seeds(trained)))
    for i, config in folders:
        others = [other for j, other in folders if cards[j].method == cards[i].method]
        cards[i] = replace(cards[i], setting=_told_apart(config, others))
    seen: dict[tuple[str, str, int], RunRecord] = {}
    for card in cards:
        other = seen.setdefault((card.method, card.setting, card.seed), card)
        if other is not card:
            raise ValueError(
                f"runs: {other.name} and {card.name} are both {card.method} {card.setting} with seed {card.seed}; expected "
                "one run a seed, so leave one out"
            )
    return cards


def _files(folder: Path) -> list[Path]:
    """The records in a folder: one a file, or the archive of a study."""
    return sorted(folder.glob("*.json")) or [path for path in [folder / ARCHIVE] if path.is_file()]


def _told_apart(config: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """The keys in which a flat config differs from any other, three at most and then a hash of them all."""
    keys = [key for key in config if any(other.get(key) != config[key] for other in others)]
    own = [key for key in keys if not any(key.endswith(f".{other}") for other in keys)]  # no copies by interpolation
    words = [f"{key}={config[key]}" for key in own]
    if len(words) <= 3:
        return ", ".join(words)
    return f"{', '.join(words[:3])}, {len(words) - 3} more, {hashlib.sha256(repr(words).encode()).hexdigest()[:6]}"


def _config(folder: Path) -> dict[str, Any]:
    """What a run was trained with.

    Raises:
        ValueError: no config that runs write; names the file.
    """
    path = folder / "config.yaml"
    found = read_yaml(path, "runs")
    groups = ("data", "trainer", "threat", "defense", "network")
    if not isinstance(found, dict) or not all(isinstance(found.get(name, {}), dict) for name in groups):
        raise ValueError(f"runs: {path} is no config of a run: expected groups of keys such as data, trainer, threat")
    if type(found.get("seed", 0)) is not int or found.get("seed", 0) < 0:
        raise ValueError(f"runs: {path}: seed: expected a whole number >= 0, found {found['seed']!r}")
    changed = found.get(CHANGED) or []
    if not isinstance(changed, list) or not all(isinstance(e, dict) and e.keys() >= CHANGE for e in changed):
        raise ValueError(f"runs: {path}: {CHANGED}: expected entries of {', '.join(sorted(CHANGE))}")
    return found


def check_comparable(cards: Sequence[RunRecord], any_effort: bool = False) -> None:
    """Numbers compare only under one threat model, split, selection, evaluation and training effort.

    Args:
        any_effort: don't ask for equal epochs and steps.

    Raises:
        ValueError: says which two runs differ, in what, and how.
    """
    first = cards[0]
    for card in cards[1:]:
        for key in dict.fromkeys([*first.settled, *card.settled]):
            silent = without_neutral(dict(SELECTED[0])) if key == "select" else None
            mine, theirs = first.settled.get(key, silent), card.settled.get(key, silent)
            if mine == theirs or (any_effort and key in (*EFFORT, CHANGED)):
                continue
            where, one, other = _difference(key, mine, theirs)
            about = SAME.get(key, "training effort (--any-effort compares all the same)")
            raise ValueError(
                f"runs: {first.name} and {card.name} don't compare: {key} differs, the {about}: {where} is {one} and {other}"
            )
    known = [card for card in cards if "data" in card.about]
    for card in known[1:]:
        if card.about["data"]["classes"] != known[0].about["data"]["classes"]:
            raise ValueError(
                f"runs: {known[0].name} and {card.name} don't compare: they are of other classes or another order"
            )
    probes: dict[int, RunRecord] = {}
    for card in cards:
        other = probes.setdefault(card.seed, card)
        if card.about.get("probe") != other.about.get("probe") and "probe" in card.about and "probe" in other.about:
            raise ValueError(
                f"runs: {other.name} and {card.name} don't compare: seed {card.seed} gave them other validation images "
                f"(hashes {other.about['probe']} and {card.about['probe']}), so the data differ"
            )
        one, two = (each.about.get("data", {}).get("splits") for each in (other, card))
        if one and two and (split := next((name for name in one if one[name]["sample"] != two[name]["sample"]), None)):
            raise ValueError(
                f"runs: {other.name} and {card.name} don't compare: seed {card.seed} gave them other {split} images"
            )


def _difference(key: str, mine: Any, theirs: Any) -> tuple[str, Any, Any]:
    """The first inner key in which two values differ."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for inner in dict.fromkeys([*mine, *theirs]):
            if mine.get(inner) != theirs.get(inner):
                return _difference(f"{key}.{inner}", mine.get(inner), theirs.get(inner))
    return key, mine, theirs
