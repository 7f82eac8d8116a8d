"""What changed between two epochs: told in the numbers of both, silent about what was not measured."""

from __future__ import annotations

from pathlib import Path

from glassarmor.interpret.views.page.changes import changes
from glassarmor.interpret.views.page.page import ReportPage, read_script
from glassarmor.interpret.views.view import Answer, View

FIRST = {"val/robust_acc": 0.153, "profiles/turned": 0.5, "profiles/turning/a": 0.4, "profiles/turning/b": 0.1}
NOW = {"val/robust_acc": 0.736, "profiles/turned": 0.5, "profiles/turning/a": 0.1, "profiles/turning/b": 0.4}


def test_numbers_of_both_epochs_are_told() -> None:
    assert changes(FIRST, NOW) == (
        "robust accuracy, held out 15.3 → 73.6 %; probe images that turn 50.0 % as before; "
        "images turn most often at b, no longer at a"
    )
    assert changes(NOW, NOW).endswith("images turn most often at b, as before")


def test_what_was_not_measured_is_not_told() -> None:
    assert changes({}, NOW) == changes({"val/robust_acc": float("nan"), "pse/promotion": 1.0}, NOW) == ""
    nobody = {"profiles/turning/a": 0.0, "profiles/turning/b": 0.0}
    assert changes(nobody, nobody) == ""


def test_the_page_tells_it_of_the_first_epoch_and_the_one_before(tmp_path: Path) -> None:
    page = ReportPage(tmp_path, "run")
    for epoch, robust in enumerate((0.1, 0.2, 0.4)):
        view = View("training", "Training", "", (), answers=(Answer("healthy", f"said at {epoch}"),))
        page.write_epoch(epoch, epoch, {"val/robust_acc": robust}, [view])
    epochs = read_script(tmp_path / "data" / "manifest.js")["epochs"]
    told = [[a["text"] for a in epoch["answers"] if a["question"] == "changed"] for epoch in epochs]
    name = "robust accuracy, held out"
    assert told[0] == []
    assert told[1] == [f"Since epoch 0: {name} 10.0 → 20.0 %."]
    assert told[2] == [f"Since epoch 0: {name} 10.0 → 40.0 %.", f"Since epoch 1: {name} 20.0 → 40.0 %."]
    assert epochs[2]["answers"][0] == {"question": "healthy", "text": "said at 2", "command": "", "panel": "training"}
