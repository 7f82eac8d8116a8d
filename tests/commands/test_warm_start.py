"""Training that starts from weights of before: what is taken, what learns and how fast, and what a run records of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import hydra
import pytest
import torch
from torch import nn

from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.threat import Linf
from glassarmor.defenses.training.defense import Defense
from glassarmor.defenses.training.terms import AdversarialCE
from glassarmor.lightning_modules.classifier import RobustClassifier
from glassarmor.lightning_modules.commands import train
from glassarmor.lightning_modules.learning import freeze
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN
from glassarmor.lightning_modules.schedules import piecewise
from tests.faulty import QUICK


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", os.devnull)


def run(patch: pytest.MonkeyPatch, folder: Path, *words: str) -> dict[str, torch.Tensor]:
    """``python train.py``, one epoch; returns the last weights."""
    named = (
        () if any(word.startswith("resume=") for word in words) else (*QUICK, f"out={folder.parent}", f"name={folder.name}")
    )
    patch.setattr(sys, "argv", ["train.py", *named, *(() if not named else ("trainer.max_epochs=1",)), *words])
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    train.main()
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}


def net(width: float = 0.25, classes: int = 10) -> SmallCNN:
    return SmallCNN(num_classes=classes, in_channels=1, mean=(0.3,), std=(0.3,), width=width)


def classifier(of: nn.Module, **options: object) -> RobustClassifier:
    defense = Defense(PGD(Linf(0.1), steps=1), {"ce": AdversarialCE()})
    return RobustClassifier(of, defense, PGD(Linf(0.1), steps=1), 10, lambda p: torch.optim.SGD(p, 0.1), **options)  # type: ignore[arg-type]


def test_a_run_starts_from_published_weights_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a net for other classes: the head is new; what is frozen stays bit for bit, its BatchNorms' statistics too."""
    published = net(classes=7)
    for value in published.state_dict().values():
        value.copy_(torch.rand_like(value.float()) / 4 + 0.5)
    torch.save({"model": {f"module.{k}": v for k, v in published.state_dict().items()}}, tmp_path / "theirs.pt")
    words = (f"weights={tmp_path / 'theirs.pt'}", "freeze=[stage1,'stage[2].*']", "lr_factors={head:0.5}")
    after = run(monkeypatch, tmp_path / "run", *words)
    for name, value in published.state_dict().items():
        same = after[name].shape == value.shape and torch.equal(after[name], value)
        assert same == (not name.startswith(("stage3", "head"))), name
    told = capsys.readouterr().out
    assert "starts from" in told
    assert "a new head for these classes: head.weight, head.bias" in told
    assert "8 of 20 tensors learn" in told
    assert "4 BatchNorms keep their statistics" in told
    record = json.loads((tmp_path / "run" / "run.json").read_text())["weights"]
    assert len(record["sha256"]) == 64
    assert (record["place"], record["new"]) == ("model", ["head.weight", "head.bias"])
    # A run goes on from its own checkpoint, and knows the file that it started from by its bytes.
    again = run(monkeypatch, tmp_path / "run", f"resume={tmp_path / 'run'}")
    assert all(torch.equal(value, after[name]) for name, value in again.items())
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "run", f"resume={tmp_path / 'run'}", "freeze=null")
    assert "'freeze' is no single value" in capsys.readouterr().err
    torch.save(published.state_dict(), tmp_path / "theirs.pt")
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "run", f"resume={tmp_path / 'run'}")
    assert "is another file than the one that the run started from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["freeze=['*']"], "freeze: ['*'] leaves nothing that learns; expected at least one parameter"),
        (["freeze=[stage9]"], "freeze: no parameter answers to 'stage9'; close names: stage"),
        (["freeze=stage1"], "freeze: expected a list of names, found 'stage1'; write [stage1]"),
        (["lr_factors={head:0}"], "lr_factors.head: expected a number above 0, found 0; freeze=['head'] for 0"),
        (["lr_factors={heat:2}"], "lr_factors: no parameter answers to 'heat'; close names: head"),
        (["lr_factors=3"], "lr_factors: expected names of layers with a factor each"),
        (["weights=none.pt"], "weights: expected a run folder or a file of weights, found none at none.pt"),
        (["weights=wide.pt"], "weights: wide.pt does not fit the network: "),
    ],
)
def test_what_cannot_start_is_refused_before_the_run_folder(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(net(0.5).state_dict(), "wide.pt")
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path / "out" / "run", *words)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_rates_follow_the_last_pattern_that_names_a_parameter() -> None:
    of = net()
    module = classifier(of, lr_factors={"stage*": 0.1, "stage3": 0.5, "head.bias": 3})
    optimizer = module.optimizer()
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in of.named_parameters():
        factor = {"stage1": 0.1, "stage2": 0.1, "stage3": 0.5}.get(name.partition(".")[0], 3 if name == "head.bias" else 1)
        assert rate[id(parameter)] == pytest.approx(0.1 * factor), name
    schedule = piecewise(optimizer, 4, milestones=(0.5,))
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.001, 0.005, 0.01, 0.03])


def test_a_net_of_which_nothing_learns_is_refused_before_training() -> None:
    of = net().requires_grad_(False)
    with pytest.raises(ValueError, match="net: found nothing that learns"):
        classifier(of).configure_optimizers()
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    defense = Defense(PGD(Linf(0.1), steps=1), {"ce": AdversarialCE()})
    with pytest.raises(ValueError, match="net: found nothing that learns"):
        defense(of, x, y)
    defense(of.eval(), x, y)  # to measure, nothing need learn
    of.train()
    of.head.requires_grad_(True)
    defense(of, x, y).loss.backward()
    assert [name for name, p in of.named_parameters() if p.grad is not None] == ["head.weight", "head.bias"]


def test_a_batchnorm_without_weights_of_its_own_is_not_taken_for_frozen() -> None:
    of = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False), nn.Flatten(), nn.Linear(72, 2))
    assert freeze(of, ["0"]) == "2 of 4 tensors learn (146 of 166 weights)"
    assert of[1].training
