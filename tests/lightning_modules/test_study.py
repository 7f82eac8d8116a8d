"""A study: what its YAML may say, what is skipped, resumed, retried, and the whole of a tiny one from YAML to page."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from glassarmor.interpret.views.draw.text import markdown
from glassarmor.interpret.views.page.page import read_script
from glassarmor.lightning_modules.commands import study as compare
from glassarmor.lightning_modules.run import hardware
from glassarmor.lightning_modules.study.members import Member, members_of, portable_override
from glassarmor.lightning_modules.study.records import (
    NEUTRAL,
    Accuracies,
    check_comparable,
    config_hash,
    read_record,
    read_records,
    settled,
    write_record,
)
from glassarmor.lightning_modules.study.report import attack_compared
from glassarmor.lightning_modules.study.runner import (
    TRIES,
    Place,
    cards_of,
    command,
    place_of,
    planned,
    reset_failures,
    run_members,
    unfinished,
)
from glassarmor.lightning_modules.study.study import Study, read_study
from glassarmor.lightning_modules.study.tables import accuracy_table
from glassarmor.lightning_modules.study.verdicts import settings_of
from tests.cards import suite_card
from tests.composing import CONFIGS, config

STUDIES = sorted((CONFIGS / "study").glob("*.yaml"))
PLAIN = {"name": "s", "seeds": [0, 1], "baseline": "A", "methods": {"A": {}, "B": {"grid": {"k.w": [1, 2]}}}}

# Stands in for train.py: writes what a run folder holds, and behaves as its ``act`` says.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
given = dict(a.split("=", 1) for a in sys.argv[1:])
resumed = "resume" in given
run = Path(given["resume"]) if resumed else Path(given["out"]) / given["name"]
config = json.loads((run / "config.yaml").read_text()) if resumed else {"act": given["act"], "seed": int(given["seed"])}
if not resumed:
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(json.dumps(config))
    (run / "run.json").write_text(json.dumps({"what": "fake"}))
act = config["act"]
with (run.parent / "calls").open("a") as file: file.write("resume\\n" if resumed else "start\\n")
print("lock", sorted(os.listdir(run.parent)))
if act == "diverge": sys.exit("FloatingPointError: training diverged at step 3")
if act == "killed" and not resumed:
    (run / "checkpoints" / "last.ckpt").write_text("")
    os.kill(os.getpid(), signal.SIGKILL)
if act == "early" and len((run.parent / "calls").read_text().split()) == 1: os.kill(os.getpid(), signal.SIGKILL)
if act == "broken" and resumed: sys.exit("error: resume: no readable checkpoint")
if act == "broken" and len((run.parent / "calls").read_text().split()) == 1:
    (run / "checkpoints" / "last.ckpt").write_text("")
    os.kill(os.getpid(), signal.SIGKILL)
if act == "slow": time.sleep(60)
(run / "metrics.csv").write_text("epoch,step,val/robust_acc,val/clean_acc,pse/promotion\\n0,5,0.4,0.9,1.5\\n")
(run / "results.json").write_text(json.dumps({"defended, best epoch": {"clean": 0.9, "PGD-20": 0.5}}))
"""


def beside(script: Path) -> Callable[[str], list[str]]:
    """What starts the scripts that lie beside this one, in the place of the real commands."""
    return lambda command: [sys.executable, str(script if command == "train" else script.with_name(f"{command}.py"))]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return path


def fake(act: str, seed: int = 0) -> Member:
    config = {"act": act, "seed": seed}
    return Member(act, "", seed, (f"act={act}", f"seed={seed}"), f"hash{act}{seed}", config)


def calls(out: Path, member: Member) -> list[str]:
    return (out / "members" / member.name / "calls").read_text().split()


def go(members: Sequence[Member], out: Path, script: Path, jobs: int = 2) -> list[str]:
    said: list[str] = []
    run_members(members, out, beside(script), jobs, said.append, poll=0.02)
    return said


def test_done_is_skipped_killed_is_resumed_and_failures_stop_nobody(tmp_path: Path, script: Path) -> None:
    good, killed, early, bad = (fake(act) for act in ("good", "killed", "early", "diverge"))
    everyone = [bad, killed, early, good]
    first = go(everyone, tmp_path, script)
    ended = {card.method: bool(card.failure) for card in read_records([tmp_path / "cards"])}  # written as each ends
    assert ended == {"diverge": True, "killed": True, "early": True, "good": False}
    assert first[0] == "4 members: 0 done, 0 failed 2 times, 4 to train"
    state = lambda member: Place(tmp_path / "members" / member.name).state  # noqa: E731
    assert [state(m) for m in everyone] == ["new", "resumable", "new", "done"]
    assert any("FAILED" in line and "training diverged at step 3" in line for line in first)
    assert any("4 of 4" in line for line in first)
    go(everyone, tmp_path, script)
    assert [state(m) for m in everyone] == ["failed", "done", "done", "done"]
    assert calls(tmp_path, killed) == ["start", "resume"]
    assert calls(tmp_path, early) == ["start", "start"]  # it had no checkpoint to go on from
    assert calls(tmp_path, good) == ["start"]
    third = go(everyone, tmp_path, script)
    assert third[0] == f"4 members: 3 done, 1 failed {TRIES} times, 0 to train"
    cards = cards_of(everyone, tmp_path)
    assert [bool(card.failure) for card in cards] == [True, False, False, False]
    assert "training diverged" in read_record(tmp_path / "cards" / f"{bad.name}.json").failure
    assert read_records([tmp_path / "cards"])[-1].measured == {"pse/promotion": 1.5}
    cards_of([good], tmp_path)  # the YAML has fewer members now
    assert [card.method for card in read_records([tmp_path / "cards"])] == ["good"]
    assert len(list((tmp_path / "other_cards").glob("*.json"))) == 3  # nothing is lost


def test_cards_that_were_brought_along_count_as_done(tmp_path: Path, script: Path) -> None:
    good, bad = fake("good"), fake("diverge")
    here, there = tmp_path / "here", tmp_path / "there"
    go([good, bad], here, script)
    before = cards_of([good, bad], here)
    shutil.copytree(here / "cards", there / "cards")
    said = go([good, bad], there, script)
    assert said[0] == "2 members: 1 done, 0 failed 2 times, 1 to train"
    assert not (there / "members" / good.name).exists()
    assert calls(there, bad) == ["start"]  # a failure elsewhere is tried here
    assert cards_of([good, bad], there)[0] == before[0]
    assert [card.method for card in read_records([there / "cards"])] == [
        card.method for card in read_records([here / "cards"])
    ]


JUDGE = """
import json, sys
from pathlib import Path
given = dict(a.split("=", 1) for a in sys.argv[1:])
folder = Path(given["out"]) / given["name"]
folder.mkdir(parents=True, exist_ok=True)
with (folder.parents[1] / "calls").open("a") as file: file.write(given["suite"] + "\\n")
if given["suite"] == "bad": sys.exit("ValueError: no such suite")
(folder / "card.json").write_text(Path(sys.argv[0]).with_name(given["suite"] + ".json").read_text())
"""


def test_suites_judge_every_member_after_its_training(tmp_path: Path, script: Path) -> None:
    script.with_name("evaluate.py").write_text(JUDGE)
    script.with_name("one.json").write_text(json.dumps(suite_card([True, False, False, True])))
    script.with_name("two.json").write_text(json.dumps(suite_card([False, False, False, True])))
    both = {"AA": ["suite=one"], "adaptive": ["suite=two"]}
    members = [replace(fake("good", seed), suites=both) for seed in (0, 1)]
    out = tmp_path / "out"
    said = go(members, out, script, jobs=1)
    assert [line.split()[0] for line in said[1:]] == ["started", "judging", "judging", "done"] * 2
    assert calls(out, members[0]) == ["start", "one", "two"]
    (card, _) = cards_of(members, out)
    found = card.evaluations["defended, best epoch"]
    assert found.accuracy == {"clean": 0.9, "PGD-20": 0.5, "AA": 0.5, "adaptive": 0.25}
    assert found.correct["AA"].tolist() == [True, False, False, True]
    assert card.about["verdicts"] == {"AA": "trusted", "adaptive": "trusted"}
    # Asked for more, only that is done; cards brought along count only if they hold it.
    more = [replace(m, suites={**both, "third": ["suite=one", "images=5"]}) for m in members]
    shutil.copytree(out / "cards", tmp_path / "there" / "cards")
    assert unfinished(more, tmp_path / "there")
    go(more, out, script)
    assert calls(out, members[0]) == ["start", "one", "two", "one"]
    shutil.copytree(out / "cards", tmp_path / "there" / "cards", dirs_exist_ok=True)
    assert not unfinished(more, tmp_path / "there")
    with pytest.raises(ValueError, match=r"suites.*differs, the evaluation"):
        check_comparable([planned(members[0]), planned(more[1])])
    bad = replace(fake("good", 2), suites={"AA": ["suite=bad"]})
    for _ in range(3):
        go([bad], out, script)
    assert calls(out, bad) == ["start", "bad", "bad"]  # judged in vain TRIES times, trained once
    assert "no such suite" in cards_of([bad], out)[0].failure


def test_a_card_of_a_finished_run_outlives_a_start_elsewhere(tmp_path: Path, script: Path) -> None:
    member = fake("good")
    go([member], tmp_path, script)
    (card,) = cards_of([member], tmp_path)
    shutil.rmtree(tmp_path / "members" / member.name / "run")  # to save space; member.json stays
    assert not unfinished([member], tmp_path)
    assert cards_of([member], tmp_path) == [card]
    assert go([member], tmp_path, script)[0] == "1 members: 1 done, 0 failed 2 times, 0 to train"


def test_what_failed_for_a_reason_outside_is_tried_again_when_asked(tmp_path: Path, script: Path) -> None:
    member = fake("good")
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('error: data.path: found none')")
    for _ in range(TRIES):
        go([member], tmp_path, broken)
    assert go([member], tmp_path, script)[-1] == "--again tries those that failed once more"
    reset_failures([member], tmp_path)
    go([member], tmp_path, script)
    assert not cards_of([member], tmp_path)[0].failure


def test_a_checkpoint_that_cannot_be_resumed_is_given_up_for_a_fresh_start(tmp_path: Path, script: Path) -> None:
    member = fake("broken")
    for _ in range(3):
        go([member], tmp_path, script)
    assert calls(tmp_path, member) == ["start", "resume", "start"]
    assert Place(tmp_path / "members" / member.name).state == "done"


def test_a_member_that_runs_elsewhere_is_left_alone(tmp_path: Path, script: Path) -> None:
    member = fake("good")
    with Place(tmp_path / "members" / member.name).locked() as lock:
        assert lock is not None
        said = go([member], tmp_path, script)
    assert said[-1] == f"busy     {member.name}: another process trains it"
    go([member], tmp_path, script)
    assert calls(tmp_path, member) == ["start"]


def test_ctrl_c_ends_the_members_and_the_next_call_goes_on(tmp_path: Path, script: Path) -> None:
    members = [fake("slow"), fake("slow", seed=1)]

    def interrupt(line: str) -> None:
        if line.startswith("started") and line.endswith("slow1"):
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_members(members, tmp_path, beside(script), 2, interrupt, poll=0.02)
    assert time.monotonic() - began < 15
    for member in members:  # nobody holds the lock: nobody lives
        place = Place(tmp_path / "members" / member.name)
        with place.locked() as lock:
            assert lock is not None
        assert place.record.get("failures", 0) == 0
        assert place.state == "new"


def compose(overrides: Sequence[str], seed: int) -> dict[str, Any]:
    """Later overrides win, as in Hydra; where things lie is part of the config, too."""
    flat = dict(line.split("=", 1) for line in overrides)
    return {
        "out": "somewhere",
        "seed": seed,
        **{k: v for k, v in flat.items() if k != "data.path"},
        "data": {"path": flat.get("data.path")},
    }


def study(**changes: Any) -> Study:
    entries = {**PLAIN, **changes}
    return Study(**{**entries, "seeds": tuple(entries["seeds"]), "budget": tuple(entries.get("budget", ()))})


def test_members_are_methods_by_grid_by_seed() -> None:
    found = members_of(study(budget=["e=5"]), compose, ["x=1"])
    assert [(m.method, m.setting, m.seed) for m in found] == [
        *(("A", "", 0), ("B", "k.w=1", 0), ("B", "k.w=2", 0)),
        *(("A", "", 1), ("B", "k.w=1", 1), ("B", "k.w=2", 1)),
    ]
    assert found[2].overrides == ("e=5", "k.w=2", "x=1", "seed=0")
    assert len({m.name for m in found}) == 6
    few = study(methods={"A": {}, "B": {"overrides": ["k=1"], "seeds": 1}})
    assert [(m.method, m.seed) for m in members_of(few, compose)] == [("A", 0), ("B", 0), ("A", 1)]
    two = study(methods={"A": {}, "B": {"grid": {"p": [1, None], "q": [True, "[a,b]"]}}})
    assert [m.setting for m in members_of(two, compose)[1:5]] == [
        "p=1, q=true",
        "p=1, q=[a,b]",
        "p=null, q=true",
        "p=null, q=[a,b]",
    ]


def test_a_changed_config_is_another_member_and_a_moved_folder_is_not() -> None:
    names = [m.name for m in members_of(study(), compose, ["data.path=/a"])]
    assert [m.name for m in members_of(study(), compose, ["data.path=/b"])] == names
    assert not {m.name for m in members_of(study(budget=["e=6"]), compose)} & set(names)
    assert not portable_override("data.path=/a")
    assert not portable_override("out=/a")
    assert portable_override("data.batch_size=3")
    assert portable_override("+attack@test_attacks.adaptive=adaptive_pgd")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": []}, "study.seeds: expected different whole numbers"),
        ({"seeds": [1, 1]}, "study.seeds"),
        ({"baseline": "C"}, "study.baseline: expected one of A, B; found 'C'"),
        ({"methods": {"A": {"grid": {"k": 3}}}}, "study.methods.A.grid.k: expected a list of values, found 3"),
        ({"methods": {"A": {"weights": [3]}}}, "study.methods.A: expected overrides, grid, seeds and base, found weights"),
        ({"budget": ["trades"]}, "study.budget: expected overrides such as defense=trades, found 'trades'"),
        ({"methods": {"A": {"overrides": [{"a": 1}]}}}, "study.methods.A.overrides"),
        ({"methods": {"A": {}, "B": {}}}, "the same config"),
        ({"methods": {"A": {}, "B": {"base": "C"}}}, "study.methods.B.base: expected some of A, B; found 'C'"),
        ({"methods": {"A": {}, "B": {"base": ["A", 3]}}}, r"study.methods.B.base: expected some of A, B; found \['A', 3\]"),
        ({"methods": {"A": {}, "B": {"base": []}}}, r"study.methods.B.base: expected some of A, B; found \[\]"),
        ({"methods": {"A": {"seeds": 3}}}, "study.methods.A.seeds: expected some of 2 seeds, found 3"),
        ({"suites": {"AA": ["standard"]}}, "study.suites.AA: expected overrides such as defense=trades, found 'standard'"),
    ],
)
def test_what_a_study_must_not_say(changes, words) -> None:
    with pytest.raises(ValueError, match=words):
        members_of(study(**changes), compose)


def test_a_file_that_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found none at"):
        read_study(tmp_path / "none.yaml")
    path = tmp_path / "s.yaml"
    for text in ("[1, 2]", "name: a", yaml.safe_dump({**PLAIN, "epochs": 3})):
        path.write_text(text)
        with pytest.raises(ValueError, match="--study: expected name, seeds, baseline, methods"):
            read_study(path)
    for changes, words in (
        ({"seeds": 3}, "study.seeds: expected a list, found 3"),
        ({"methods": ["A"]}, "study.methods: expected names"),
        ({"methods": {"A": ["x=1"]}}, "study.methods.A: expected overrides"),
        ({"methods": {"A": {"grid": ["w"]}}}, "study.methods.A: expected overrides"),
        ({"methods": {"A": {"overrides": "x=1"}}}, "study.methods.A.overrides: expected a list of overrides, found 'x=1'"),
        ({"suites": {"AA": None}}, "study.suites.AA: expected a list of overrides, found 'nothing'"),
        ({"baseline": ["A"]}, "study.baseline: expected one of A, B"),
    ):
        path.write_text(yaml.safe_dump({**PLAIN, **changes}))
        with pytest.raises(ValueError, match=words):
            read_study(path)
    for broken in (b"name: [", b"\xff\xfe"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="is no YAML"):
            read_study(path)
    path.write_text(yaml.safe_dump(PLAIN))
    assert read_study(path) == study()


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.long] if path.stem in ("search", "parts", "confirm") else [])
        for path in STUDIES
    ],
    ids=lambda path: path.stem,
)
def test_every_study_composes_and_its_members_compare(path: Path) -> None:
    """One point of each method's grid; what a comparison would refuse is refused before any training."""
    found = read_study(path)
    methods = {
        name: {**entry, "seeds": 1, "grid": {key: values[:1] for key, values in (entry.get("grid") or {}).items()}}
        for name, entry in found.methods.items()
    }
    one = replace(found, methods=methods, seeds=found.seeds[:1])
    members = members_of(one, compare.composed, ["data.path=nowhere"] if "data=arrays" in found.budget else [])
    check_comparable([planned(member) for member in members])
    assert "threads=1" in found.budget
    assert "compare_undefended=false" in found.budget
    assert len(members) == len(found.methods)
    # What is hashed and compared is what train.py would be given, the seed included.
    last = members[-1]
    assert config_hash(OmegaConf.to_container(config(*last.overrides), resolve=True)) == last.hash


def test_a_wrong_override_names_its_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**PLAIN, "methods": {"A": {"overrides": ["defense=nothing"]}}}))
    monkeypatch.setattr(sys, "argv", ["compare.py", "--study", str(path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        compare.run()
    assert "study.methods.A: In 'train': Could not find 'defense/nothing'" in capsys.readouterr().err
    path.write_text(yaml.safe_dump({**PLAIN, "methods": {"A": {}, "B": {"overrides": ["trainer.max_epochs=3"]}}}))
    with pytest.raises(SystemExit):
        compare.run()
    error = capsys.readouterr().err
    assert "trainer.max_epochs differs, the training effort" in error
    assert not (tmp_path / "out").exists()


def test_a_study_with_a_member_that_failed_compares_the_others_and_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "s.yaml", tmp_path / "out"
    methods = {"A": {}, "B": {"overrides": ["defense=pgd_at"]}, "C": {"overrides": ["defense=mart"]}}
    path.write_text(yaml.safe_dump({**PLAIN, "seeds": [0], "budget": [], "methods": methods}))
    members = members_of(read_study(path), compare.composed)
    (out / "cards").mkdir(parents=True)
    for member, robust in zip(members[:2], (0.4, 0.5), strict=True):
        row = Accuracies({"clean": 0.8, "PGD-20": robust})
        card = replace(planned(member), failure="", evaluations={"defended, best epoch": row})
        write_record(card, out / "cards" / f"{member.name}.json")
    broken = place_of(members[2], out)
    broken.folder.mkdir(parents=True)
    broken.write(failures=2)
    (broken.folder / "log.txt").write_text("ValueError: it burst\n")
    monkeypatch.setattr(sys, "argv", ["compare.py", "--study", str(path), "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        compare.run()
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "B − A: clean +0.0, PGD-20 +10.0 points" in said
    assert "1 of 3 runs have not finished" in said
    assert "ValueError: it burst" in said
    assert (out / "comparison" / "index.html").is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attack": "PGD-99"}, "study.attack: expected one of FGSM, PGD-20, fast suite; found 'PGD-99'"),
        (
            {"suites": {"fast suite": ["suite=nosuch"]}},
            "study.suites.fast suite: expected suite=probe, fast, standard, strong, adaptive",
        ),
        ({"suites": {"fast suite": ["suite=fast", "nokey=1"]}}, "study.suites.fast suite: Could not override 'nokey'"),
        ({"suites": {"fast suite": ["suite=fast", "images=100"]}}, "expected 1 to 80 images, as there are; found 100"),
        (
            {"budget": [], "suites": {"fast suite": ["suite=fast", "images=360"]}},
            "expected 1 to 359 images, as there are; found 360",
        ),
    ],
)
def test_what_would_fail_after_training_is_refused_before(
    changes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "s.yaml", tmp_path / "out"
    plain = {**PLAIN, "methods": {"A": {}}, "budget": ["data.test_limit=80"], "suites": {"fast suite": ["suite=fast"]}}
    path.write_text(yaml.safe_dump({**plain, **changes}))
    monkeypatch.setattr(sys, "argv", ["compare.py", "--study", str(path), "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        compare.run()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert words in error
    assert "(--debug shows the stack trace)" in error
    assert not out.exists()


@pytest.mark.long
def test_a_tiny_study_from_yaml_to_table_and_page(tmp_path: Path) -> None:
    """configs/study/tiny.yaml with fewer images: one member is killed and goes on; a second call trains nothing."""
    out = tmp_path / "study"
    line = [sys.executable, "compare.py", "--study", "configs/study/tiny.yaml", "--out", str(out), "--jobs", "2"]
    line += ["trainer.max_epochs=3", "data.train_limit=300", "data.test_limit=100", "probe.size=16"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(line, cwd=CONFIGS.parent, env=env, stdout=subprocess.PIPE, text=True) as runner:
        victim = None
        while runner.poll() is None and victim is None:
            time.sleep(0.1)
            victim = next(iter(out.glob("members/*/run/checkpoints/last.ckpt")), None)
        assert victim is not None
        folder = victim.parents[2]
        os.kill(json.loads((folder / "member.json").read_text())["pid"], signal.SIGKILL)
        text = runner.communicate()[0]
    assert runner.returncode == 0
    assert f"FAILED   {folder.name}" in text
    assert f"resumed  {folder.name}" in text
    again = subprocess.run(line, cwd=CONFIGS.parent, env=env, capture_output=True, text=True, check=True).stdout
    assert "9 members: 9 done, 0 failed 2 times, 0 to train" in again
    page = out / "comparison"
    for name in (
        "tables.md",
        "tables.tex",
        "runs.csv",
        "differences.svg",
        "fronts.svg",
        "fronts.png",
        "sweep.svg",
        "index.html",
    ):
        assert (page / name).stat().st_size > 500, name
    view = read_script(page / "data" / "epoch_00000.js")["views"][0]
    tables = [chart for chart in view["charts"] if chart["type"] == "table"]
    seeds = {(row[0], row[2]) for row in tables[0]["rows"]}
    (winner,) = [method for method, count in seeds if count == "2" and method != "TRADES"]
    (loser,) = [method for method, count in seeds if count == "1"]
    assert {winner, loser} == {"TRADES + PSE", "TRADES + sensitivity"}
    assert {row[0].partition(" ·")[0] for row in tables[1]["rows"]} == {winner, loser}
    assert [(row[0], row[-1]) for row in tables[-1]["rows"]] == [(winner, "finished"), (loser, "out after round 1")]
    with (page / "runs.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["network"] == "defended, best epoch"]
    assert len(rows) == 9
    for row in rows:
        assert 0 <= float(row["fast suite"]) <= 1
        assert 0 <= float(row["PGD-20"]) <= float(row["FGSM"]) <= float(row["clean"]) <= 1
        assert float(row["cpu_seconds"]) > 0
        assert float(row["passes"]) == 5 + 3  # TRADES: K + 3
        assert 0 <= float(row["pse/share_promotion"]) <= 1
    cards = sorted((out / "cards").glob("*.json"))
    assert len(cards) == 9
    for path in cards:
        assert path.stat().st_size < 12_000
        assert str(tmp_path) not in path.read_text()
        card = read_record(path)
        best = card.evaluations["defended, best epoch"]
        assert best.correct["PGD-20"].mean() == pytest.approx(best.accuracy["PGD-20"], abs=1e-6)
        assert len(best.correct["clean"]) == len(best.correct["fast suite"]) == 100
        assert best.accuracy["fast suite"] <= best.accuracy["PGD-20"] + 0.02
        assert {"commit", "versions", "overrides"} <= card.about.keys()
    assert json.loads(cards[0].read_text())["settled"]["trainer.max_epochs"] == 3


def test_auto_is_decided_once_for_all_members_and_is_no_part_of_a_hash(
    tmp_path: Path, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first member decides for the folder, whatever a later runner's machine has; what is named stays as it is named."""
    both, layout = ["trainer.precision=auto", "channels_last=auto"], ["channels_last=auto"]
    asked = {"A": {"overrides": both}, "B": {"overrides": layout}}
    named = {"A": {"overrides": ["trainer.precision=bf16-mixed"]}}

    def started(methods: dict[str, Any], out: Path) -> tuple[list[str], list[list[str]]]:
        members = members_of(study(methods=methods, seeds=[0], budget=["defense=none"]), compare.composed)
        lines = [command(member, Place(out / "members" / member.name), beside(script)) for member in members]
        added = [[word for word in line[2:-2] if word not in m.overrides] for m, line in zip(members, lines, strict=True)]
        return [member.hash for member in members], added

    monkeypatch.setattr(hardware, "suited", lambda _: hardware.Settings("bf16-mixed", True))
    first = started(asked, tmp_path)
    assert first[1] == [["trainer.precision=bf16-mixed", "channels_last=true"], ["channels_last=true"]]
    monkeypatch.setattr(hardware, "suited", lambda _: hardware.Settings("32-true", False))
    assert started(asked, tmp_path) == first
    elsewhere = started(asked, tmp_path / "other")
    assert elsewhere[1] == [["trainer.precision=32-true", "channels_last=false"], ["channels_last=false"]]
    assert elsewhere[0] == first[0]
    assert started(named, tmp_path / "third")[1] == [[]]
    assert not (tmp_path / "third").exists()


def test_a_member_that_never_began_has_the_precision_of_the_others_on_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "suited", lambda _: hardware.Settings("bf16-mixed", True))
    config = {"trainer": {"precision": "auto"}, "channels_last": "auto"}
    member = Member("bad", "", 0, ("act=diverge", "seed=0"), "hash", config)
    script = tmp_path / "fake.py"
    script.write_text("raise ValueError('no')")
    go([member], tmp_path, script)
    (card,) = read_records([tmp_path / "cards"])
    assert card.settled["trainer.precision"] == "bf16-mixed"
    assert card.config == "hash"


FOLDERS = sorted(path.parent for path in (CONFIGS.parent / "docs" / "study").glob("*/runs.jsonl"))


@pytest.mark.long
def test_the_records_that_are_kept_are_those_of_their_studies(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 319, or a study that goes on from them would train some again; and still so when a config has a new key."""
    assert len(FOLDERS) == 7
    kept = {folder: {record.name: record for record in read_records([folder])} for folder in FOLDERS}
    found = 0
    for folder, records in kept.items():
        study = read_study(CONFIGS / "study" / f"{folder.name}.yaml")
        for member in members_of(study, compare.composed, ["data.path=nowhere"]):
            if member.name in records:
                found += 1
                record = records[member.name]
                assert record.config == member.hash == config_hash(member.config)
                wanted = planned(member).settled
                fixed = {key: record.settled[key] for key in ("trainer.precision",) if wanted.get(key) == "auto"}
                assert record.settled == {**wanted, **fixed}
    assert found == sum(map(len, kept.values())) == 319
    monkeypatch.setitem(NEUTRAL, "data.allow_duplicates", False)
    config = dict(compare.composed(("data=arrays", "data.path=nowhere"), 0))
    newer = {**config, "data": {**config["data"], "allow_duplicates": False, "skip_unreadable": None}, "search": None}
    assert config_hash(newer) == config_hash(config)
    assert settled(newer) == settled(config)
    other = {**config, "data": {**config["data"], "allow_duplicates": True}}
    assert config_hash(other) != config_hash(config)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_tables_of_the_documents_are_what_their_cards_say(folder: Path) -> None:
    cards = read_records([folder])
    of, settings = read_study(CONFIGS / "study" / f"{folder.name}.yaml"), settings_of(cards)
    attack = attack_compared(settings, of.attack, of.network)
    table = accuracy_table(settings, of.network, of.baseline, attack)
    written = (folder / "comparison" / "tables.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in markdown(table).splitlines() if line.startswith("|")]
    first = written.index(rows[0])
    assert sorted(written[first : first + len(rows)]) == sorted(rows)
    assert {card.method for card in cards} <= set(of.methods)


@pytest.mark.parametrize(
    ("recipe", "study", "seeds"),
    [
        ("cifar10_small_trades", "confirm", (10, 11, 12)),
        ("cifar10_small_pse_sensitivity", "confirm", (10, 11, 12)),
        ("cifar10_small_pgd_at", "gate", (20, 21, 22)),
        ("cifar10_few_pse", "few_confirm", (60, 61, 62)),
    ],
)
def test_a_recipe_is_what_a_study_trained(recipe: str, study: str, seeds: tuple[int, ...]) -> None:
    """To the hash of its config: the numbers that it quotes are of this very training."""
    hashes = {card.config for card in read_records([CONFIGS.parent / "docs" / "study" / study])}
    for seed in seeds:
        assert config_hash(compare.composed((f"experiment={recipe}", "data.path=nowhere"), seed)) in hashes
