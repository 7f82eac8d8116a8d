"""What a resumed run may change, and that it is told: by config.yaml, by its card, and by a comparison."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from glassarmor.lightning_modules.commands.resuming import note_changes, resumed_config
from glassarmor.lightning_modules.run.changes import changes
from glassarmor.lightning_modules.run.folder import ResumePoint, RunFolder
from glassarmor.lightning_modules.study.records import check_comparable, read_record, record_of, write_record
from glassarmor.lightning_modules.study.tables import accuracy_table
from glassarmor.lightning_modules.study.verdicts import settings_of
from tests.composing import config


@cache  # composing is what takes time
def composed(*overrides: str) -> str:
    return OmegaConf.to_yaml(config(*overrides), resolve=True)


def run_folder(path: Path, *overrides: str) -> RunFolder:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(composed(*overrides))
    (path / "run.json").write_text(json.dumps({"what": "digits", "wandb_id": "1", "commit": "abc", "started": "now"}))
    (path / "results.json").write_text(json.dumps({"defended, best epoch": {"clean": 0.9, "PGD-20": 0.5}}))
    return RunFolder(path)


def given(folder: RunFolder, *overrides: str) -> DictConfig:
    words = [f"resume={folder.path}", *overrides]
    return resumed_config(OmegaConf.create({"resume": str(folder.path)}), words)


def resumed(folder: RunFolder, step: int, *overrides: str) -> list[str]:
    return note_changes(folder, given(folder, *overrides), ResumePoint(None, step // 10, step, ()))


def saved(folder: RunFolder) -> DictConfig:
    found = OmegaConf.load(folder.config)
    assert isinstance(found, DictConfig)
    return found


def test_every_override_is_kept_with_its_step_and_config_yaml_says_what_the_run_goes_on_with(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    began = folder.config.read_bytes()
    assert resumed(folder, 10) == []
    assert resumed(folder, 10, "optimizer.lr=0.1", "seed=0", "debug=true", "wandb.mode=disabled") == []  # as it was
    assert folder.config.read_bytes() == began
    assert resumed(folder, 40, "optimizer.lr=0.01") == ["optimizer.lr from 0.1 to 0.01 at step 40 (epoch 4)"]
    assert saved(folder).optimizer.lr == 0.01
    assert resumed(folder, 40) == []  # the next command goes on with it, without saying it again
    epochs = saved(folder).trainer.max_epochs
    assert sorted(resumed(folder, 60, "optimizer.lr=0.001", "trainer.max_epochs=50")) == [
        "optimizer.lr from 0.01 to 0.001 at step 60 (epoch 6)",
        f"trainer.max_epochs from {epochs} to 50 at step 60 (epoch 6)",
    ]
    told = changes(OmegaConf.to_container(saved(folder)))
    assert [line.split(" at ")[1] for line in told] == ["step 40 (epoch 4)", *["step 60 (epoch 6)"] * 2]
    assert saved(folder).resume is None


def test_what_is_trained_again_after_a_change_was_changed_there(tmp_path: Path) -> None:
    """The newest checkpoint could not be read, and the one before is older than the change."""
    folder = run_folder(tmp_path / "run")
    resumed(folder, 40, "optimizer.lr=0.01")
    resumed(folder, 20)
    assert changes(OmegaConf.to_container(saved(folder))) == ["optimizer.lr from 0.1 to 0.01 at step 20 (epoch 2)"]


def test_an_override_reaches_every_copy_of_what_it_changes(tmp_path: Path) -> None:
    """``regularizers`` is what a defense interpolates: its copy is what is trained."""
    folder = run_folder(tmp_path / "run", "regularizers=[pse]", "defense=pgd_at")
    cfg = given(folder, "regularizers.pse.weight=3", "awp.gamma=0.005")
    assert (cfg.regularizers.pse.weight, cfg.defense.regularizers.pse.weight) == (3, 3)
    assert (cfg.awp.gamma, cfg.defense.awp.gamma) == (0.005, 0.005)
    with pytest.raises(ValueError, match=r"defense.regularizers.pse.weight follows regularizers.pse.weight; change that"):
        given(folder, "defense.regularizers.pse.weight=3")
    keys = [line.split()[0] for line in resumed(folder, 10, "+regularizers.pse.weight=3")]
    assert {"regularizers.pse.weight", "defense.regularizers.pse.weight"} <= set(keys)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=1", "seed: expected 0, as the run has it; 1 makes other random numbers"),
        ("data.seed=1", "data.seed: expected 0, as the run has it; 1 makes other random numbers"),
        ("val_attack.seed=9", "other random numbers"),
        ("data.val_fraction=0.3", "data.val_fraction: expected 0.15, as the run has it; 0.3 makes other images"),
        ("data.train_limit=100", "data.train_limit: expected None"),
        ("threat.eps=0.3", "another threat model"),
        ("defense.attack.threat.eps=0.3", "follows threat.eps; change that"),
        ("budget.linf=0.3", "another threat model"),
        ("network.width=2", "another network"),
        ("val_attack.steps=1", "another choice of the best epoch"),
        ("probe.size=8", "other images on the dashboard"),
        ("ema=0.99", "other weights that are judged"),
        ("optimizer._target_=torch.optim.Adam", "another class"),
        ("out=elsewhere", "another folder"),
        ("name=other", "another folder"),
        ("defense=mart", "no single value of the saved config"),
        ("optimizer.lrr=1", "no single value of the saved config"),
        ("+optimizer.nesterovv=true", "no single value of the saved config"),
        ("~regularizers.pse", "no single value of the saved config"),
    ],
)
def test_what_would_make_another_run_is_refused(tmp_path: Path, override: str, said: str) -> None:
    folder = run_folder(tmp_path / "run")
    with pytest.raises(ValueError, match="resume") as error:
        given(folder, override)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "override",
    ["data.batch_size=64", "data.eval_batch_size=9", "data.on_device=true", "data.augment.pad=1", "checkpoint_every=5"],
)
def test_what_leaves_it_the_same_run_may_change(tmp_path: Path, override: str) -> None:
    folder = run_folder(tmp_path / "run")
    key, _, value = override.partition("=")
    assert str(OmegaConf.select(given(folder, override), key)).lower() == value


def test_a_changed_run_is_no_run_of_its_last_config(tmp_path: Path) -> None:
    one, other = (run_folder(tmp_path / name, "optimizer.lr=0.01") for name in ("whole", "other"))
    changed = run_folder(tmp_path / "changed", "optimizer.lr=0.1")
    resumed(changed, 40, "optimizer.lr=0.01")
    resumed(other, 40, "panels.pse.images=3", "checkpoint_every=7")  # drawn and kept otherwise, trained alike
    whole, alike, mended = (record_of(folder.path) for folder in (one, other, changed))
    assert alike.about.get("changed") is None
    assert mended.config != whole.config
    assert mended.about["changed"] == ["optimizer.lr from 0.1 to 0.01 at step 40 (epoch 4)"]
    check_comparable([whole, alike])
    with pytest.raises(ValueError, match=r"whole and changed don't compare: changed differs, the changes while"):
        check_comparable([whole, mended])
    check_comparable([whole, mended], any_effort=True)
    write_record(mended, tmp_path / "card.json")
    assert read_record(tmp_path / "card.json") == mended
    (row,) = accuracy_table(settings_of([mended])).rows
    assert "seed 0 changed optimizer.lr from 0.1 to 0.01 at step 40 (epoch 4)" in str(row[2])
