"""Cards are believed: what follows from their own entries is computed anew, and a contradiction is refused by its name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.evaluation.card import accuracy_curve, check_card, make_card, read_card
from glassarmor.defenses.evaluation.robustness import evaluate_robustness
from glassarmor.defenses.evaluation.sampling import stratified_rows
from glassarmor.defenses.evaluation.sanity import Check, SanityReport, guess_check, share_check
from glassarmor.defenses.evaluation.suite import Step, Suite
from glassarmor.defenses.threat import Linf
from glassarmor.lightning_modules.study.members import Member
from glassarmor.lightning_modules.study.records import Accuracies, read_archive, read_record, record_of, write_record
from glassarmor.lightning_modules.study.runner import cards_of, planned

STUDY = Path(__file__).resolve().parents[2] / "docs" / "study"
SUITES = sorted(STUDY.glob("*/suites/*.json"))
# What nothing else in a card says, so that no reader can know better.
FREE = (
    *("model", "data/selection", "data/images", "data/fingerprint", "versions", "commit", "notes", "interpretation"),
    *("sanity/checks/0", "sanity/checks/1/name", "sanity/checks/1/sentence", "schema"),
    *("config/checkpoint", "examples/rows/5", "sanity/checks/2/name"),
    *("data/classes/2", "sanity/places"),  # no image of that class; other images checked
)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).eval()


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    """Of 60 images and two attacks, some of which fell to each, checked on 40 of them."""
    own, threat = net(), Linf("8/255")
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = torch.where(torch.arange(60) % 4 == 0, (own(x).argmax(1) + 1) % 3, own(x).argmax(1)).detach()
    steps = (Step("weak", PGD(threat, 1, step_size=0.004, seed=1), 1), Step("PGD-20", PGD(threat, 20, seed=1), 21))
    found = evaluate_robustness(own, x, y, threat, Suite("own", steps), batch_size=16, corruptions=True, seed=1)
    few = stratified_rows(found.labels, 40, 1)
    checks = (
        Check("losses agree", True, 0.0, "≤ 5 %", "they do"),
        share_check("PGD ≥ FGSM", 8, 40, "fall to FGSM alone"),
        guess_check(2e-9, 30, 40, 3),
    )
    made = make_card(
        found,
        threat,
        model={"name": "net", "source": "by hand", "parameters": 1},
        data={"name": "Noise", "split": "test", "selection": "nothing", "fingerprint": {"n": 60, "sample": "0" * 16}},
        class_names=("a", "b", "c"),
        curve=accuracy_curve(own, x[few], y[few], threat),
        sanity=SanityReport(checks, {}, 40),
        interpretation={"outcome/clean_acc": 0.5},
        seed=1,
        versions={},
        commit="abc",
        config={
            "checkpoint": "net.pt",
            "suite": "own",
            "split": "test",
            "seed": 1,
            "batch": 16,
            "images": 60,
            "threat": {"_target_": "glassarmor.defenses.Linf", "eps": "8/255"},
            "data": {"_target_": "x.Noise"},
        },
        places=few.tolist(),
    )
    assert len({None, "clean", "weak", "PGD-20"} & set(made["examples"]["felled_by"])) == 4
    assert made["sanity"]["verdict"] == "invalid"
    return json.loads(json.dumps(made, allow_nan=False))


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all plain values; of long lists the first, one in the middle, and the last."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*place, key))
    elif isinstance(value, list):
        for i in sorted({0, len(value) // 2, len(value) - 1} if len(value) > 5 else range(len(value))):
            yield from leaves(value[i], (*place, i))
    else:
        yield place


def other(value: Any) -> Any:
    """Another value that the schema allows in its place."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value + 0.0437 if value < 0.9 else value - 0.0437
    words = {"test": "val", "Linf": "L2", "trusted": "invalid", "invalid": "trusted", "suspicious": "trusted"}
    if isinstance(value, str) and set(value) <= set("0123456789abcdef") and len(value) == 16:
        return value[::-1].replace(value[-1], "f", 1) if value[0] != "f" else "0" * 16
    return words.get(value, "weak" if value is None else "other")


def replaced(card: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(card)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed


def unnoticed(card: dict[str, Any], free: tuple[str, ...]) -> list[str]:
    """Entries that can be changed without a word, or are refused under another name."""
    check_card(card)
    found = []
    for place in leaves(card):
        path = "/".join(map(str, place))
        if any(path == each or path.startswith(f"{each}/") for each in free):
            continue
        inner: Any = card
        for key in place:
            inner = inner[key]
        try:
            check_card(replaced(card, place, other(inner)))
            found.append(path)
        except ValueError as error:
            names = [key for key in place if isinstance(key, str)]
            if not any(name in str(error) for name in names[-3:]):
                found.append(f"{path}: {error}")
    return found


def test_whatever_follows_from_other_entries_cannot_be_changed_alone(card: dict[str, Any]) -> None:
    assert unnoticed(card, FREE) == []


def test_the_suites_of_the_studies_hold_together_and_so_do_their_parts() -> None:
    assert len(SUITES) == 13
    for path in SUITES:
        read_card(path)
    old = read_card(SUITES[2])
    free = ("model", "data/selection", "data/images", "versions", "commit", "notes", "interpretation", "config", "schema")
    # Without the data's class names, and what measured no count of images.
    free += ("sanity/checks", "examples/rows", *(f"accuracy/by_class/{i}/class" for i in range(10)))
    free += tuple(f"suite/attacks/{i}/settings" for i in range(4))  # all in one hash, as above
    free += tuple(f"accuracy/by_eps/{i}/eps" for i in range(1, 9) if i != 4)
    assert [p for p in unnoticed(old, free) if not p.startswith("accuracy/by_eps")] == []


EXAMPLES = {  # what was read without a word
    "robust against its own images": (lambda c: c["accuracy"].update(robust=0.99), "accuracy/robust is 0.99, but examples/"),
    "trusted beside a grave check": (
        lambda c: c["sanity"].update(verdict="trusted", reasons=[]),
        "sanity/verdict is trusted",
    ),
    "10,000 images with 60 rows": (lambda c: c["data"].update(n=10_000), "60 entries, but data/n gives 10000 entries"),
    "an image twice": (lambda c: c["examples"]["rows"].__setitem__(3, 2), "examples/rows"),
    "rows that the split lacks": (lambda c: c["examples"]["rows"].__setitem__(-1, 60), "examples/rows"),
    "no attack of that name": (lambda c: c["examples"]["felled_by"].__setitem__(0, "luck"), "examples/felled_by/0"),
    "another radius": (lambda c: c["threat"].update(eps=4 / 255), "threat/eps is 0.0156863"),
    "a curve that rises": (lambda c: c["accuracy"]["by_eps"][2].update(robust=0.975), "accuracy/by_eps"),
    "a curve that leaves ε out": (lambda c: c["accuracy"]["by_eps"].pop(4), "threat/eps"),
    "half an image": (lambda c: c["accuracy"]["by_corruption"]["JPEG"].__setitem__(0, 0.5083), "60 images"),
    "a check that passed but did not": (lambda c: c["sanity"]["checks"][1].update(passed=True), "PGD ≥ FGSM/passed"),
    "a number that is none": (lambda c: c["accuracy"].update(robust=float("nan")), "accuracy/robust"),
    "no end": (lambda c: c["interpretation"].update(x=float("inf")), "interpretation/x"),
    "an attack's settings": (lambda c: c["suite"]["attacks"][1]["settings"].update(steps=1), "suite/settings"),
    "a lucky guesser": (
        lambda c: c["sanity"]["checks"][2].update(figure=1e-3),
        "better than guessing/sentence is 30 of 40 images are classified rightly; 2e-07 % of guessers",
    ),
    "a curve of other radii": (
        lambda c: c["accuracy"]["by_eps"][2].update(eps=0.45 * 8 / 255),
        "accuracy/by_eps is ['0', '0.00784",
    ),
    "another class's name": (lambda c: c["data"].update(classes=["b", "a", "c"]), "accuracy/by_class/a"),
}


@pytest.mark.parametrize(("change", "said"), EXAMPLES.values(), ids=EXAMPLES)
def test_a_contradiction_is_refused_by_name(
    card: dict[str, Any], tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    changed = copy.deepcopy(card)
    change(changed)
    path = tmp_path / "card.json"
    path.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(ValueError, match="card: it contradicts itself") as error:
        read_card(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def edited(name: str, **entries: object) -> Callable[[dict[str, Any]], None]:
    def edit(card: dict[str, Any]) -> None:
        (check,) = [check for check in card["sanity"]["checks"] if check["name"] == name]
        check.update(entries)

    return edit


CHECKED = {
    "an easier limit": (
        edited("nothing withstands a large ε", figure=0.6, expected="≤ 95 %, lower 99 % limit", sentence="60 of 100 images"),
        "nothing withstands a large ε/expected is ≤ 95 %",
    ),
    "a figure that fails": (edited("deterministic", figure=0.5), "deterministic/sentence is 0, but"),
    "a figure and its sentence": (
        edited("deterministic", figure=0.5, sentence="two passes differ by 0.5 standard deviations"),
        "deterministic/passed is True, but",
    ),
    "a sentence alone": (
        edited("independent of the batch", sentence="they differ by 0.5 standard deviations"),
        "independent of the batch/sentence is 0.5",
    ),
    "half floats": (edited("full precision inside", figure=0.004), "full precision inside/passed is True"),
    "calls": (edited("no autograd inside forward", figure=1.0), "no autograd inside forward/passed is True"),
}


@pytest.mark.parametrize(("change", "said"), CHECKED.values(), ids=CHECKED)
def test_a_check_that_failed_cannot_be_made_to_pass(change: Callable[[dict[str, Any]], None], said: str) -> None:
    card = json.loads(SUITES[2].read_text(encoding="utf-8"))
    change(card)
    with pytest.raises(ValueError, match="card: it contradicts itself") as error:
        check_card(card)
    assert said in str(error.value)


def test_json_that_readers_read_in_two_ways_is_refused(card: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text(json.dumps(card).replace('"seed": 1,', '"seed": 1, "commit": "first",', 1), encoding="utf-8")
    with pytest.raises(ValueError, match="two entries of one name"):
        read_card(path)


def test_every_card_of_the_studies_is_read_and_holds_together() -> None:
    records = [record for path in sorted(STUDY.glob("*/runs.jsonl")) for record in read_archive(path)]
    assert len(records) == 319


BEST = ("evaluations", "defended, best epoch")
RUN_EXAMPLES = {
    "accuracy": ((*BEST, "accuracy", "PGD-20"), 0.9, "under PGD-20, its images"),
    "no share": ((*BEST, "accuracy", "clean"), 1.7, "accuracy under clean: expected a number in [0,1], found 1.7"),
    "fewer bits": ((*BEST, "correct", "clean"), "1000:00", "expected 1000 bits, one an image, found 2 digits"),
    "no bits": ((*BEST, "correct", "clean"), "0:", "expected 0 bits"),
    "bits beyond": ((*BEST, "correct", "clean"), "3:ff", "expected 3 bits"),
    "bits of no attack": ((*BEST, "correct", "luck"), "8:ff", "no accuracy under luck"),
    "seed": (("seed",), 1, "seed is 1"),
    "config": (("config",), "0" * 12, "config is '000000000000'"),
    "overrides": (("about", "overrides", -1), "seed=99", "seed is"),
    "verdict": (("about", "verdicts", "fast suite"), "fine", "about/verdicts/fast suite is 'fine'"),
    "a suite that nobody asked for": (("about", "verdicts", "x"), "trusted", "about/verdicts/x is 'x'"),
    "a suite without an accuracy": (("settled", "suites", "x"), ["suite=fast"], "evaluations: x is 'missing'"),
    "nothing found and nothing failed": (("evaluations",), {}, "failure is ''"),
    "an epoch too many": (("selected", "epoch"), 10, "selected/epoch: expected one of 10 epochs, from 0, found 10"),
    "held out": (("selected", "val/robust_acc"), 31.2, "selected/val/robust_acc: expected a number in [0,1]"),
    "cost": (("cost", "seconds"), -1, "cost/seconds: expected a number >= 0"),
    "measure": (("measured", "pse/promotion"), "much", "measured/pse/promotion: expected a number"),
    "no number": (("cost", "seconds"), float("nan"), "expected numbers, found NaN"),
    "another entry": (("surprise",), 1, "surprise"),
}


@pytest.mark.parametrize(("place", "value", "said"), RUN_EXAMPLES.values(), ids=RUN_EXAMPLES)
def test_a_card_of_a_run_that_contradicts_itself_is_refused(tmp_path: Path, place: Any, value: Any, said: str) -> None:
    record = json.loads((STUDY / "confirm" / "runs.jsonl").read_text().splitlines()[0])
    path = tmp_path / "record.json"
    path.write_text(json.dumps(replaced(record, place, value)))
    with pytest.raises(ValueError, match=r"is no") as error:
        read_record(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("results.json", '{"best": {"clean": 0.5, "PGD": 0.75}}', "the accuracy says 0.7500 under PGD, its images 0.5000"),
        ("results.json", '{"best": {"clean": 1.5}}', "expected a number in [0,1], found 1.5"),
        ("results.json", '{"best": {"clean": NaN}}', "results.json is no readable JSON"),
        ("results.json", '{"best": {"cl', "results.json is no readable JSON"),
        ("results.json", "[1]", "results.json: expected a JSON object"),
        ("correct.json", '{"best": {"PGD": "9:c0"}}', "expected 9 bits"),
        ("correct.json", '{"best": 7}', "correct.json do not fit"),
        ("cost.json", '{"seconds": [1, -9]}', "cost.json: expected numbers >= 0, found seconds = -8"),
        ("cost.json", '{"seconds": [1, "x"]}', "cost.json: expected numbers"),
        ("metrics.csv", "epoch,step,val/clean_acc\n0,1,many\n", "metrics.csv is no readable table"),
        (
            "metrics.csv",
            "epoch,step,val/clean_acc\n0,1,7\n",
            "metrics.csv: val/clean_acc of epoch 0: expected a number in [0,1]",
        ),
        ("metrics.csv", "epoch,step,val/clean_acc\n1,1,0.5\n0,1,0.5\n", "metrics.csv: expected epochs that rise"),
        ("run.json", '{"what": "x"', "run.json is no readable JSON"),
    ],
)
def test_what_a_comparison_reads_of_a_run_folder_is_checked(tmp_path: Path, file: str, text: str, said: str) -> None:
    whole = {
        "config.yaml": "seed: 0\n",
        "run.json": '{"what": "x"}',
        "results.json": '{"best": {"clean": 0.5, "PGD": 0.5}}',
        "correct.json": '{"best": {"PGD": "8:f0"}}',
        "cost.json": '{"seconds": [1, 2]}',
        "metrics.csv": "epoch,step,val/clean_acc\n0,1,0.5\n",
    }
    for name, content in whole.items():
        (tmp_path / name).write_text(content)
    assert record_of(tmp_path).cost == {"seconds": 3}
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match="runs: ") as error:
        record_of(tmp_path)
    assert said in str(error.value)
    assert file in str(error.value)


def test_a_card_brought_from_elsewhere_is_that_of_its_member(tmp_path: Path) -> None:
    member = Member("A", "", 1, ("seed=1",), "hash", {})
    card = replace(planned(member), evaluations={"best": Accuracies({"clean": 0.5})}, failure="")
    (tmp_path / "cards").mkdir()
    path = tmp_path / "cards" / f"{member.name}.json"
    write_record(card, path)
    assert cards_of([member], tmp_path) == [card]
    write_record(replace(card, config="other"), path)
    with pytest.raises(ValueError, match="the card of another run: expected config hash and seed 1, found other and 1"):
        cards_of([member], tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("results.json", lambda r: {**r, "threat": "Linf(eps=0.5)"}, "results.json: threat is 'Linf(eps=0.5)'"),
        ("results.json", lambda r: {**r, "best_epoch": 99}, "best_epoch is 99, which metrics.csv does not have"),
        ("results.json", lambda r: {**r, "best_epoch": 0}, "best_epoch is 0, selection says 'epoch 1"),
        (
            "results.json",
            lambda r: {**r, "held_out_robust": 0.99},
            "held_out_robust is 0.99, metrics.csv has 0.5",
        ),
        ("cost.json", lambda r: {**r, "seconds": True}, "cost.json: expected numbers >= 0"),
    ],
)
def test_the_files_of_a_run_folder_are_held_against_each_other(tmp_path: Path, file: str, change: Any, said: str) -> None:
    whole: dict[str, Any] = {
        "results.json": {
            "threat": "Linf(eps=0.1)",
            "not_finite": [],
            "guessing": [],
            "best_epoch": 1,
            "held_out_robust": 0.5,
            "selection": "epoch 1: highest robust accuracy on 20 held-out images, 50.0 %",
            "defended, best epoch": {"clean": 0.5},
        },
        "cost.json": {"seconds": [1.0, 1.0]},
        "run.json": {"what": "x"},
    }
    (tmp_path / "config.yaml").write_text("seed: 0\nthreat: {_target_: defenses.threat.Linf, eps: 0.1}\n")
    (tmp_path / "metrics.csv").write_text("epoch,step,val/robust_acc\n0,1,0.25\n1,2,0.5\n")
    for name, record in whole.items():
        (tmp_path / name).write_text(json.dumps(record))
    assert record_of(tmp_path).selected["epoch"] == 1
    (tmp_path / file).write_text(json.dumps(change(whole[file])))
    with pytest.raises(ValueError, match=r"^runs: ") as error:
        record_of(tmp_path)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [x]\nb: [*a, *a]\n", "aliases"),
        ("- 1\n", "no config of a run"),
        ("seed: 1.5\n", "seed: expected a whole number"),
        ("seed: -1\n", "seed: expected a whole number"),
        ("trainer: []\n", "no config of a run"),
        ("changed: [1]\n", "changed: expected entries"),
    ],
)
def test_a_config_that_no_run_wrote_is_one_line_with_its_file(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"^runs: {tmp_path}/config\.yaml.*{said}") as error:
        record_of(tmp_path)
    assert "\n" not in str(error.value)


def test_a_trusted_card_from_which_checks_were_taken_is_refused(tmp_path: Path) -> None:
    card = json.loads(SUITES[0].read_text(encoding="utf-8"))
    assert card["sanity"]["verdict"] == "trusted"
    path = tmp_path / "card.json"
    for place, check in enumerate(card["sanity"]["checks"]):
        fewer = copy.deepcopy(card)
        del fewer["sanity"]["checks"][place]
        path.write_text(json.dumps(fewer), encoding="utf-8")
        with pytest.raises(ValueError, match="checks that were left out") as error:
            read_card(path)
        assert check["name"] in str(error.value)
