"""Comparing runs: the page and the table say what the run folders hold; what does not compare is refused."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import compare
from interpret.views.page import read_script
from tests.composing import config


def make_run(folder: Path, robust: list[float], *overrides: str, finished: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config(*overrides), resolve=True))
    (folder / "run.json").write_text(json.dumps({"what": "digits", "commit": "abc"}))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", "val/robust_acc", "val/clean_acc", "pse/promotion"])
        writer.writerows([[i, 10 * i, value, 0.9, ""] for i, value in enumerate(robust)])
    if finished:
        (folder / "results.json").write_text(
            json.dumps({"threat": "Linf", "defended, best epoch": {"clean": 0.95, "PGD-20": 0.5}})
        )
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    compare.main()


def test_runs_are_set_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_run(tmp_path / "one", [0.1, 0.6, 0.4])
    two = make_run(tmp_path / "two", [0.2, 0.3], "seed=1", "defense=pgd_at", finished=False)
    command(monkeypatch, one, two, "--out", tmp_path / "page")
    data = read_script(tmp_path / "page" / "data" / "epoch_00000.js")["views"][0]
    assert data["headline"] == "Held-out robust accuracy at the best epoch: one 60.0 %, two 30.0 %."
    tables = {chart["title"]: chart["rows"] for chart in data["charts"] if chart["type"] == "table"}
    assert tables["Accuracy on the test set"] == [
        ["one", "defended, best epoch", 95.0, 50.0],
        ["two", "not finished", None, None],
    ]
    lines = next(c for c in data["charts"] if c["type"] == "lines" and c["title"].startswith("Robust"))
    assert lines["series"] == [[0.1, 0.6, 0.4], [0.2, 0.3, None]]
    assert [row[:2] for row in tables["What the dashboards measured at each run's best epoch"]] == [["one", 1], ["two", 1]]
    assert not any(c["title"].startswith("Promotion") for c in data["charts"])  # nobody measured it


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("threat.eps=0.1",), "threat differs"),
        (("data.val_fraction=0.3",), "data differs"),
        (("threat=l2",), "threat differs"),
    ],
)
def test_what_does_not_compare_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: tuple[str, ...],
    words: str,
) -> None:
    one, two = make_run(tmp_path / "one", [0.1]), make_run(tmp_path / "two", [0.2], *overrides)
    with pytest.raises(SystemExit):
        command(monkeypatch, one, two, "--out", tmp_path / "page")
    assert words in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_one_run_or_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(monkeypatch, make_run(tmp_path / "one", [0.1]))
    assert "at least two run folders, found 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path / "one", tmp_path / "nowhere")
    assert "found none at" in capsys.readouterr().err
