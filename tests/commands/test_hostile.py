"""A run folder and names from somebody else: nothing of theirs runs, and what they are called is shown as text."""

from __future__ import annotations

import csv
import io
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import hydra
import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from glassarmor.interpret.views.charts import Table
from glassarmor.lightning_modules.commands import evaluate, subject, train
from glassarmor.lightning_modules.networks.build import Filled
from glassarmor.lightning_modules.run.console import console, note, printable, show, steps
from tests.composing import SMALL, config


def foreign_run(folder: Path, canary: Path, key: str, target: dict[str, object]) -> Path:
    """A run folder whose config would write ``canary``; its weights are none, for they are never opened."""
    cfg = config(*SMALL)
    OmegaConf.set_struct(cfg, False)
    OmegaConf.update(cfg, key, target, merge=False)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "best.ckpt").write_bytes(b"")
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True).replace("CANARY", str(canary)))
    (folder / "run.json").write_text('{"what": "x", "wandb_id": "x", "commit": "x", "started": "x"}')
    return folder


PLAIN = {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": ["CANARY"]}}
THROUGH_OURS = {
    "_target_": "glassarmor.lightning_modules.networks.imported",
    "_partial_": True,
    "target": "pathlib:Path",
    "args": {"x": "CANARY"},
}


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("train", ["resume=RUN"]),
        ("evaluate", ["checkpoint=RUN"]),
        ("evaluate", ["checkpoint=RUN", "suite=probe"]),
        ("evaluate", ["images=16", "panels=[outcome]", "checkpoint=MINE", "against=RUN"]),
        ("evaluate", ["checkpoint=MINE", "twin=RUN", "suite=probe"]),
    ],
)
@pytest.mark.parametrize(("key", "target"), [("network", THROUGH_OURS), ("data", PLAIN)])
def test_every_door_refuses_foreign_code(
    script: str,
    words: list[str],
    key: str,
    target: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    canary = tmp_path / "canary"
    run = foreign_run(tmp_path / "run", canary, key, target)
    mine = tmp_path / "mine"
    if "checkpoint=MINE" in words:
        filled = Filled(mine, "", "", (), ())
        foreign_run(mine, canary, "name", "mine")  # type: ignore[arg-type]
        monkeypatch.setattr(subject, "load_weights", lambda *_: filled)
    said = [word.replace("RUN", str(run)).replace("MINE", str(mine)) for word in words]
    monkeypatch.setattr(sys, "argv", [script, *said])
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as ended:
        {"train": train, "evaluate": evaluate}[script].main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {words[-1 if 'suite' not in words[-1] else -2].partition('=')[0]}: ")
    assert "would run what is not part of this package" in told
    assert "trust=true" in told
    assert not canary.exists()


NAMES = ("[/b] cat", "[red]dog", "\x1b]0;owned\x07", "\x1b[2Jbird", "‮drow", ":smile:", "plain")


def test_names_are_text_in_the_terminal() -> None:
    with redirect_stdout(io.StringIO()) as said:
        for name in NAMES:
            console.print(name)
            console.print(name, style="bold")
            note(name)
            show(Table(name, (name, "n"), [(name, 1.0)]))
            with steps(name) as tell:
                tell(name)
    text = said.getvalue()
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "‮" not in text
    for name in NAMES:
        assert text.count(printable(name)) >= 6, name
    assert printable("[/b] cat, 猫, 🐈‍⬛, κ") == "[/b] cat, 猫, 🐈‍⬛, κ"


@pytest.mark.long
def test_a_run_over_classes_with_hostile_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, judged and compared: every file that people open holds the names as text."""
    names = ("<script>alert(1)<!--", "=cmd|' !A0", "[/b] [x](javascript:y)")
    generator = np.random.default_rng(0)
    for level, name in enumerate(names):
        for part, count in (("train", 24), ("test", 8)):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 60, (16, 16, 3)) + 90 * level
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")

    def call(script: str, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", [script, *words])
        hydra.core.global_hydra.GlobalHydra.instance().clear()
        {"train": train, "evaluate": evaluate}[script].main()

    monkeypatch.setenv("NETRC", os.devnull)
    data = ("data=image_folder", f"data.path={tmp_path / 'data'}", "data.size=16", "data.batch_size=16")
    quick = ("trainer.max_epochs=2", "probe.size=6", "wandb.mode=disabled", "network.width=0.25", "threads=1")
    call("train", *data, *quick, f"out={tmp_path}", "name=run", "panels=[pse,profiles]", "trainer.accelerator=cpu")
    call("evaluate", f"checkpoint={tmp_path / 'run'}", "suite=probe", f"out={tmp_path}", "name=card", "panels=[failures]")
    markdown = (tmp_path / "card" / "card.md").read_text()
    assert "<script" not in markdown
    assert "](javascript" not in markdown
    for page in (tmp_path / "run" / "report" / "index.html", tmp_path / "card" / "index.html"):
        assert "<script>alert" not in page.read_text()
        assert "Content-Security-Policy" in page.read_text()
    rows = list(csv.reader((tmp_path / "run" / "metrics.csv").open()))
    assert not any(cell.startswith(("=", "@")) for row in rows for cell in row)
