"""A whole run as a user makes it: folder, W&B log, report, exact resume, errors, and dashboards that change nothing."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
import yaml
from hydra.utils import instantiate
from torch import nn

from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.threat import Linf
from glassarmor.interpret.views.page.page import ReportPage, read_script
from glassarmor.interpret.views.panels.pse import PSEPanel
from glassarmor.lightning_modules.callbacks.checkpointing import Checkpoints, how_chosen
from glassarmor.lightning_modules.callbacks.dashboard import Dashboard
from glassarmor.lightning_modules.commands import study as compare
from glassarmor.lightning_modules.commands import train
from glassarmor.lightning_modules.commands.errors import Stopped, run_command
from glassarmor.lightning_modules.run.folder import RunFolder
from glassarmor.lightning_modules.run.log import RunLog, wandb_logger
from glassarmor.lightning_modules.study import tables
from glassarmor.lightning_modules.study import verdicts as comparison
from glassarmor.lightning_modules.study.records import read_record, record_of, write_record
from tests.composing import SMALL, config, without_guessing
from tests.wandb_log import history, run_ids

ROOT = Path(__file__).resolve().parents[2]
# One thread: another number of threads adds in another order and ends in other last bits.
STEPS = ("defense.attack.steps=2", "val_attack.steps=2", "probe.attack.steps=2")
QUICK = (*SMALL, *STEPS, "trainer.max_epochs=3", "threads=1")
BARE = ("panels=[]", "wandb.mode=disabled")  # neither changes a weight


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DATA_DIR"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    without_guessing(monkeypatch)


def command(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    """``python train.py overrides``, in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    train.main()


def weights(run: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"{which}.ckpt", weights_only=True)["state_dict"]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted default run, small."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for key in ("WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(key, raising=False)
        patch.setenv("NETRC", os.devnull)
        without_guessing(patch)
        command(patch, *QUICK, f"out={out}", "name=whole")
    return out / "whole"


def test_the_run_folder_is_complete(run: Path) -> None:
    for name in ("config.yaml", "run.json", "metrics.csv", "results.json", "checkpoints/best.ckpt", "report/index.html"):
        assert (run / name).stat().st_size > 0, name
    info = json.loads((run / "run.json").read_text())
    assert {"commit", "versions", "probe", "wandb_id", "what"} <= info.keys()
    assert info["versions"]["torch"] == torch.__version__.split("+")[0]
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    for row in rows:
        assert 0 <= float(row["val/robust_acc"]) <= float(row["val/clean_acc"]) + 1e-6 <= 1.1
        total = sum(float(v) for k, v in row.items() if k.startswith("train/loss/"))
        assert total == pytest.approx(float(row["train/loss"]), rel=1e-4), "the terms must add up to the loss"
    records = json.loads((run / "results.json").read_text())
    assert records["not_finite"] == []
    said = {"threat", "not_finite", "guessing", "best_epoch", "held_out_robust", "selection"}
    assert set(records) == said | {"defended, best epoch", "defended, last epoch", "undefended"}
    assert "accuracy on 20 held-out images" in records["selection"]
    assert records["selection"] in (run / "report" / "index.html").read_text()
    for name in ("defended, best epoch", "undefended"):
        assert list(records[name]) == ["clean", "FGSM", "PGD-20"]
    card = record_of(run)
    for name, found in card.evaluations.items():
        assert {attack: right.mean() for attack, right in found.correct.items()} == pytest.approx(records[name])
    cost = json.loads((run / "cost.json").read_text())
    assert (cost["passes"], cost["steps"]) == (2 + 3, 4)  # TRADES: K + 3
    assert len(cost["seconds"]) == len(cost["cpu_seconds"]) == 3
    assert min(cost["seconds"]) > 0


def test_the_best_checkpoint_is_the_best_epoch_held_out(run: Path) -> None:
    with (run / "metrics.csv").open() as file:
        robust = [float(row["val/robust_acc"]) for row in csv.DictReader(file)]
    epoch = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["epoch"]
    assert 20 * (max(robust) - robust[epoch]) <= 5, "within a standard error of the highest, which is 5 images at most"
    card = record_of(run)
    assert card.selected["epoch"] == epoch == json.loads((run / "results.json").read_text())["best_epoch"]
    assert how_chosen(run / "checkpoints" / "best.ckpt") == json.loads((run / "results.json").read_text())["selection"]
    assert card.settled["select"] == {"within": 1}


def test_the_wandb_log_read_back_holds_every_epoch(run: Path) -> None:
    rows = history(run / "wandb")
    drawn = [row for row in rows if "dashboard/pse" in row]
    assert [row["epoch"] for row in drawn] == [0, 1, 2]
    steps = [row["trainer/global_step"] for row in drawn]
    assert steps == sorted(set(steps)), "one call an epoch, in order"
    for row in drawn:
        for panel in ("pse", "units", "sensitivity", "dissection", "profiles", "cam", "attribution"):
            media = row[f"dashboard/{panel}"]
            assert media["_type"] == "image-file"
            assert media["caption"]
            assert media["width"] > 200
            assert media["height"] > 100
            path = next((run / "wandb").glob(f"*run-*/files/{media['path']}"))
            assert path.stat().st_size > 2000, "a black picture compresses to nothing"
        page = row["dashboard/page"]
        assert page["_type"] == "html-file"
        text = next((run / "wandb").glob(f"*run-*/files/{page['path']}")).read_text()
        assert {view["name"] for view in inlined(text)[row["epoch"]]} >= {"health", "pse", "profiles"}
        assert row["tables/pse"]["_type"] == "table-file"
        assert row["tables/pse"]["nrows"] == 16
        assert sum(row[f"pse/share_{k}"] for k in ("suppression", "promotion", "balanced", "inactive")) == pytest.approx(1)
    tables = [next((run / "wandb").glob(f"*run-*/files/{row['tables/pse']['path']}")) for row in drawn]
    ids = [[cells[0] for cells in json.loads(path.read_text())["data"]] for path in tables]
    assert ids[0] == ids[1] == ids[2], "fixed example ids"
    assert any("train/loss/pse" in key for row in rows for key in row)
    assert any("val/robust_acc" in row for row in rows)
    assert any("tables/results" in row for row in rows)
    assert not list(run.parent.glob("wandb")), "no W&B file outside the run folder"


def test_the_report_holds_every_epoch_in_one_file(run: Path) -> None:
    manifest = read_script(run / "report" / "data" / "manifest.js")
    assert [entry["epoch"] for entry in manifest["epochs"]] == [0, 1, 2]
    assert manifest["results"] is not None
    page = (run / "report" / "index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert all(f"epoch_0000{i}.js" in page for i in range(3))


def test_the_same_config_and_seed_end_in_the_same_weights(run: Path, tmp_path: Path, monkeypatch) -> None:
    """Without panels and without W&B: they must not have changed anything either."""
    command(
        monkeypatch, *QUICK, f"out={tmp_path}", "name=bare", "panels=[]", "wandb.mode=disabled", "compare_undefended=false"
    )
    assert_same(weights(run), weights(tmp_path / "bare"))


class _Interrupted(Exception):
    pass


def test_an_interrupted_run_resumes_exactly_into_the_same_wandb_run(run: Path, tmp_path: Path, monkeypatch) -> None:
    seen = 0

    def fail(module: Any, batch: Any, batch_idx: int) -> Any:
        nonlocal seen
        seen += 1
        if seen > 6:  # 4 batches an epoch: in the middle of the second
            raise _Interrupted
        return original(module, batch, batch_idx)

    original = train.RobustClassifier.training_step
    with monkeypatch.context() as patch:
        patch.setattr(train.RobustClassifier, "training_step", fail)
        with pytest.raises(SystemExit):  # Hydra's way to end a failed job
            command(monkeypatch, *QUICK, f"out={tmp_path}", "name=cut", "panels=[pse]")
    assert not (tmp_path / "cut" / "results.json").exists()
    command(monkeypatch, f"resume={tmp_path / 'cut'}")
    assert_same(weights(run), weights(tmp_path / "cut"))
    assert_same(weights(run, "best"), weights(tmp_path / "cut", "best"))
    with (run / "metrics.csv").open() as one, (tmp_path / "cut" / "metrics.csv").open() as other:
        assert [r["val/robust_acc"] for r in csv.DictReader(one)] == [r["val/robust_acc"] for r in csv.DictReader(other)]
    assert len(run_ids(tmp_path / "cut" / "wandb")) == 1
    assert len(json.loads((tmp_path / "cut" / "cost.json").read_text())["seconds"]) == 3  # no epoch twice
    assert (tmp_path / "cut" / "results.json").read_text() == (run / "results.json").read_text()


@pytest.mark.long
def test_kill_minus_nine_and_resume(run: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, str(ROOT / "train.py")]
    process = subprocess.Popen([*arguments, *QUICK, f"out={tmp_path}", "name=killed"], env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*arguments, f"resume={tmp_path / 'killed'}"], env=environment, check=True)
    assert_same(weights(run), weights(tmp_path / "killed"))


@pytest.mark.long
def test_a_finished_run_can_be_trained_longer(run: Path, tmp_path: Path, monkeypatch) -> None:
    command(monkeypatch, *QUICK, *BARE, f"out={tmp_path}", "name=more", "compare_undefended=false", "trainer.max_epochs=1")
    path = tmp_path / "more" / "run.json"
    began = json.loads(path.read_text())
    path.write_text(json.dumps(began | {"processes": 2}))  # as if two had trained, on half a step's images each
    command(monkeypatch, f"resume={tmp_path / 'more'}", "trainer.max_epochs=2")
    whole = yaml.safe_load((tmp_path / "more" / "config.yaml").read_text())
    assert whole["trainer"]["max_epochs"] == 2
    assert whole["changed"] == [{"epoch": 1, "step": 4, "key": "trainer.max_epochs", "from": 1, "to": 2}]
    assert json.loads(path.read_text()) == began
    assert began["processes"] == 1
    with (tmp_path / "more" / "metrics.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]


def test_corrupt_checkpoints_are_named_before_anything_is_touched(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    shutil.copytree(run, tmp_path / "copy", symlinks=True)
    last = tmp_path / "copy" / "checkpoints" / "last.ckpt"
    for path in last.parent.iterdir():  # with a good one before it, the run would go on from there: test_faults.py
        path.write_bytes(path.read_bytes()[:3000])

    def written() -> dict[Path, int]:  # W&B's own service may still be writing its log, which the copy links to
        return {path: path.lstat().st_mtime_ns for path in (tmp_path / "copy").rglob("*")}

    before = written()
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, f"resume={tmp_path / 'copy'}")
    assert stop.value.code == 2
    assert str(last) in capsys.readouterr().err
    assert written() == before


def test_a_diverged_run_stops_and_says_where(tmp_path: Path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        command(
            monkeypatch,
            *QUICK,
            *BARE,
            f"out={tmp_path}",
            "optimizer.lr=1e30",
            "scheduler.warmup=0",
            "health=off",
        )
    assert stop.value.code != 0
    assert "training diverged at step" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def as_typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of ``python train.py words``, in this process."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # so that it is put back
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as stop:
        run_command(train.main, train.CONFIGS, "train", "")
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("every", "health", "holds"),
    [
        ("1", "off", "{0}/previous.ckpt holds an earlier step, 1"),
        ("null", "off", "no checkpoint was written"),
        ("null", "default", "{0}/healthy.ckpt holds the start"),
    ],
)
def test_what_a_diverged_run_names_is_there(every, health, holds, tmp_path: Path, monkeypatch, capsys) -> None:
    original = train.RobustClassifier.training_step

    def poisoned(module, batch, batch_idx):
        x, y = batch
        return original(module, (x * float("nan") if module.global_step == 2 else x, y), batch_idx)

    monkeypatch.setattr(train.RobustClassifier, "training_step", poisoned)
    quick = (*QUICK, "panels=[]", "regularizers=[]", "wandb.mode=disabled", f"out={tmp_path}", "name=run")
    quick += (f"health={health}", "data.batch_size=16")  # 8 steps an epoch: no write by itself so early
    stop = ("health.actions.nonfinite=stop",) if health == "default" else ()
    assert as_typed(monkeypatch, *quick, *stop, f"checkpoint_every={every}") == 1
    said = capsys.readouterr().err
    kept = tmp_path / "run" / "checkpoints"
    assert "Traceback" not in said
    assert "error: training diverged at step 2: " in said
    assert holds.format(kept) in said
    named = re.findall(r"(\w+)\.ckpt", said)
    assert bool(named) == any(kept.glob("*.ckpt"))
    assert all((kept / f"{name}.ckpt").is_file() for name in named)


@pytest.mark.long
def test_a_network_without_defense_that_diverges_takes_nothing_with_it(tmp_path: Path, monkeypatch, capsys) -> None:
    original = train.RobustClassifier.training_step

    def poisoned(module, batch, batch_idx):
        x, y = batch
        return original(module, (x * float("nan") if module.defense.attack is None else x, y), batch_idx)

    monkeypatch.setattr(train.RobustClassifier, "training_step", poisoned)
    command(
        monkeypatch, *QUICK[:-2], "trainer.max_epochs=1", "panels=[]", "regularizers=[]", "wandb.mode=disabled",
        f"out={tmp_path}", "name=run",
    )  # fmt: skip
    records = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "defended, best epoch" in records
    assert "undefended" not in records
    assert "the network without defense is left out of the table: training diverged at step 0" in capsys.readouterr().out


@pytest.mark.long
def test_weights_that_are_not_finite_are_marked_and_never_the_best(tmp_path: Path, monkeypatch, capsys) -> None:
    """A last step ruins nets that withstand nothing: the last epoch says one class, 10 % right, and is not the best one."""
    original = train.RobustClassifier.on_train_batch_end

    def ruin(module, *arguments):
        original(module, *arguments)
        if module.global_step == 5 * 2 and module.defense.attack is not None:
            module.net.head.bias.data[3] = float("nan")

    monkeypatch.setattr(train.RobustClassifier, "on_train_batch_end", ruin)
    quick = (*QUICK[:-2], "data.batch_size=25", "trainer.max_epochs=2", "panels=[]", "regularizers=[]", "health=off")
    for seed in (0, 1):
        command(
            monkeypatch, *quick, "threads=1", "wandb.mode=disabled", "compare_undefended=false", f"seed={seed}",
            f"out={tmp_path}", f"name=run{seed}",
        )  # fmt: skip
    folder, marked = tmp_path / "run0", "defended, last epoch (not finite)"
    assert json.loads((folder / "results.json").read_text())["not_finite"] == ["defended, last epoch"]
    assert marked in capsys.readouterr().out
    assert marked in (folder / "report" / "index.html").read_text()
    monkeypatch.setattr(sys, "argv", ["compare.py", str(folder), str(tmp_path / "run1"), "--out", str(tmp_path / "both")])
    compare.run()
    said = " ".join((tmp_path / "both" / "runs.csv").read_text().split())
    assert said.count(marked) == 2
    assert "defended, best epoch (not finite" not in said
    assert compare.results_table([compare.read_run(folder)]).rows[1][1] == marked
    card = record_of(folder)
    assert [found.finite for found in card.evaluations.values()] == [True, False]
    write_record(card, tmp_path / "card.json")
    assert [found.finite for found in read_record(tmp_path / "card.json").evaluations.values()] == [True, False]
    table = tables.accuracy_table(comparison.settings_of([card]), "defended, last epoch")
    assert ", not finite in seed 0" in str(table.rows[0][2])


def test_finite_weights_whose_logits_are_not_are_marked_and_never_the_best(tmp_path: Path, monkeypatch, capsys) -> None:
    original = train.RobustClassifier.on_train_batch_end

    def ruin(module, *arguments):
        original(module, *arguments)
        if module.trainer.is_last_batch:
            module.net.head.weight.data.fill_(3e38)

    monkeypatch.setattr(train.RobustClassifier, "on_train_batch_end", ruin)
    command(
        monkeypatch, *QUICK[:-2], "threads=1", "trainer.max_epochs=1", "panels=[]", "regularizers=[]", "health=off",
        "wandb.mode=disabled", "compare_undefended=false", f"out={tmp_path}", "name=run",
    )  # fmt: skip
    folder = tmp_path / "run"
    assert all(bool(value.isfinite().all()) for key, value in weights(folder).items() if key.startswith("net."))
    assert not (folder / "checkpoints" / "best.ckpt").exists()
    assert json.loads((folder / "results.json").read_text())["not_finite"] == ["defended, last epoch"]
    assert "defended, last epoch (not finite)" in capsys.readouterr().out
    assert "defended, last epoch (not finite)" in (folder / "report" / "index.html").read_text()


GOOD, BAD, OVERFLOWN = ({"net.weight": torch.tensor([1.0, v])} for v in (2.0, float("nan"), float("inf")))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"last": (7, GOOD), "previous": (6, GOOD)}, "{0}/previous.ckpt holds an earlier step, 6"),
        ({"last": (7, BAD), "previous": (6, OVERFLOWN), "healthy": (4, GOOD)}, "{0}/healthy.ckpt holds an earlier step, 4"),
        ({"last": (6, GOOD), "healthy": (4, GOOD), "best": (5, GOOD)}, "{0}/last.ckpt holds an earlier step, 6"),
        ({"last": (6, {**GOOD, "train_loss.value": torch.tensor(float("nan"))})}, "{0}/last.ckpt holds an earlier step, 6"),
        ({"last": (7, GOOD), "healthy": (4, BAD)}, "no earlier step was saved; {0}/last.ckpt holds step 7, whose weights"),
        ({"last": (7, BAD), "previous": (6, BAD)}, "no checkpoint holds finite weights"),
        ({"last": (6, None), "healthy": (0, GOOD)}, "{0}/healthy.ckpt holds the start"),
        ({}, "no checkpoint was written"),
    ],
)
def test_the_checkpoint_that_is_named_is_the_newest_that_is_any_good(files, says, tmp_path: Path) -> None:
    for name, (step, state) in files.items():
        torch.save({"global_step": step, "state_dict": state}, tmp_path / f"{name}.ckpt")
        if state is None:
            (tmp_path / f"{name}.ckpt").write_bytes(b"cut short")
    assert Checkpoints(tmp_path).holding(7).startswith(says.format(tmp_path))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["health=off", "health.images=3"], r"health\.images: expected no key of health, which is empty .*\(health=off\)"),
        (["health.foo=3"], r"health\.foo: expected a key of health, one of .*every_n_steps.*; found health\.foo=3"),
        (["health.limits.gapp=1"], r"health\.limits\.gapp: expected a key of health\.limits, one of gap, .*; found"),
        (["defense=pgd_at", "defense.no.bar=1"], r"defense\.no\.bar: expected a key of defense \(defense=pgd_at\), one of"),
        (["lrate=3"], r"lrate: expected a key of the config, one of data, "),
        (["trainer.accumulate_grad_batches=2"], r"trainer\.accumulate_grad_batches: .*\+trainer\.accumulate_grad_b.*=2; "),
        (["health=of"], r"health: expected one of default, off; found health=of$"),
        (["health=on"], r"health: expected one of default, off; found health=on$"),
        (["-m", "seed=0,1", "health.foo=3"], r"health\.foo: expected a key of health, one of"),
    ],
)  # fmt: skip
def test_what_hydra_refuses_is_one_clear_line(words, line, tmp_path: Path, monkeypatch, capsys) -> None:
    assert as_typed(monkeypatch, *words, f"out={tmp_path}", f"hydra.sweep.dir={tmp_path}") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert re.search(f"^error: {line}", said[0]), said
    assert "To append to your config" not in said[0]
    assert said[1] == "(debug=true shows the stack trace)"


def test_debug_leaves_errors_as_they_are(tmp_path: Path, monkeypatch, capsys) -> None:
    assert as_typed(monkeypatch, "health.foo=3", "debug=true", f"out={tmp_path}") == 1
    assert "Could not override 'health.foo'" in capsys.readouterr().err


def inlined(page: str) -> dict[int, list[dict]]:
    """The views of each epoch that a self-contained page holds."""
    bodies = [json.loads(text) for text in re.findall(r'\{"epoch":\d+,"deflated":"[^"]+"\}', page)]
    return {body["epoch"]: json.loads(zlib.decompress(base64.b64decode(body["deflated"])))["views"] for body in bodies}


def test_nothing_is_overwritten(run: Path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        command(monkeypatch, *QUICK, *BARE, f"out={run.parent}", f"name={run.name}")
    assert f"resume={run}" in capsys.readouterr().err


ERRORS = [
    (["threat.eps=8"], ["threat.eps", "8/255"]),
    (["threat.eps=-0.1"], ["threat.eps"]),
    (["threat.eps=eight"], ["threat.eps", "'8/255'"]),
    (["regularizers.sensitivity.layers=[stage9]"], ["regularizers.sensitivity.layers", "stage9", "stage3"]),
    (["probe.layers=[nowhere]"], ["probe.layers", "nowhere"]),
    (["regularizers.pse.scale=big"], ["regularizers.pse.scale", "share"]),
    (["defense=none"], ["regularizers.pse", "no attack"]),
    (["defense.attack.steps=0"], ["steps"]),
    (["defense.attack.start=none"], ["attack.start"]),
    (["data=arrays", "data.path=/nowhere/at/all"], ["data.path", "/nowhere/at/all"]),
    (["data=arrays"], ["data.path"]),
    (["data=cifar10", "data.root=/nowhere"], ["data.download"]),
    (["data.batch_size=100000"], ["data.batch_size"]),
    (["data.val_fraction=2"], ["data.val_fraction"]),
    (["panels.dissection.concepts.count=0"], ["panels.dissection", "count"]),
    (["panels.attribution.method=luck"], ["panels.attribution", "method"]),
    (["network=torchvision", "network.name=resnet999"], ["network.name", "resnet999"]),
    (["network=imported"], ["network.target"]),
    (["network=imported", "network.target=no_such_module:f"], ["network.target", "no_such_module"]),
    (["wandb.mode=sometimes"], ["wandb.mode", "offline"]),
    (["trainer.max_epochs=none"], ["trainer"]),
    (["trainer.precision=3"], ["precision"]),
    (["trainer.precision=bf16-true"], ["trainer.precision: expected 32-true, bf16-mixed", "found 'bf16-true'"]),
    (["trainer.precision=64-true"], ["trainer.precision", "found '64-true'"]),
    (["resume=/nowhere"], ["resume", "/nowhere"]),
    (["regularizers.pse.weight=abc"], ["PSE.weight", "abc"]),
    (["regularizers.pse.weight=-1"], ["PSE.weight"]),
    (["regularizers.pse.weight=nan"], ["PSE.weight"]),
    (["optimizer.lr=abc"], ["optimizer"]),
    (["optimizer.lr=-1"], ["optimizer", "-1"]),
    (["optimizer.lr=nan"], ["optimizer.lr"]),
    (["defense.attack.steps=2.5"], ["steps", "2.5"]),
    (["threat=l2", "threat.eps=128"], ["threat.eps", "128"]),
    (["trainer.limit_val_batches=0"], ["trainer.limit_val_batches"]),
    (["test_attacks=null"], ["test_attacks"]),
    (["name=../../evil"], ["name", "../../evil"]),
    (["probe.every_n_epochs=0"], ["probe.every_n_epochs"]),
    (["threads=-3"], ["threads"]),
    (["seed=abc"], ["seed", "abc"]),
    (["checkpoint_every=0"], ["checkpoint_every", ">= 1"]),
    (["ema=2"], ["ema", "(0, 1)", "2"]),
    (["awp.gamma=-1"], ["awp.gamma", "-1"]),
    (["defense=none", "regularizers=[]", "awp.gamma=0.005"], ["error: awp.gamma", "no attack"]),
    (["+trainer.enable_progress_bar=false"], ["trainer.enable_progress_bar: expected true", "False"]),
    (["+trainer.enable_checkpointing=false"], ["trainer.enable_checkpointing: expected true", "False"]),
    (
        ["health.limits._target_=x"],
        ["health.limits._target_: expected glassarmor.defenses.Limits, found 'x'"],
    ),
    (["defense.passes=separate"], ["defense.passes", "regularizers.pse", "joined"]),
    (["defense.attack_batchnorm=train"], ["defense.attack_batchnorm", "running or batch"]),
    (["defense.eps_share=2"], ["defense.eps_share", "[0, 1]"]),
    (["defense.loss.clean_ce.label_smoothing=1"], ["label_smoothing", "[0, 1)"]),
    (["defense=free_at", "defense.attack.replays=0"], ["defense.attack.replays"]),
    (["defense=free_at", "+trainer.accumulate_grad_batches=2"], ["trainer.accumulate_grad_batches", "Free-AT"]),
    (["panels.attribution.method=magic"], ["magic", "integrated_gradients"]),
]


def clash(setting: str, overrides: list[str]) -> bool:
    """Whether a setting belongs to an option that the overrides exchange."""
    groups = [o.split("=")[0] for o in overrides if "." not in o.split("=")[0]]
    return setting.split(".")[0] in groups


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        pytest.param(overrides, words, id=" ".join(overrides), marks=[pytest.mark.long] if i % 3 == 2 else [])
        for i, (overrides, words) in enumerate(ERRORS)
    ],
)
def test_bad_input_gets_one_clear_message(overrides, words, tmp_path: Path, monkeypatch, capsys) -> None:
    bare = [] if any(o.startswith(("panels", "wandb")) for o in overrides) else BARE
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *[q for q in QUICK if not clash(q, overrides)], *bare, f"out={tmp_path}", *overrides)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert [word for word in words if word not in said] == []
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


@pytest.mark.long
def test_unknown_keys_and_groups_are_named(tmp_path: Path) -> None:
    for override, word in (("data.batchsize=3", "batchsize"), ("defense=nothing", "nothing")):
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), f"out={tmp_path}", override],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode != 0
        assert word in done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_stack_trace(tmp_path: Path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        command(monkeypatch, *QUICK, *BARE, f"out={tmp_path}", "threat.eps=8", "debug=true")
    assert "Traceback" in capsys.readouterr().err


def test_a_dead_wandb_server_does_not_end_the_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr("glassarmor.lightning_modules.run.log.INIT_TIMEOUT", 2)
    with pytest.warns(UserWarning, match="offline"):
        logger = wandb_logger(tmp_path, "glassarmor", "online", "abc123", "run", {})
    assert logger is not None
    logger.log_metrics({"value": 1.0}, 0)
    RunLog(tmp_path, None, logger).close()
    assert any(row.get("value") == 1.0 for row in history(tmp_path / "wandb"))


def _any_module(base: type) -> Any:
    """Somebody's own LightningModule, of either Lightning."""

    class Own(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
            self.head = nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(nn.functional.dropout(self.body(x).mean((2, 3)), 0.1, self.training))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    return Own()


@pytest.mark.parametrize("library", [pl, lightning.pytorch], ids=["pytorch_lightning", "lightning.pytorch"])
def test_the_dashboard_serves_any_module_and_leaves_it_alone(library: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(24, 1, 16, 16, generator=generator), torch.arange(24) % 10
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8)
    ends = []
    for watched in (False, True):
        callbacks = []
        if watched:
            log = RunLog(tmp_path, ReportPage(tmp_path / "report", "own"))
            ids = tuple(f"image-{i}" for i in range(4))
            names = tuple("abcdefghij")
            callbacks = [Dashboard({"pse": PSEPanel((4, 4))}, x[:4], y[:4], ids, PGD(Linf("8/255"), 2), names, log=log)]
        module = _any_module(library.LightningModule)
        torch.manual_seed(3)
        library.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            default_root_dir=str(tmp_path),
        ).fit(module, batches)
        ends.append({**module.state_dict(), "random": torch.rand(3)})
    assert_same(ends[0], ends[1])
    assert [e["epoch"] for e in read_script(tmp_path / "report" / "data" / "manifest.js")["epochs"]] == [0, 1]


def test_a_net_that_guesses_is_marked_wherever_it_appears_and_no_epoch_of_it_is_the_best(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("NETRC", os.devnull)
    quick = (*QUICK[:-2], "threads=1", "trainer.max_epochs=1", "panels=[]", "regularizers=[]", "optimizer.lr=0")
    command(monkeypatch, *quick, "wandb.mode=disabled", "compare_undefended=false", f"out={tmp_path}", "name=run")
    folder, marked = tmp_path / "run", "defended, last epoch (guesses)"
    results = json.loads((folder / "results.json").read_text())
    assert results["guessing"] == ["defended, last epoch"]
    assert not {"best_epoch", "selection", "defended, best epoch"} & results.keys()
    assert not (folder / "checkpoints" / "best.ckpt").exists()
    assert RunFolder(folder).judged == folder / "checkpoints" / "last.ckpt"
    said = " ".join(capsys.readouterr().out.split())
    assert marked in said
    assert "best epoch none: no epoch was finite and better than guessing on the held-out images" in said
    assert marked in (folder / "report" / "index.html").read_text()
    assert compare.results_table([compare.read_run(folder)]).rows[0][1] == marked
    card = record_of(folder)
    assert card.selected == {}
    write_record(card, tmp_path / "card.json")
    assert [found.guesses for found in read_record(tmp_path / "card.json").evaluations.values()] == [True]
    table = tables.accuracy_table(comparison.settings_of([card]), "defended, last epoch")
    assert ", guesses in seed 0" in str(table.rows[0][2])


def test_a_run_that_an_alarm_stopped_says_so_by_its_exit_code(monkeypatch, capsys) -> None:
    def stopped() -> None:
        raise Stopped("no better than guessing: still so after 2 safety measures")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as ended:
        run_command(stopped, train.CONFIGS, "train", "")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "stopped: no better than guessing: still so after 2 safety measures\n"


def test_more_dashboard_images_than_there_are_takes_all_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config(*SMALL[1:3], "probe.size=100000")
    data = instantiate(cfg.data, _convert_="all")
    data.setup("fit")
    assert len(train.probe_of(cfg, data).y) == len(data.val)
    assert f"all {len(data.val)} validation images are shown, for there are fewer than 100000" in capsys.readouterr().out
    cfg.probe.size = 0
    with pytest.raises(ValueError, match=r"probe\.size: expected a whole number >= 1, found 0"):
        train.probe_of(cfg, data)
