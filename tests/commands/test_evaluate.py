"""The analysis command on a real run, and on weights from elsewhere; what it refuses."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

from glassarmor.datamodules.concepts import procedural_concepts
from glassarmor.defenses.attacks.pgd import PGD
from glassarmor.defenses.masking import UnitMask, masked
from glassarmor.defenses.threat import Linf
from glassarmor.interpret.concepts.dissection import dissect
from glassarmor.interpret.views.page.page import read_script
from glassarmor.lightning_modules.commands import evaluate, train
from glassarmor.lightning_modules.networks.build import load_weights
from tests.composing import SMALL, config, options, without_guessing

FAST = ("images=12", "panels.sensitivity.points=3", "panels.units.steps=2", "threads=1")
BARE = ("panels=[outcome]", "threads=1")  # where the other panels are not the point


def command(monkeypatch: pytest.MonkeyPatch, script: object, *overrides: str) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *overrides])
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    script.main()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETRC", os.devnull)
        without_guessing(patch)
        steps = ("defense.attack.steps=1", "val_attack.steps=1", "probe.attack.steps=1", "compare_undefended=false")
        options = (*SMALL, *steps, "panels=[]", "wandb.mode=disabled", "trainer.max_epochs=2", "threads=1")
        command(patch, train, *options, f"out={out}", "name=net")
    return out / "net"


def analysis(folder: Path) -> dict:
    return json.loads((folder / "analysis.json").read_text())


def test_a_run_is_analysed_from_its_folder_alone(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, evaluate, *FAST, f"checkpoint={run}", f"out={tmp_path}")
    folder = tmp_path / "net_pgd"
    found = analysis(folder)
    assert found["config"]["data"]["_target_"] == "glassarmor.datamodules.Digits"
    assert found["config"]["threat"]["eps"] == 0.06
    # The numbers are those of that net on those images: clean accuracy recomputed without the command.
    parts = train.build(config(*SMALL, "panels=[]"))
    state = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    parts.module.load_state_dict(state)
    images = parts.data.probe(12, "test")
    assert images.hash in found["meta"]["images"]
    right = parts.module.net.eval()(images.x).argmax(1) == images.y
    assert found["scalars"]["outcome/clean_acc"] == pytest.approx(float(right.float().mean()))
    assert found["scalars"]["outcome/robust_acc"] <= found["scalars"]["outcome/clean_acc"]
    assert 0 < found["scalars"]["units/gap/stage1"] < 1
    tables = {chart["title"] for chart in found["panels"]["cam"]["charts"] if chart["type"] == "table"}
    assert "Where the kinds of regions lie relative to the maps" in tables
    for panel in ("outcome", "pse", "units", "sensitivity", "cam", "attribution"):
        assert np.ptp(imread(folder / f"{panel}.png")) > 0.5
    manifest = read_script(folder / "data" / "manifest.js")
    assert manifest["complete"]
    assert manifest["overview"] is None
    with pytest.raises(SystemExit):  # nothing is overwritten
        command(monkeypatch, evaluate, "images=12", *BARE, f"checkpoint={run}", f"out={tmp_path}")


@pytest.mark.long
def test_the_same_analysis_twice_gives_the_same_numbers(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        command(monkeypatch, evaluate, *FAST, f"checkpoint={run}", f"out={tmp_path}", f"name={name}")
    one, two = (analysis(tmp_path / name) for name in ("one", "two"))
    assert one["scalars"] == two["scalars"]
    assert one["panels"] == two["panels"]


def test_a_state_dict_from_elsewhere_needs_its_surroundings_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    weights = tmp_path / "weights.pt"
    torch.save({name.removeprefix("net."): v for name, v in state.items() if name.startswith("net.")}, weights)
    with pytest.raises(SystemExit):
        command(monkeypatch, evaluate, "images=12", *BARE, f"checkpoint={weights}", f"out={tmp_path}")
    assert "data: the checkpoint lies in no run folder" in capsys.readouterr().err
    named = ("data=digits", "network=small_cnn", "network.width=0.25", "threat=l2", "eps=0.3", "panels=[outcome]")
    command(monkeypatch, evaluate, "images=12", *named, f"checkpoint={weights}", f"out={tmp_path}", "name=named")
    found = analysis(tmp_path / "named")
    assert "L2(eps=0.3)" in found["meta"]["attack"]
    assert found["scalars"]["outcome/l2"] is None or found["scalars"]["outcome/l2"] <= 0.3 + 1e-5
    with pytest.raises(SystemExit):
        command(monkeypatch, evaluate, *named[:2], "threat=l2", f"checkpoint={weights}", f"out={tmp_path}")
    assert "does not fit the network" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint=nowhere", "checkpoint: expected a run folder or a file of weights"),
        ("images=100000", "images: expected 1 to 40 images of the test split"),
        ("split=train", "split: expected val or test"),
        ("layers=[stage9]", "no layer 'stage9'"),
        ("eps=8", "threat.eps"),
        ("name=a/b", "plain name"),
        ("masking.by=luck", "masking.by: expected"),
        ("masking.by=margin masking.fill=foo", "masking.fill: expected zero or mean"),
        ("masking.by=margin masking.concepts=luck", "mode: expected"),
        ("masking.by=margin masking.share=lots", "masking: expected a share"),
        ("masking.by=margin masking.share=0.99 masking.layers=[stage1]", "would be masked"),
        ("threads=-2", "threads: expected null or a whole number >= 1"),
        ("seed=-1", "seed: expected null or a whole number >= 0"),
        ("training=-5", "training: expected null or a whole number >= 1"),
        ("panels.dissection.quantile=2", "panels.dissection"),
        ("panels=[]", "panels: expected at least one"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    override: str,
    message: str,
) -> None:
    bare = () if override.startswith("panels") else BARE[:1]
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, evaluate, f"checkpoint={run}", f"out={tmp_path}", "images=12", *bare, *override.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_masked_net_is_attacked_through_its_mask(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masking = ("masking.by=margin", "masking.share=0.5", "masking.images=20", "masking.layers=[stage2,stage3]")
    command(monkeypatch, evaluate, "images=12", "panels=[outcome]", f"checkpoint={run}", f"out={tmp_path}", *masking)
    found = analysis(tmp_path / "net_pgd")
    tables = {chart["title"]: chart["rows"] for chart in found["panels"]["masking"]["charts"] if chart["type"] == "table"}
    units = {layer: [int(unit) for unit in text.split(", ")] for layer, text in tables["Masked units"]}
    assert {layer: len(chosen) for layer, chosen in units.items()} == {"stage2": 4, "stage3": 8}  # half of each
    # Recompute the masked accuracy under attack without the command.
    parts = train.build(config(*SMALL, "panels=[]"))
    parts.module.load_state_dict(torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"])
    net = parts.module.net.eval()
    keep = {"stage2": torch.ones(8, dtype=torch.bool), "stage3": torch.ones(16, dtype=torch.bool)}
    for layer, chosen in units.items():
        keep[layer][chosen] = False
    twin = masked(net, UnitMask(keep, {layer: torch.zeros(len(k)) for layer, k in keep.items()}))
    images = parts.data.probe(12, "test")
    x_adv = PGD(Linf(0.06), steps=20)(twin, images.x, images.y)
    robust = float((twin(x_adv).argmax(1) == images.y).float().mean())
    assert found["scalars"]["masking/outcome/robust_acc/masked"] == pytest.approx(robust)
    assert found["scalars"]["masking/outcome/clean_acc/as it was"] == found["scalars"]["outcome/clean_acc"]


@pytest.mark.long
def test_a_mask_can_spare_the_detectors(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masking = ("masking.by=random", "masking.share=0.25", "masking.images=20", "masking.concepts=protect_detectors")
    command(monkeypatch, evaluate, "images=12", "panels=[outcome]", f"checkpoint={run}", f"out={tmp_path}", *masking)
    found = analysis(tmp_path / "net_pgd")
    tables = {chart["title"]: chart["rows"] for chart in found["panels"]["masking"]["charts"] if chart["type"] == "table"}
    chosen = [int(unit) for unit in tables["Masked units"][0][1].split(", ")]
    parts = train.build(config(*SMALL, "panels=[]"))
    parts.module.load_state_dict(torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"])
    net = parts.module.net.eval()
    detectors = dissect(net, procedural_concepts(500, 32, 1), ["stage3"], quantile=0.02)["stage3"].detectors
    spared = int((~detectors).sum())
    assert int(detectors[chosen].sum()) == max(0, len(chosen) - spared)  # detectors only where nothing else is left


@pytest.mark.long
@pytest.mark.parametrize(
    "attack",  # one of each kind; that each YAML makes an attack, tests/contracts/test_attacks.py sees
    [
        name if name in ("cw", "cam_pgd", "adaptive_pgd") else pytest.param(name, marks=pytest.mark.long)
        for name in options("attack")
        if name != "pgd"
    ],
)
def test_every_attack_is_analysed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str) -> None:
    small = {
        "cw": ("attack.steps=10", "attack.search_steps=2"),
        "ead": ("attack.steps=10", "attack.search_steps=2"),
        "group_sparse": ("attack.steps=10", "attack.search_steps=2"),
        "apgd": ("attack.steps=10",),
        "apgd_t": ("attack.steps=5", "attack.targets=2"),
        "cam_cw": ("attack.attack.steps=10", "attack.attack.search_steps=2"),
    }.get(attack, ())
    command(
        monkeypatch, evaluate, "images=12", f"checkpoint={run}", f"out={tmp_path}", f"attack={attack}", *small,
        "panels=[outcome]",
    )  # fmt: skip
    scalars = analysis(tmp_path / f"net_{attack}")["scalars"]
    assert scalars["outcome/robust_acc"] <= scalars["outcome/clean_acc"]
    if attack == "cam_pgd" and scalars["outcome/pixels"] is not None:
        assert scalars["outcome/pixels"] <= 0.41  # two regions of a fifth each


def test_what_is_no_file_of_weights_is_said_to_be_none(tmp_path: Path) -> None:
    text, other = tmp_path / "notes.md", tmp_path / "other.pt"
    text.write_text("# Notes")
    torch.save({"state_dict": {"epoch": 3}}, other)
    for path, words in ((text, "is no file of weights"), (other, "no state dict of tensors")):
        with pytest.raises(ValueError, match=words) as error:
            load_weights(nn.Linear(1, 1), path)
        assert "weights_only" not in str(error.value)  # torch's advice to unpickle anything


@pytest.mark.long
def test_two_networks_are_set_on_one_axis(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A net against the same net: both columns say the same; pictures for papers are there, as PNG and as SVG."""
    words = ("images=12", "threads=1", "panels=[profiles]", f"checkpoint={run}", f"out={tmp_path}")
    command(monkeypatch, evaluate, *words, f"against={run}/checkpoints/best.ckpt", "name=both")
    folder = tmp_path / "both"
    found = analysis(folder)
    charts = found["panels"]["versus"]["charts"]
    table = next(chart for chart in charts if chart["type"] == "table")
    assert table["columns"] == ["", "net", "net (2)"]
    assert all(first == second for _, first, second in table["rows"])
    lines = next(chart for chart in charts if chart["type"] == "lines")
    assert lines["series"][0] == lines["series"][1]
    alone = next(chart for chart in found["panels"]["profiles"]["charts"] if chart["type"] == "lines")
    assert lines["series"][0] == pytest.approx(alone["series"][1])  # the panel's attacked images
    assert found["scalars"]["versus/turned/a"] == found["scalars"]["versus/turned/b"] == 0
    assert np.ptp(imread(folder / "versus.png")) > 0.5
    for name in ("versus", "profiles"):
        assert (folder / f"{name}.svg").read_text().count("<path") > 20
    with pytest.raises(SystemExit):
        command(monkeypatch, evaluate, *words, "against=nowhere", "name=wrong")
    assert not (tmp_path / "wrong").exists()


def test_units_named_by_hand_are_masked(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("images=12", "threads=1", "panels=[outcome]", f"checkpoint={run}", f"out={tmp_path}", "masking.by=hand")
    command(monkeypatch, evaluate, *words, "masking.layers=[stage2]", "masking.units=[1,5]", "name=hand")
    charts = analysis(tmp_path / "hand")["panels"]["masking"]["charts"]
    assert [["stage2", "1, 5"]] in [chart.get("rows") for chart in charts]
    with pytest.raises(SystemExit):
        command(monkeypatch, evaluate, *words, "masking.layers=[stage2]", "masking.units=[99]", "name=bad")
    assert not (tmp_path / "bad").exists()
