"""A run that watches itself: the same weights where nothing is wrong, an exact way back where something is."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import hydra
import pytest
import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from glassarmor.defenses.attacks.pgd import NFGSM, PGD
from glassarmor.defenses.monitoring.alarms import ABOUT_ATTACKS, KINDS, Limits, remedy
from glassarmor.defenses.training.terms import Ramp
from glassarmor.interpret.storage import read_lines
from glassarmor.interpret.views.page.page import ReportPage, read_script
from glassarmor.lightning_modules.callbacks import health as module_under_test
from glassarmor.lightning_modules.callbacks.averaging import averaging
from glassarmor.lightning_modules.callbacks.checkpointing import Checkpoints
from glassarmor.lightning_modules.callbacks.health import Health, watch
from glassarmor.lightning_modules.commands import train
from glassarmor.lightning_modules.commands.errors import require_class
from glassarmor.lightning_modules.run.log import RunLog
from tests.composing import SMALL, config
from tests.wandb_log import finished

TINY = (
    *SMALL, "data.train_limit=80", "data.batch_size=16", "defense=fgsm_rs", "regularizers=[sensitivity]", "panels=[]",
    "val_attack.steps=1", "probe.attack.steps=1",
    "trainer.max_epochs=3", "threads=1", "health.images=8", "health.background=20", "health.steps=1",
    "health.thorough_every=5",
)  # fmt: skip
WELL = {"nonfinite": 0.0, "fgsm": 0.5, "pgd": 0.5, "gap": 0.0}
NOISE = re.escape("one-step attack from noise of 2ε (N-FGSM)")
ILL = {"nonfinite": 0.0, "fgsm": 0.8, "pgd": 0.1, "gap": 0.7}


class Fit:
    """One small training with the health callback, whose readings are scripted where a script is given."""

    def __init__(
        self, folder: Path, *overrides: str, script: list[dict] | None = None, ema: float | None = None,
        monitored: bool = True, resume: bool = False, extra: list[pl.Callback] | None = None, trial: int = 20,
    ) -> None:  # fmt: skip
        cfg = config(*TINY, *overrides)
        parts = train.build(cfg)
        self.module, average = parts.module, averaging(ema)
        self.health = watch(instantiate(cfg.health, _convert_="all"), self.module, parts.data) if monitored else []
        folder.mkdir(exist_ok=True)
        self.folder, self.log = folder, RunLog(folder, ReportPage(folder / "report", "run"))
        for health in self.health:
            health.log_to = self.log
        self.trainer = instantiate(
            cfg.trainer, logger=False, enable_progress_bar=False,
            callbacks=[*average, *self.health, *(extra or []), Checkpoints(folder / "checkpoints")],
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            self.thorough: list[bool] = []  # of each scripted reading
            self.shares: list[float] = []  # of ε
            patch.setattr(module_under_test, "LEAST_TRIAL", trial)
            if script is not None:
                left = iter(script)

                def scripted(*_: Any, thorough: bool, eps_share: float, **__: Any) -> dict[str, float]:
                    self.thorough.append(thorough)
                    self.shares.append(eps_share)
                    return dict(next(left))

                patch.setattr(module_under_test, "measure", scripted)
            self.trainer.fit(
                self.module, datamodule=parts.data, weights_only=True, ckpt_path=str(self.last) if resume else None
            )

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_lines(self.folder / "health.jsonl") if event["event"] == kind]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_healthy_run_ends_in_the_same_weights_as_one_that_is_not_watched(tmp_path: Path) -> None:
    any_accuracy = ("health.limits.guess=null", "health.limits.one_class=null")  # 12 steps teach next to nothing
    watched = Fit(tmp_path / "a", "health.every_n_steps=3", *any_accuracy, ema=0.9)
    plain = Fit(tmp_path / "b", monitored=False, ema=0.9)
    assert same(watched.module.state_dict(), plain.module.state_dict())
    assert same(watched.trainer.optimizers[0].state_dict(), plain.trainer.optimizers[0].state_dict())
    assert [event["step"] for event in watched.events("reading")] == [3, 4, 6, 8, 9, 12, 12]
    assert watched.events("alarm") == []
    thorough = ["margin" in event["values"] for event in watched.events("reading")]
    assert thorough == [True, False, False, False, False, True, True], (
        "every fifth, and the last one, which stays on the page"
    )
    healthy = torch.load(tmp_path / "a" / "checkpoints" / "healthy.ckpt", weights_only=True)
    assert healthy["global_step"] == 12


GUESS = {**WELL, "guess": 1.5, "one_class": 1.0}
KNOW = {**WELL, "guess": 0.3, "one_class": 0.1}


def healthy_step(run: Fit) -> int:
    return int(torch.load(run.folder / "checkpoints" / "healthy.ckpt", weights_only=True)["global_step"])


def test_a_net_that_guesses_is_not_kept_as_healthy_and_raises_no_alarm_before_the_end(tmp_path: Path) -> None:
    run = Fit(tmp_path / "run", script=[GUESS, GUESS, GUESS, GUESS])
    (alarm,) = run.events("alarm")
    assert (alarm["step"], alarm["action"]) == (12, "warned"), "12 steps are fewer than the grace, but none follows"
    assert run.health[0].grace == 50
    assert "no better than guessing" in run.health[0].verdict
    assert run.health[0].rollback.rollbacks == 0
    assert healthy_step(run) == 0, "the start is a place to go back to, and nothing after it is better"
    run = Fit(tmp_path / "learns", "trainer.max_epochs=2", script=[GUESS, GUESS, KNOW])
    assert healthy_step(run) == 8


@pytest.mark.long
@pytest.mark.parametrize("reading", [GUESS, {**KNOW, "one_class": 0.97}])
def test_a_net_that_falls_back_to_guessing_is_rolled_back_with_half_the_rate(tmp_path: Path, reading: dict) -> None:
    run = Fit(tmp_path / "run", script=[GUESS, KNOW, reading, KNOW])
    (alarm,) = run.events("alarm")
    assert (alarm["kind"], alarm["step"]) == ("guessing", 8)
    assert alarm["action"] == "rolled back to step 4; from here on: half the learning rate"
    assert run.health[0].rollback.measures == ["lower_rate"]
    assert healthy_step(run) == 12
    assert isinstance(run.module.defense.attack, PGD)
    assert not isinstance(run.module.defense.attack, NFGSM)


@pytest.mark.long
def test_a_net_that_never_learns_raises_the_alarm_after_its_grace(tmp_path: Path) -> None:
    run = Fit(tmp_path / "run", "health.grace=12", "health.actions.guessing=warn", script=[GUESS] * 4)
    (alarm,) = run.events("alarm")
    assert (alarm["kind"], alarm["step"], alarm["action"]) == ("guessing", 12, "warned")
    both = Fit(tmp_path / "both", script=[GUESS, KNOW, {**ILL, **{k: GUESS[k] for k in ("guess", "one_class")}}, KNOW])
    assert {event["kind"] for event in both.events("alarm")} == {"catastrophic", "guessing"}
    assert both.health[0].rollback.measures == ["noise"], "where an attack is to blame, too, it is made safer first"


class Spy(pl.Callback):
    """What training had changed: as of each step's start (after any rollback) and of each ``healthy.ckpt``."""

    def __init__(self) -> None:
        self.at: dict[int, Any] = {}
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        averages = [c for c in trainer.callbacks if isinstance(c, pl.callbacks.WeightAveraging)]
        state = {
            "module": pl_module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict()["state"],
            "average": [c._average_model.state_dict() for c in averages],
        }
        self.at[trainer.global_step] = copy.deepcopy(state)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_rollback_is_exact_and_the_schedule_goes_on(tmp_path: Path, ema: float | None) -> None:
    """Start, step 4 (healthy), step 8 (collapsed): step 9 begins where step 5 began, but with N-FGSM and its own rate."""
    spy, plain = Spy(), Spy()
    run = Fit(tmp_path / "a", script=[WELL, WELL, ILL, WELL], ema=ema, extra=[spy])
    if ema is None:
        Fit(tmp_path / "b", monitored=False, extra=[plain])
        assert same(spy.at[7], plain.at[7])
        assert not same(spy.at[4]["module"], plain.at[8]["module"])
        assert spy.rates == plain.rates, "the schedule goes on"
    skip = {"train_accuracy", "train_loss", "train_terms"}
    for part in ("optimizer", "average"):
        assert same(spy.at[8][part], spy.at[4][part]), part
    for key, value in spy.at[8]["module"].items():
        assert key.split(".")[0] in skip or torch.equal(value, spy.at[4]["module"][key]), key
    assert any("sensitivity" in key or "terms" in key for key in spy.at[8]["module"]), "running estimates are part of it"
    assert isinstance(run.module.defense.attack, NFGSM)
    (alarm,) = run.events("alarm")
    assert (alarm["kind"], alarm["step"], alarm["epoch"]) == ("catastrophic", 8, 1)
    assert alarm["action"].startswith("rolled back to step 4; from here on: one-step attack from noise")
    assert alarm["values"] == {"gap": 0.7, "fall": 0.4}
    assert run.trainer.global_step == 12, "the run goes to its end"


@pytest.mark.long
@pytest.mark.parametrize("after", [8, pytest.param(10, marks=pytest.mark.long)])
def test_a_resumed_run_knows_what_it_learned(tmp_path: Path, after: int) -> None:
    """Cut right after the collapse, before the rollback, or after it: the same weights as without a cut."""

    class Cut(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == after:
                raise KeyError("cut")

    script, folder = [WELL, WELL, ILL, WELL], tmp_path / "cut"
    whole = Fit(tmp_path / "whole", script=script)
    with pytest.raises(KeyError):
        Fit(folder, script=script, extra=[Cut()])
    again = Fit(folder, script=[WELL], resume=True)
    assert same(again.module.state_dict(), whole.module.state_dict())
    assert isinstance(again.module.defense.attack, NFGSM)
    assert again.health[0].rollback.measures == ["noise"]
    assert again.events("alarm") == whole.events("alarm"), "each once"
    assert [e["step"] for e in again.events("reading")] == [e["step"] for e in whole.events("reading")]


@pytest.mark.long
@pytest.mark.parametrize(("harm", "last"), [("cut short", False), ("missing", True)])
def test_a_healthy_state_that_cannot_be_read_ends_no_run(tmp_path: Path, capsys, harm: str, last: bool) -> None:
    """Damaged before the alarm is told (at the end), or between the alarm and the step that would begin from it."""
    path, first = tmp_path / "run" / "checkpoints" / "healthy.ckpt", "on_train_epoch_start" if last else "on_train_epoch_end"

    class Harm(pl.Callback):
        def hurt(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 1:
                path.write_bytes(path.read_bytes()[:3000]) if harm == "cut short" else path.unlink()

    setattr(Harm, first, Harm.hurt)
    script = [WELL, WELL, ILL] if last else [WELL, WELL, ILL, WELL]
    run = Fit(tmp_path / "run", f"trainer.max_epochs={2 if last else 3}", script=script, extra=[Harm()])
    assert run.health[0].rollback.measures == ["noise"], "the safety measure is in force all the same"
    says = rf"no healthy state to go back to \(.*healthy\.ckpt is no readable checkpoint \(.+\)\); from here on: {NOISE}"
    told = [line for line in capsys.readouterr().out.splitlines() if re.search(says, line)]
    assert len(told) == 1
    assert bool(re.fullmatch(says, run.events("alarm")[0]["action"])) == last, "what the page says is what was done"
    if not last:
        assert run.trainer.global_step == 12
        assert healthy_step(run) == 12, "a later reading that is well is a place to go back to again"


@pytest.mark.parametrize("ema", [0.9, pytest.param(None, marks=pytest.mark.long)])
def test_a_collapse_in_the_last_reading_leaves_the_healthy_weights(tmp_path: Path, ema: float | None) -> None:
    run = Fit(tmp_path / "run", script=[WELL, WELL, WELL, ILL], ema=ema)
    healthy, last = (torch.load(run.folder / "checkpoints" / f"{n}.ckpt", weights_only=True) for n in ("healthy", "last"))
    assert healthy["global_step"] == 8
    assert last["global_step"] == 12
    for key in ("state_dict", "optimizer_states", *(("current_model_state",) if ema else ())):
        assert same(last[key], healthy[key]), key
    net = {key: value for key, value in healthy["state_dict"].items() if key.startswith("net.")}
    assert same({f"net.{k}": v for k, v in run.module.net.state_dict().items()}, net)
    (state,) = (v for k, v in last["callbacks"].items() if k.startswith("Health"))
    assert state["measures"] == ["noise"]
    assert state["pending"] == []


def test_a_loss_that_is_not_finite_is_survived_with_half_the_rate(tmp_path: Path, monkeypatch) -> None:
    original = train.RobustClassifier.training_step

    def poisoned(module: Any, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return original(module, (x * float("nan") if module.global_step == 5 else x, y), batch_idx)

    monkeypatch.setattr(train.RobustClassifier, "training_step", poisoned)
    spy, plain = Spy(), Spy()
    run = Fit(tmp_path / "a", "trainer.max_epochs=2", script=[WELL, WELL, WELL], extra=[spy])
    (alarm,) = run.events("alarm")
    assert alarm["kind"] == "nonfinite"
    assert "training diverged at step 5" in alarm["text"]
    assert "half the learning rate" in alarm["action"]
    assert all(bool(v.isfinite().all()) for v in run.module.net.state_dict().values())
    with pytest.raises(FloatingPointError, match="training diverged at step 5"):
        Fit(tmp_path / "b", "trainer.max_epochs=2", monitored=False, extra=[plain])
    assert spy.rates[:6] == plain.rates
    # a step's rate is set after the step before: the first after the rollback is halved where it stands
    cosine = [0.5 * (1 + math.cos(math.pi * (step - 1) / 7)) for step in (6, 7)]
    assert spy.rates[6:] == pytest.approx([0.5 * 0.1 * share for share in cosine])


def test_a_loss_that_ends_the_run_is_told_as_an_alarm(tmp_path: Path, monkeypatch) -> None:
    original = train.RobustClassifier.training_step

    def poisoned(module: Any, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return (
            original(module, (x * float("nan"), y), batch_idx)
            if module.global_step == 2
            else original(module, batch, batch_idx)
        )

    monkeypatch.setattr(train.RobustClassifier, "training_step", poisoned)
    with pytest.raises(FloatingPointError, match="training diverged at step 2"):
        Fit(tmp_path / "run", "health.actions.nonfinite=stop", script=[WELL, WELL])
    (line,) = [json.loads(text) for path in tmp_path.rglob("health.jsonl") for text in path.read_text().splitlines()
               if '"alarm"' in text]  # fmt: skip
    assert line["kind"] == "nonfinite"
    assert line["text"].startswith("not finite: the loss (training diverged at step 2")


def test_warn_and_stop(tmp_path: Path) -> None:
    run = Fit(tmp_path / "warn", "health.actions.catastrophic=warn", script=[WELL, ILL, ILL, WELL])
    assert [(e["kind"], e["action"]) for e in run.events("alarm")] == [("catastrophic", "warned")], "said once"
    assert isinstance(run.module.defense.attack, PGD)
    assert not isinstance(run.module.defense.attack, NFGSM)
    assert run.health[0].views()[0].answers[0].command == "", "well at the end: nothing to try"
    run = Fit(tmp_path / "stop", "health.actions.catastrophic=stop", script=[WELL, ILL])
    assert run.trainer.global_step == 4
    (answer,) = run.health[0].views()[0].answers
    assert answer.text.startswith("Not healthy: catastrophic overfitting")
    assert answer.command == "python train.py regularizers=[sensitivity,grad_align]"


@pytest.mark.long
def test_a_net_with_masked_gradients_is_not_kept_as_healthy_by_a_reading_that_does_not_look(tmp_path: Path) -> None:
    masked, clear = {**WELL, "noise_wins": 0.5}, {**WELL, "noise_wins": 0.0}
    run = Fit(tmp_path / "run", "trainer.max_epochs=4", script=[clear, clear, masked, WELL, WELL])
    assert [(e["kind"], e["step"]) for e in run.events("alarm")] == [("masked", 8)], "told once"
    assert healthy_step(run) == 4
    assert run.health[0].present == ("masked",)
    run = Fit(tmp_path / "clears", script=[clear, masked, WELL, clear])
    assert healthy_step(run) == 12


def test_without_a_healthy_state_masked_gradients_are_measured_before_they_are_blamed_again(tmp_path: Path) -> None:
    masked, clear = {**WELL, "noise_wins": 0.5}, {**WELL, "noise_wins": 0.0}
    script = [{"nonfinite": 1.0}, masked, clear, WELL, clear]
    run = Fit(tmp_path / "run", "health.actions.masked=rollback", "trainer.max_epochs=4", script=script, trial=1)
    assert run.thorough == [True, True, True, False, True]
    assert len(run.events("alarm")) == 1
    assert healthy_step(run) == 16


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_proposed_is_a_command_that_changes_what_it_says(kind: str) -> None:
    said, words = remedy(kind, ("pse",), 0.1)
    cfg = config("defense=fgsm_rs", *shlex.split(words))
    if kind == "masked":
        assert (said, words) == ("", ""), "an evaluation is proposed instead"
    elif kind == "overfitting":
        assert cfg.ema == 0.999
    elif kind in ABOUT_ATTACKS:
        assert list(cfg.regularizers) == ["pse", "grad_align"]
        _, words = remedy(kind, ("grad_align",), 0.1)
        assert isinstance(instantiate(config("defense=fgsm_rs", *shlex.split(words)).defense.eps_share), Ramp)
    else:
        assert cfg.optimizer.lr == 0.05


COLLAPSED = {**ILL, "pgd": 0.0, "gap": 0.8}


@pytest.mark.long
@pytest.mark.parametrize("start", [{"nonfinite": 0.0, "dead": 0.9}, ILL])
def test_an_untrained_net_is_a_place_to_go_back_to_for_one_that_withstands_nothing(tmp_path: Path, start: dict) -> None:
    run = Fit(tmp_path / "run", "trainer.max_epochs=3", script=[start, COLLAPSED, COLLAPSED, WELL], trial=8)
    told = [event["action"] for event in run.events("alarm")]
    assert told[0] == "warned: the net is given until step 8", "that early the alarm is about a net that has not learnt"
    assert told[1].startswith("rolled back to step 0; from here on: one-step")
    run = Fit(tmp_path / "more", "trainer.max_epochs=2", script=[start, ILL, WELL], trial=1)
    (event,) = run.events("alarm")
    assert event["action"].startswith("stays where it is, for step 0 did not clearly withstand more; from here on: one-step")
    assert healthy_step(run) == 8


def worse(pgd: float) -> dict[str, float]:
    return {**ILL, "pgd": pgd, "gap": 0.8 - pgd}


@pytest.mark.long
def test_a_measure_is_on_trial_and_undone_where_it_does_not_help(tmp_path: Path) -> None:
    """Collapsed at step 8 with 10 %; N-FGSM is given until step 16 and ends at 5 %; two steps take its place."""
    script = [WELL, WELL, ILL, worse(0.05), worse(0.05), WELL, WELL]
    spy = Spy()
    run = Fit(tmp_path / "run", "trainer.max_epochs=6", script=script, trial=8, extra=[spy])
    told = [event["action"] for event in run.events("alarm")]
    assert told[0].startswith("rolled back to step 4; from here on: one-step")
    assert told[1] == "warned: one-step attack from noise of 2ε (N-FGSM) is given until step 16"
    assert told[2].startswith(
        "one-step attack from noise of 2ε (N-FGSM) did not help and is undone; rolled back to step 4; "
    )
    assert told[2].endswith("from here on: two attack steps instead of one")
    (health,) = run.health
    assert (health.rollback.measures, health.rollback.failed, health.rollback.trial, health.rollback.rollbacks) == (
        ["two_steps"],
        ["noise"],
        {},
        2,
    )
    attack = run.module.defense.attack
    assert (type(attack), attack.steps) == (PGD, 2)
    assert same(spy.at[16]["optimizer"], spy.at[4]["optimizer"]), "back where it was before"
    kept = Fit(
        tmp_path / "kept", "trainer.max_epochs=6", script=[WELL, WELL, ILL, worse(0.2), worse(0.2), WELL, WELL], trial=8
    )
    assert kept.health[0].rollback.measures == ["noise", "two_steps"], "what helps is kept, though it was not enough"


def test_where_no_measure_helps_the_run_goes_on_as_configured_from_its_best_state(tmp_path: Path) -> None:
    words = ("trainer.max_epochs=5", "health.safer=[noise]")
    run = Fit(tmp_path / "run", *words, script=[WELL, WELL, *[worse(0.05)] * 4], trial=4)
    told = [event["action"] for event in run.events("alarm")]
    assert told[1].endswith("did not help and is undone; rolled back to step 4; from here on: half the learning rate")
    assert told[2] == (
        "half the learning rate did not help and is undone; still so after 2 safety measures, there are no more; "
        "rolled back to step 4; from here on: no further measure"
    )
    assert told[3:] == ["warned: still so after 2 safety measures, there are no more"]
    (health,) = run.health
    assert (health.rollback.measures, health.rollback.failed, health.stopped) == ([], ["noise", "lower_rate"], "")
    assert type(run.module.defense.attack).__name__ == "FGSMRS"
    assert run.trainer.global_step == 20
    assert run.trainer.optimizers[0].param_groups[0]["initial_lr"] == pytest.approx(0.1), "the rate, too"


@pytest.mark.long
def test_a_net_that_only_guesses_is_stopped_where_rollbacks_cannot_help(tmp_path: Path) -> None:
    words = ("trainer.max_epochs=10", "health.grace=4", "health.most=2")
    run = Fit(tmp_path / "run", *words, script=[GUESS] * 11, trial=4)
    (health,) = run.health
    assert run.trainer.global_step == 36
    assert health.rollback.measures == ["lower_rate"] * 2
    assert health.stopped.startswith("no better than guessing: ")
    assert health.stopped.endswith("still so after 2 safety measures")
    assert run.events("alarm")[-1]["action"] == "stopped: still so after 2 safety measures"


def test_the_last_reading_goes_back_to_nothing_worse(tmp_path: Path) -> None:
    """The state kept is of a net that withstood less, or an untrained one: the last checkpoint stays as it is."""
    for name, script in (
        ("less", [WELL, worse(0.5), WELL, {**ILL, "pgd": 0.6, "gap": 0.3}]),
        ("start", [GUESS, GUESS, GUESS, ILL]),
    ):
        run = Fit(tmp_path / name, script=script, trial=1)
        last = torch.load(run.last, weights_only=True)
        net = {key: value for key, value in last["state_dict"].items() if key.startswith("net.")}
        assert same({f"net.{k}": v for k, v in run.module.net.state_dict().items()}, net)
        assert run.events("alarm")[-1]["action"].startswith("stays where it is"), name


def test_steps_back_are_not_taken_for_luck(tmp_path: Path) -> None:
    """Of 8 images the state kept withstands four and the present net three: no reason to lose what was learned since."""
    run = Fit(tmp_path / "run", "trainer.max_epochs=4", script=[WELL, WELL, {**ILL, "pgd": 0.375}, WELL, WELL])
    (event,) = run.events("alarm")
    assert event["action"].startswith("stays where it is, for step 4 did not clearly withstand more; from here on: one-step")
    assert run.health[0].rollback.measures == ["noise"]


def test_a_reading_knows_how_far_eps_has_climbed(tmp_path: Path) -> None:
    climbing = "defense.eps_share={_target_:glassarmor.defenses.training.terms.Ramp,start:0,end:1,epochs:1.5}"
    run = Fit(tmp_path / "run", climbing, script=[WELL] * 4)
    assert run.shares[0] == 0
    assert 0.4 < run.shares[1] < 0.7
    assert run.shares[2:] == [1, 1]


@pytest.mark.long
def test_the_limit_of_rollbacks_and_one_measure_after_the_other(tmp_path: Path) -> None:
    run = Fit(tmp_path / "most", "health.most=1", script=[WELL, WELL, ILL, ILL])
    told = [event["action"] for event in run.events("alarm")]
    assert told[0].startswith("rolled back to step 4; from here on: one-step")
    assert "still so after 1 safety measure, there are no more; rolled back to step 4; " in told[1]
    assert told[1].endswith("from here on: no further measure")
    run = Fit(tmp_path / "twice", script=[{"nonfinite": 1.0}, ILL, ILL, WELL], trial=1)
    assert (run.health[0].rollback.measures, run.health[0].rollback.failed) == (["two_steps"], ["noise"])
    assert "no healthy state to go back to" in run.events("alarm")[0]["action"]
    assert run.module.defense.attack.steps == 2


@functools.cache
def built() -> train.Parts:
    return train.build(config(*TINY))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("health.images=0", r"health\.images: expected null or a whole number >= 1, found 0"),
        ("health.every_n_steps=0.5", r"health\.every_n_steps"),
        ("health.every_n_epochs=null", "both null"),
        ("health.actions.masked=pray", r"health\.actions\.masked: expected one of .*pray"),
        ("+health.actions.boredom=warn", r"health\.actions\.boredom"),
        ("health.safer=[hope]", r"health\.safer: expected any of .*hope"),
        ("health.limits.gap=2", r"health\.limits\.gap: expected null or a share"),
        ("health.most=-1", r"health\.most"),
        ("health.grace=-1", r"health\.grace: expected null or a whole number >= 0"),
        ("health.images=100000", r"health\.images: expected 1 to"),
        ("health.limits=3", r"health\.limits: expected limits by name, .*; found 3"),
        ("health.limits=null", r"health\.limits: expected limits by name, .*; found None"),
        ("health.limits._target_=x", r"health\.limits\._target_: expected glassarmor\.defenses\.Limits, found 'x'"),
        ("health.limits._target_=builtins.dict", r"health\.limits\._target_: expected .*found 'builtins\.dict'"),
        ("health._target_=nowhere.Health", r"health\._target_: expected .*Health, found 'nowhere\.Health'"),
        ("health.actions=warn", r"health\.actions: expected actions by kind of alarm, .*; found 'warn'"),
        ("health.actions=null", r"health\.actions: expected .*; found None"),
        ("health.safer=null", r"health\.safer: expected a list, .*; found None"),
        ("health.safer=noise", r"health\.safer: expected a list, .*; found 'noise'"),
        ("health.safer=[[noise]]", r"health\.safer: expected any of"),
        ("health.threat=l2", r"health\.threat: expected a ball .*; found 'l2'"),
        ("health.threat=null", r"health\.threat: expected a ball .*; found None"),
    ],
)
def test_bad_values_are_refused_before_training(override: str, says: str) -> None:
    cfg = config(*TINY, override)
    parts = built()

    def monitor() -> None:
        require_class(cfg, "health", Health)
        require_class(cfg, "health.limits", Limits)
        watch(instantiate(cfg.health, _convert_="all"), parts.module, parts.data)

    with pytest.raises((ValueError, InstantiationException), match=says):  # Hydra wraps what a constructor says
        monitor()


def test_off_switches_it_off_and_an_undefended_net_is_not_blamed() -> None:
    cfg = config(*SMALL, "health=off")
    assert watch(instantiate(cfg.health), None, None) == []
    cfg = config(*TINY[:6], "defense=none", "regularizers=[]", "health.images=8")
    parts = train.build(cfg)
    (health,) = watch(instantiate(cfg.health, _convert_="all"), parts.module, parts.data)
    assert isinstance(health, Health)
    assert "catastrophic" not in health.watched
    assert {"masked", "nonfinite", "dead"} <= set(health.watched)


@pytest.fixture(scope="module")
def collapse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run as a user makes it: FGSM without noise at a large ε, which forgets in epoch 1 and collapses in epoch 3."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for key in ("WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(key, raising=False)
        patch.setenv("NETRC", os.devnull)
        planted = [
            "defense=pgd_at", "defense.attack.steps=1", "+defense.attack.start=none", "defense.attack.step_size=0.2",
            "threat.eps=0.2", "optimizer.lr=0.3", "regularizers=[]", "panels=[]", "network.width=0.5", "threads=1",
            "data.batch_size=64", "val_attack.steps=2", "probe.attack.steps=2", "trainer.max_epochs=4",
            "trainer.accelerator=cpu", "compare_undefended=false", f"out={out}", "name=planted", "wandb.mode=offline",
            "health.images=64",
        ]  # fmt: skip
        patch.setattr(sys, "argv", ["train.py", *planted])
        hydra.core.global_hydra.GlobalHydra.instance().clear()
        train.main()
    return out / "planted"


@pytest.mark.long
def test_a_planted_collapse_is_caught_rolled_back_and_survived(collapse: Path) -> None:
    events = read_lines(collapse / "health.jsonl")
    alarms = [event for event in events if event["event"] == "alarm"]
    assert [alarm["kind"] for alarm in alarms][:2] == ["guessing", "catastrophic"]
    assert alarms[0]["epoch"] <= 1
    assert alarms[0]["action"].startswith("rolled back")
    assert "did not help and is undone" in alarms[1]["action"]
    assert (collapse / "results.json").is_file(), "the run reaches its end"
    assert {event["epoch"] for event in events if event["event"] == "reading"} == {0, 1, 2, 3}
    for name in ("healthy", "best", "last"):
        torch.load(collapse / "checkpoints" / f"{name}.ckpt", weights_only=True)
    manifest = read_script(collapse / "report" / "data" / "manifest.js")
    assert [(a["epoch"], a["text"]) for a in manifest["alarms"]] == [(a["epoch"], a["text"]) for a in alarms]
    assert all(entry["headlines"][0]["name"] == "health" for entry in manifest["epochs"])
    assert any("Not healthy" in entry["headlines"][0]["headline"] for entry in manifest["epochs"])


@pytest.mark.long
def test_the_alert_is_in_the_wandb_log(collapse: Path) -> None:
    (path,) = (collapse / "wandb").glob("offline-run-*/run-*.wandb")
    records = finished(path)
    alerts = [record.alert for record in records if record.WhichOneof("record_type") == "alert"]
    alarms = [event for event in read_lines(collapse / "health.jsonl") if event["event"] == "alarm"]
    assert [alert.title for alert in alerts] == [alarm["text"].split(":")[0] for alarm in alarms]
    assert alarms[0]["text"] in alerts[0].text
    assert "rolled back" in alerts[0].text
    assert alerts[0].level == "ERROR"
    summary = {
        item.key or "/".join(item.nested_key): item.value_json for record in records for item in record.summary.update
    }
    assert json.loads(summary["health/alarm/catastrophic"]) == alarms[-1]["step"] or len(alarms) > 1
    assert any("health/gap" in (item.key or "/".join(item.nested_key)) for r in records for item in r.history.item)
