"""Many members at once: W&B's sweeps compose, and Hydra's submitit launcher runs them in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from glassarmor.lightning_modules.run.folder import RunFolder
from tests.composing import config
from tests.faulty import QUICK

ROOT = Path(__file__).resolve().parents[2]


def test_a_member_of_the_documented_wandb_sweep_composes() -> None:
    """What the agent makes of ``${args_no_hyphens}``: key=value of every parameter."""
    (text,) = re.findall(r"```yaml\n(program: .+?)```", (ROOT / "docs" / "scale.md").read_text(encoding="utf-8"), re.DOTALL)
    sweep = yaml.safe_load(text)
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["command"] == ["python", "train.py", "${args_no_hyphens}"]
    assert sweep["metric"]["name"] == config().get("monitor", "val/robust_acc")
    for end in (0, -1):
        values = {
            key: spec["values"][end] if "values" in spec else spec.get("value", spec.get("min"))
            for key, spec in sweep["parameters"].items()
        }
        member = config(*[f"{key}={value}" for key, value in values.items()])
        assert member.compare_undefended is False
        assert member.optimizer.lr == 0.01
        assert list(member.regularizers) == [[], ["pse", "sensitivity"]][end]
        assert member.defense.loss.keys() == config(f"defense={values['defense']}").defense.loss.keys()


def test_a_member_of_a_wandb_sweep_keeps_the_id_that_the_agent_gave_it(tmp_path: Path, monkeypatch) -> None:
    """W&B ignores any other."""
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    assert RunFolder.create(tmp_path, "alone", "what", "").info["wandb_id"] != "given"
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    assert RunFolder.create(tmp_path, "member", "what", "").info["wandb_id"] == "given"


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "PL_"))}
    return kept | {"NETRC": os.devnull, "OMP_NUM_THREADS": "1"}


@pytest.mark.long
def test_submitit_runs_each_member_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "-m",
        "hydra/launcher=submitit_local",
        "hydra.launcher.timeout_min=10",
    ]
    quick = [entry for entry in QUICK if not entry.startswith("defense=")]
    members = ["defense=pgd_at,trades", "trainer.precision=auto", f"hydra.sweep.dir={tmp_path}/sweep/${{now:%S.%f}}"]
    done = subprocess.run(
        [*command, *quick, *members, f"out={tmp_path}/runs"], env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / "runs").iterdir())
    assert sorted(json.loads((f / "run.json").read_text())["what"].split("-")[2] for f in folders) == ["pgd_at", "trades"]
    for folder in folders:
        assert (folder / "results.json").is_file()
    (decided,) = (tmp_path / "sweep").glob("*/hardware.json")  # one folder, and one decision, though the name holds a time
    precision = json.loads(decided.read_text())["precision"]
    assert {yaml.safe_load((f / "config.yaml").read_text())["trainer"]["precision"] for f in folders} == {precision}
    assert len(list(decided.parent.glob(".submitit/*/*_result.pkl"))) == 2


@pytest.mark.long
@pytest.mark.parametrize("by", ["torchrun", "Lightning"])
def test_commands_that_start_two_processes(by, tmp_path: Path) -> None:
    start = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        "Lightning": [sys.executable],
    }
    arguments = [
        *QUICK,
        "data.batch_size=16",
        "trainer=ddp",
        "trainer.devices=2",
        "compare_undefended=true",
        f"out={tmp_path}",
    ]
    done = subprocess.run(
        [*start[by], str(ROOT / "train.py"), *arguments], env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 12
    assert done.stdout.count("Accuracy on the test set") == 1
    assert "undefended" in json.loads((folder / "results.json").read_text())
