"""The average of the weights is what is judged, kept and shown; training and resuming are as without it."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import Any

import hydra
import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate

from glassarmor.interpret.views.view import Probe, View
from glassarmor.lightning_modules.callbacks import health as health_module
from glassarmor.lightning_modules.callbacks.averaging import Averaging
from glassarmor.lightning_modules.callbacks.checkpointing import Checkpoints
from glassarmor.lightning_modules.callbacks.dashboard import Dashboard
from glassarmor.lightning_modules.commands import train
from tests.composing import SMALL, config, without_guessing

QUICK = (
    *SMALL, "defense=n_fgsm", "regularizers=[sensitivity]", "panels=[]", "val_attack.steps=2", "probe.attack.steps=2",
    "trainer.max_epochs=3", "threads=1", "wandb.mode=disabled", "compare_undefended=false",
    "select.within=null", "ema=0.9",
    )  # fmt: skip


def command(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    train.main()


def state(run: Path, name: str, key: str = "state_dict") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)[key]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    without_guessing(monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    """A whole run, and the weights after each step, current ones."""
    out, steps = tmp_path_factory.mktemp("runs"), []

    class Watch(Averaging):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *rest)
            steps.append({key: value.clone() for key, value in pl_module.net.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETRC", os.devnull)
        patch.setattr(train, "averaging", lambda decay: [Watch(decay)])
        without_guessing(patch)
        command(patch, *QUICK, f"out={out}", "name=whole")
    return out / "whole", steps


def test_the_checkpoint_holds_the_average_buffers_included(run) -> None:
    folder, steps = run
    assert len(steps) == 3 * 4
    average = {key: value.double() for key, value in steps[0].items()}
    for weights in steps[1:]:
        average = {key: 0.9 * value + 0.1 * weights[key].double() for key, value in average.items()}
    kept, current = state(folder, "last"), state(folder, "last", "current_model_state")
    assert any("running_var" in key for key in average)
    for key, value in average.items():
        if value.dim():  # the count of batches is a whole number
            torch.testing.assert_close(kept[f"net.{key}"].double(), value, rtol=1e-4, atol=1e-6)
            assert torch.equal(current[f"net.{key}"], steps[-1][key])
    assert not torch.equal(kept["net.head.weight"], current["net.head.weight"])


def test_the_average_is_what_selects(run) -> None:
    """The best checkpoint's weights, judged again, give the accuracy that its epoch was selected by."""
    folder, _ = run
    cfg = config(*QUICK)
    parts = train.build(cfg)
    parts.module.load_state_dict(state(folder, "best"))
    trainer = instantiate(cfg.trainer, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (judged,) = trainer.validate(parts.module, datamodule=parts.data, verbose=False)
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["epoch"]
    for name in ("val/robust_acc", "val/clean_acc"):
        assert judged[name] == pytest.approx(float(rows[best][name]), abs=1e-6)
    assert float(rows[best]["val/robust_acc"]) == max(float(row["val/robust_acc"]) for row in rows)


@pytest.mark.long
def test_training_goes_on_from_the_weights_themselves(run, tmp_path: Path, monkeypatch) -> None:
    folder, _ = run
    command(monkeypatch, *QUICK[:-1], f"out={tmp_path}", "name=plain")
    plain, current = state(tmp_path / "plain", "last"), state(folder, "last", "current_model_state")
    assert plain.keys() == current.keys()
    assert [key for key in plain if not torch.equal(plain[key], current[key])] == []


@pytest.mark.long
def test_an_interrupted_run_resumes_exactly(run, tmp_path: Path, monkeypatch) -> None:
    original, seen = train.RobustClassifier.training_step, 0

    def fail(module: Any, batch: Any, batch_idx: int) -> Any:
        nonlocal seen
        seen += 1
        if seen > 6:  # in the middle of the second epoch
            raise KeyError("cut")
        return original(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(train.RobustClassifier, "training_step", fail)
        with pytest.raises(SystemExit):
            command(monkeypatch, *QUICK, f"out={tmp_path}", "name=cut")
    command(monkeypatch, f"resume={tmp_path / 'cut'}")
    for name in ("last", "best"):
        for key in ("state_dict", "current_model_state"):
            one, other = state(run[0], name, key), state(tmp_path / "cut", name, key)
            assert [k for k in one if not torch.equal(one[k], other[k])] == [], (name, key)


def test_the_dashboard_shows_the_average_and_the_checkpoint_is_written_after_it(tmp_path: Path) -> None:
    cfg = config(*QUICK)
    parts = train.build(cfg)
    order, shown = [], []

    class Log:
        folder = tmp_path

        def epoch(self, *_: object) -> None:
            order.append("dashboard")

    class Best(pl.callbacks.ModelCheckpoint):
        def _save_checkpoint(self, trainer: pl.Trainer, path: str) -> None:
            order.append("checkpoint")
            super()._save_checkpoint(trainer, path)

    def panel(probe: Probe) -> View:
        shown.append({key: value.clone() for key, value in probe.net.state_dict().items()})
        return View("panel", "Panel", "", ())

    few = parts.data.probe(2)
    attack = instantiate(cfg.probe.attack)
    dashboard = Dashboard({"panel": panel}, few.x, few.y, few.ids, attack, parts.data.class_names, log=Log())
    average = Averaging(0.9)
    dashboard.net_of = average.net_of
    trainer = instantiate(
        cfg.trainer, logger=False, enable_progress_bar=False, max_epochs=1,
        callbacks=[average, dashboard, Best(tmp_path, "best", save_on_train_epoch_end=True)],
    )  # fmt: skip
    trainer.fit(parts.module, datamodule=parts.data)
    assert order == ["dashboard", "checkpoint"]
    kept = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    assert len(shown) == 2  # rehearsed, then drawn
    assert [key for key, value in shown[1].items() if not torch.equal(value, kept[f"net.{key}"])] == []
    assert all(torch.equal(value, parts.module.net.state_dict()[key]) for key, value in shown[1].items())


def test_who_sees_which_weights_and_in_which_order(tmp_path: Path, monkeypatch) -> None:
    """The order of ``train.py``: health reads the training weights, validation and dashboard the average, files hold both.

    At the start, in the middle of the epoch (steps 2 and 3 of 4) and at its end; what was swapped in is swapped out again.
    """
    Weights = dict[str, torch.Tensor]
    seen: list[tuple[int, str, Weights]] = []
    training: dict[int, Weights] = {}
    average: dict[int, Weights] = {}
    trainers: list[pl.Trainer] = []

    def copied(net: torch.nn.Module) -> Weights:
        return {key: value.clone() for key, value in net.state_dict().items()}

    def see(who: str, weights: Weights) -> None:
        if trainers:  # not the rehearsals before training
            seen.append((trainers[0].global_step, who, weights))

    class Watch(Averaging):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainers.append(trainer)
            training[0], average[0] = copied(pl_module.net), copied(self.net_of(pl_module))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *rest)
            step = trainer.global_step
            training[step], average[step] = copied(pl_module.net), copied(self.net_of(pl_module))

    def measure(net: torch.nn.Module, *_: Any, **__: Any) -> dict[str, float]:
        see("health", copied(net))
        return {"nonfinite": 0.0}

    validate, look, written = train.RobustClassifier.validation_step, Dashboard.look, Checkpoints.written

    def validated(module: Any, *batch: Any) -> Any:
        see("validation", copied(module.net))
        return validate(module, *batch)

    def looked(dashboard: Dashboard, net: torch.nn.Module, *rest: Any, **more: Any) -> Any:
        see("dashboard", copied(net))
        return look(dashboard, net, *rest, **more)

    def kept(checkpoints: Checkpoints, trainer: Any, path: Path) -> bool:
        done = written(checkpoints, trainer, path)
        saved = torch.load(path, weights_only=True)
        for part, name in (("state_dict", "average"), ("current_model_state", "training")):
            net = {key.removeprefix("net."): value for key, value in saved[part].items() if key.startswith("net.")}
            see(f"{path.stem}, {name}", net)
        return done

    monkeypatch.setattr(train, "averaging", lambda decay: [Watch(decay)])
    monkeypatch.setattr(health_module, "measure", measure)
    monkeypatch.setattr(train.RobustClassifier, "validation_step", validated)
    monkeypatch.setattr(Dashboard, "look", looked)
    monkeypatch.setattr(Checkpoints, "written", kept)
    monkeypatch.setenv("NETRC", os.devnull)
    command(
        monkeypatch, *QUICK, "panels=[training]", "trainer.max_epochs=1", "health.every_n_steps=2", "checkpoint_every=2",
        f"out={tmp_path}", "name=order",
    )  # fmt: skip

    def files(name: str) -> list[str]:
        return [f"{name}, average", f"{name}, training"]

    reading = ["health", *files("healthy")]
    order = {0: reading, 2: reading + files("next"), 3: files("next")}
    order[4] = [*reading, "validation", *reading, "dashboard", *files("best"), *files("next")]  # next becomes last
    assert [(step, who) for step, who, _ in seen] == [(step, who) for step in order for who in order[step]]
    for step, who, weights in seen:
        shown = training if who == "health" or who.endswith("training") else average
        different = [key for key, value in shown[step].items() if not torch.equal(value, weights[key])]
        assert different == [], f"{who} at step {step}"
    for step in (2, 3, 4):
        assert not torch.equal(training[step]["head.weight"], average[step]["head.weight"]), "else nothing is tested"


@pytest.mark.parametrize("decay", [0, 1, 1.0, -0.1, "0.9", True])
def test_bad_decay(decay) -> None:
    with pytest.raises(ValueError, match=r"ema: expected null or a decay in \(0, 1\), found"):
        Averaging(decay)
