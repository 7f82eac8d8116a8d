"""A net comes out of a run as it was judged: with its normalisation, threat and class names, or as plain weights."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import hydra
import pytest
import torch
from hydra.utils import instantiate

import glassarmor
from glassarmor.datamodules import Digits
from glassarmor.defenses import FGSM, Linf
from glassarmor.lightning_modules.callbacks import Health
from glassarmor.lightning_modules.commands import cli, train
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN
from glassarmor.lightning_modules.run.saved_config import read_config
from tests.faulty import QUICK


def test_a_net_comes_out_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NETRC", os.devnull)
    monkeypatch.setattr(sys, "argv", ["train.py", *QUICK, f"out={tmp_path}", "name=run", "trainer.max_epochs=1"])
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    train.main()
    loaded = glassarmor.load(tmp_path / "run", "last")
    assert loaded.class_names == tuple("0123456789")
    assert isinstance(loaded.threat, Linf)
    assert loaded.threat.eps == pytest.approx(0.06)
    data = Digits()
    data.setup("fit")
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in loaded.net.state_dict().items():
        assert torch.equal(value, state[f"net.{name}"]), name
    x = data.test.images[:4].float() / 255
    assert loaded.net(x).shape == (4, 10)
    monkeypatch.setattr(
        sys, "argv", ["glassarmor", "export", str(tmp_path / "run"), str(tmp_path / "net.pt"), "--checkpoint=last"]
    )
    cli.main()
    assert "10 classes, Linf(eps=0.06)" in capsys.readouterr().out
    plain = torch.load(tmp_path / "net.pt", weights_only=True)
    assert plain.keys() == loaded.net.state_dict().keys()
    for run, said in ((tmp_path, "expected a run folder"), (tmp_path / "run" / "checkpoints", "expected a run folder")):
        with pytest.raises(ValueError, match=said):
            glassarmor.load(run)


OLD = Path(__file__).parents[1] / "lightning_modules" / "old_run"


def test_a_run_folder_of_version_0_1_is_read(tmp_path: Path) -> None:
    """Its config names classes by their files of then; everything that it names is made, and its net comes out."""
    run = shutil.copytree(OLD, tmp_path / "old")
    assert "_target_: defenses.attacks.PGD" in (run / "config.yaml").read_text(encoding="utf-8")
    net = SmallCNN(num_classes=10, in_channels=1, width=0.25, mean=(0.3,), std=(0.4,))
    (run / "checkpoints").mkdir()
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state}, run / "checkpoints" / "last.ckpt")
    loaded = glassarmor.load(run, "last")
    assert repr(loaded.threat) == repr(Linf(0.06))
    assert loaded.class_names == tuple("0123456789")
    assert all(torch.equal(value, state[f"net.{name}"]) for name, value in loaded.net.state_dict().items())
    config = read_config(run / "config.yaml", "run")
    kept = ("defense", "test_attacks", "val_attack", "health", "panels", "optimizer", "data")
    made = {key: instantiate(config[key], _convert_="all") for key in kept}
    assert made["defense"].regularizer_names == ("pse", "sensitivity")
    assert isinstance(made["test_attacks"]["FGSM"], FGSM)
    assert isinstance(made["health"], Health)
