"""Suites from the command line: a run, a state dict, anyone's classifier; a stopped one; what is refused."""

from __future__ import annotations

import io
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn

from glassarmor.datamodules.digits import Digits
from glassarmor.defenses.evaluation.card import read_card
from glassarmor.defenses.evaluation.robustness import Progress
from glassarmor.defenses.evaluation.sanity import LIMITS
from glassarmor.interpret.views.page.page import read_script
from glassarmor.lightning_modules.callbacks.look import Look
from glassarmor.lightning_modules.cards import report as judging
from glassarmor.lightning_modules.commands import evaluate, judge
from glassarmor.lightning_modules.commands.errors import refusal
from glassarmor.lightning_modules.networks.build import load_weights
from glassarmor.lightning_modules.networks.normalize import normalised
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN
from glassarmor.lightning_modules.run import console
from tests.commands.test_evaluate import command

NAMED = ("data=digits", "network=small_cnn", "network.width=0.25", "threat=linf", "threads=1", "panels=[outcome,failures]")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = SmallCNN(num_classes=10, in_channels=1, mean=(0.3,), std=(0.3,), width=0.25)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def judged(folder: Path) -> dict:
    assert not (folder / "suite_state.json").exists()  # the state is gone with the work
    assert (folder / "index.html").stat().st_size > 10_000
    assert (folder / "card.md").read_text().startswith("# Result card")
    return read_card(folder / "card.json")


def test_weights_are_judged_and_everything_is_written(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("suite=probe", "images=20", "corruptions=true", "batch=8", f"twin={weights}")
    command(monkeypatch, evaluate, *NAMED, *asked, f"checkpoint={weights}", f"out={tmp_path / 'out'}")
    found = judged(tmp_path / "out" / "net_probe")
    examples, accuracy, first = found["examples"], found["accuracy"], found["suite"]["attacks"][0]
    assert found["data"]["n"] == len(examples["rows"]) == len(examples["standing"]) == len(examples["felled_by"]) == 20
    assert accuracy["robust"] == sum(examples["standing"]) / 20
    assert (first["name"], first["settings"]["steps"]) == ("PGD-20", 20)
    assert accuracy["interval95"][0] <= accuracy["robust"] <= accuracy["interval95"][1]
    assert len(accuracy["by_corruption"]["JPEG"]) == 5
    assert found["data"]["selection"].startswith("unknown")
    assert found["versions"]["pyautoattack"] == version("pyautoattack")
    assert judge.ONLY_CHECKS in found["notes"]
    assert found["interpretation"]["outcome/clean_acc"] >= 0
    assert found["config"]["threat"]["eps"] == 0.06
    said = " ".join(capsys.readouterr().out.split())
    assert "Robust accuracy" in said
    assert said.index("attacks done; next sanity checks, accuracy against ε, 2 panels") < said.index("Robust accuracy")
    assert judge.ONLY_CHECKS in said
    with pytest.raises(SystemExit):  # nothing is overwritten
        command(monkeypatch, evaluate, *NAMED, *asked, f"checkpoint={weights}", f"out={tmp_path / 'out'}")
    assert "holds an evaluation already" in capsys.readouterr().err


@pytest.mark.long
def test_the_panels_explain_the_images_by_which_the_suite_felled_them(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's own attack is made one that changes nothing: what it shows as fallen can only be the suite's."""
    probes = []
    original = Look.probe

    def kept(self, *args):
        probes.append(original(self, *args))
        return probes[-1]

    monkeypatch.setattr(Look, "probe", kept)
    asked = ("suite=fast", "images=40", "attack.steps=1", "attack.step_size=1e-9", "attack.start=none")
    command(monkeypatch, evaluate, *NAMED, *asked, f"checkpoint={weights}", f"out={tmp_path / 'out'}")
    found, obs = judged(tmp_path / "out" / "net_fast"), probes[-1].obs
    saved = np.load(tmp_path / "out" / "net_fast" / "fallen.npz")
    by = {found["examples"]["rows"][i]: image for i, image in zip(saved["places"], saved["images"], strict=True)}
    names = dict(zip(*(found["examples"][key] for key in ("rows", "felled_by")), strict=True))
    fell = 0
    for name, x, x_adv, logits, y in zip(probes[-1].ids, obs.clean.x, obs.adv.x, obs.adv.logits, obs.y, strict=True):
        row, _, told = name.removeprefix("test-").partition(", felled by ")
        assert told == {None: "", "clean": ""}.get(names[int(row)], names[int(row)])
        if told:
            fell += 1
            assert np.array_equal(x_adv.numpy(), by[int(row)])
            assert logits.argmax() != y
        else:
            torch.testing.assert_close(x_adv, x)
    assert fell == sum(name not in (None, "clean") for name in names.values()) > 0
    page = (tmp_path / "out" / "net_fast" / "index.html").read_text()
    assert f"as the suite felled them: {fell} by APGD-CE" in page
    views = read_script(tmp_path / "out" / "net_fast" / "data" / "epoch_00000.js")["views"]
    outcome = next(view for view in views if view["name"] == "outcome")
    assert outcome["headline"].startswith("Among the images chosen for this page: Accuracy falls")


@pytest.mark.long
def test_an_evaluation_in_l2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a trained net to the card; every attack, the checks and the curve in the ball of the claim."""
    data = Digits(batch_size=128)
    data.setup("fit")
    x, y = data.train.images.float() / 255, data.train.labels
    torch.manual_seed(0)
    net = SmallCNN(num_classes=10, in_channels=1, mean=data.mean, std=data.std, width=0.25)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for rows in torch.randint(len(x), (60, 64), generator=torch.Generator().manual_seed(0)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net.train()(x[rows]), y[rows]).backward()
        optimizer.step()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    named = ("data=digits", "network=small_cnn", "network.width=0.25", "threads=1", "panels=[outcome]")
    asked = ("threat=l2", "threat.eps=0.1", "suite=fast", "images=48", f"checkpoint={tmp_path / 'net.pt'}")
    command(monkeypatch, evaluate, *named, *asked, f"out={tmp_path / 'out'}")
    card = judged(tmp_path / "out" / "net_fast")
    accuracy, curve = card["accuracy"], card["accuracy"]["by_eps"]
    assert card["threat"] == {"norm": "L2", "eps": 0.1}
    assert all(attack["settings"]["threat"] == {"class": "L2", "eps": 0.1} for attack in card["suite"]["attacks"])
    assert 0.1 < accuracy["robust"] < accuracy["clean"] - 0.1
    assert [point["eps"] for point in curve] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8])
    heights = [point["robust"] for point in curve]
    assert heights == sorted(heights, reverse=True)
    assert (heights[0], heights[-1]) == pytest.approx((accuracy["clean"], 0))
    assert card["sanity"]["verdict"] == "trusted"
    assert {check["name"] for check in card["sanity"]["checks"]} == set(LIMITS) - {"gradients beat transfer"} | {
        "full precision inside",
        "outputs are logits",
        "deterministic",
        "independent of the batch",
        "no autograd inside forward",
    }
    # By a simple attack of another hand at that radius: an image that falls to it fell to the suite.
    rows = torch.tensor(card["examples"]["rows"])
    x, y = data.test.images[rows].float() / 255, data.test.labels[rows]
    x_adv = x.clone()
    for _ in range(20):
        x_adv.requires_grad_()
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(net.eval()(x_adv), y, reduction="sum"), x_adv)
        change = x_adv.detach() + 0.025 * slope / slope.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1) - x
        x_adv = (x + change * (0.1 / change.flatten(1).norm(dim=1).clamp_min(0.1)).view(-1, 1, 1, 1)).clamp(0, 1)
    fell = net(x_adv).argmax(1) != y
    standing = torch.tensor(card["examples"]["standing"])
    assert fell.any()
    assert int((fell & standing).sum()) == 0


@pytest.mark.long
def test_a_masked_net_is_judged_through_its_mask(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("suite=probe", "images=40", "panels=[]", f"checkpoint={weights}", f"out={tmp_path / 'out'}")
    masking = ("masking.by=margin", "masking.share=0.75", "masking.images=20", "masking.layers=[stage2,stage3]")
    command(monkeypatch, evaluate, *NAMED, *asked, "name=whole")
    command(monkeypatch, evaluate, *NAMED, *asked, *masking)
    whole, masked = (judged(tmp_path / "out" / name) for name in ("whole", "net_probe_masked_by_margin"))
    assert whole["data"]["images"] == masked["data"]["images"]
    assert whole["model"]["weights"] != masked["model"]["weights"]
    assert whole["examples"]["felled_by"] != masked["examples"]["felled_by"]


def test_adaptive_says_what_it_left_out(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("suite=adaptive", "images=2", "panels=[]", f"checkpoint={weights}", f"out={tmp_path / 'out'}", "threat.eps=0.5")
    command(monkeypatch, evaluate, *NAMED[:-1], *asked)
    notes = judged(tmp_path / "out" / "net_adaptive")["notes"]
    assert [note for note in notes if "regularizers=" in note or "twin=" in note] == notes
    said = capsys.readouterr().out
    assert len(notes) == 2
    assert all(note in said and note in (tmp_path / "out" / "net_adaptive" / "card.md").read_text() for note in notes)
    command(monkeypatch, evaluate, *NAMED[:-1], *asked, f"twin={weights}", "name=twin")
    assert [note for note in notes if "regularizers=" in note] == judged(tmp_path / "out" / "twin")["notes"]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_told_with_a_terminal_and_without(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = io.StringIO()
    monkeypatch.setattr(judging, "console", Console(file=seen, force_terminal=terminal, width=120))
    monkeypatch.setattr(console, "console", judging.console)
    clock = iter([0.0, 1.0, 16.0, 16.0, 17.0, 40.0, 40.0])
    monkeypatch.setattr(console, "monotonic", lambda: next(clock))
    with judging.suite_bar() as told:
        for batch, standing, left in ((1, 90, 75.0), (2, 61, 61.0), (3, 50, None), (4, 44, 3.0)):
            told(Progress("APGD-T", 1, 4, batch, 8, standing, 100, 30.0, left))
        assert judging.so_far(Progress("Square", 3, 4, 8, 8, 44, 100, 30.0, 0.0)) == "robust 44.0 %", "no time is left"
        assert Progress("corruptions", 4, 4, 0, 1, 44, 100, 30.0, None).title == "corruptions"
    words = seen.getvalue()
    if terminal:
        assert "APGD-T" in words
        assert "robust 44.0 %, at most 0:00:03 left" in words
    else:  # no line sooner than 15 seconds after the last
        assert words.splitlines() == [
            "2/4 APGD-T, 2 of 8: robust 61.0 %, at most 0:01:01 left",
            "2/4 APGD-T, 4 of 8: robust 44.0 %, at most 0:00:03 left",
        ]


@pytest.mark.long
def test_a_stopped_command_goes_on(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (
        "suite=probe",
        "images=120",
        "batch=3",
        "panels=[]",
        f"checkpoint={weights}",
        f"out={tmp_path / 'out'}",
        "split=val",
    )
    command(monkeypatch, evaluate, *NAMED, *asked, "name=whole")
    attacked = []
    original = judging.run_suite

    def stopping(*args, progress, **options):
        def told(now):
            attacked.append(now.batch)
            if len(attacked) == 2:
                raise KeyboardInterrupt
            progress(now)

        return original(*args, progress=told, **options)

    monkeypatch.setattr(judging, "run_suite", stopping)
    with pytest.raises(KeyboardInterrupt):
        command(monkeypatch, evaluate, *NAMED, *asked, "name=stopped")
    assert not (tmp_path / "out" / "stopped" / "card.json").exists()
    command(monkeypatch, evaluate, *NAMED, *asked, "name=stopped")
    whole, stopped = (judged(tmp_path / "out" / name) for name in ("whole", "stopped"))
    assert attacked[:3] == [1, 2, 2]  # the first batch was kept
    for key in ("examples", "accuracy", "data", "sanity"):
        assert stopped[key] == whole[key]
    assert stopped["suite"]["forwards"] == whole["suite"]["forwards"]


def test_a_request_leaves_its_config_alone_and_holds_none(weights: Path, tmp_path: Path) -> None:
    """Below it nothing can read a key that was never checked."""
    GlobalHydra.instance().clear()
    words = [*NAMED, "suite=adaptive", "images=20", f"checkpoint={weights}", f"twin={weights}", f"out={tmp_path}"]
    with initialize_config_dir(str(evaluate.CONFIGS), version_base="1.3"):
        cfg = compose("evaluate", [*words, "masking.by=random"])
    before = OmegaConf.to_yaml(cfg)
    asked = judge.make_request(cfg)
    assert OmegaConf.to_yaml(cfg) == before
    assert not [name for name, value in vars(asked).items() if OmegaConf.is_config(value)]
    assert (asked.settings.suite, asked.settings.subset, asked.source) == (
        "adaptive",
        20,
        f"{weights}, units masked by random",
    )
    with pytest.raises(AttributeError):
        asked.settings.batch_size = 7  # type: ignore[misc]


@pytest.mark.long
def test_anyones_classifier_on_an_image_folder_and_on_npz(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "their_models.py").write_text(
        "from torch import nn\n"
        "def make(classes=2):\n"
        "    body = nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()\n"
        "    return nn.Sequential(*body, nn.Linear(4, classes))\n"
        "def hidden():\n"
        "    return Hidden()\n"
        "class Hidden(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.net = make()\n"
        "    def forward(self, x):\n"
        "        return self.net(x.detach())\n"
        "class Pair(Hidden):\n"
        "    def forward(self, x):\n"
        "        return None, self.net(x)\n"
        "class Training(Hidden):\n"
        "    def forward(self, x):\n"
        "        if not self.training:\n"
        "            raise RuntimeError('no eval mode here')\n"
        "        return self.net(x)\n"
        "pair, training = Pair, Training\n"
        "def wrong():\n"
        "    return make(7)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8), np.arange(40) % 2
    for part in ("train", "test"):
        for label, name in enumerate(("ants", "bees")):
            (tmp_path / "folder" / part / name).mkdir(parents=True)
            for i in np.flatnonzero(labels == label):
                PIL.Image.fromarray(images[i]).save(tmp_path / "folder" / part / name / f"{i}.png")
    (tmp_path / "arrays").mkdir()
    for part in ("train", "test"):
        np.savez(tmp_path / "arrays" / f"{part}.npz", images=images, labels=labels)
    body = nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    torch.save(nn.Sequential(*body, nn.Linear(4, 2)).state_dict(), tmp_path / "theirs.pt")
    torch.save(nn.Sequential(*body, nn.Linear(4, 3)).state_dict(), tmp_path / "other.pt")
    common = (
        "model=their_models:make",
        "weights=theirs.pt",
        "threat=linf",
        "suite=probe",
        "threads=1",
        "panels=[outcome]",
    )
    folder = ("data=image_folder", "data.path=folder", "data.size=16")
    command(monkeypatch, evaluate, *common, *folder, "out=out", "name=folder")
    command(monkeypatch, evaluate, *common, "data=arrays", "data.path=arrays", "out=out", "name=arrays")
    one, two = judged(tmp_path / "out" / "folder"), judged(tmp_path / "out" / "arrays")
    assert one["data"]["n"] == two["data"]["n"] == 40
    assert one["accuracy"]["clean"] == two["accuracy"]["clean"]
    assert [row["class"] for row in one["accuracy"]["by_class"]] == ["ants", "bees"]
    # Anyone's classifier that no gradient passes is judged without one, and its number is not to be used.
    without = ("threat.eps=0.1", "images=8", "out=out", "name=hidden", "model=their_models:hidden", "weights=null")
    command(monkeypatch, evaluate, *common, *folder, *without)
    cut = judged(tmp_path / "out" / "hidden")
    assert (cut["suite"]["name"], [a["name"] for a in cut["suite"]["attacks"]]) == ("probe", ["Square"])
    assert cut["sanity"]["verdict"] == "invalid"
    assert cut["sanity"]["reasons"][0] == "no gradient reaches the images"  # 8 images are too few for the checks
    assert cut["accuracy"]["by_eps"][-1]["robust"] <= cut["accuracy"]["clean"]
    assert "no gradient reaches the images, so that Square" in capsys.readouterr().out
    assert cut["interpretation"] == {}
    assert judge.NO_PANELS in cut["notes"]
    for file in ("card.md", "index.html"):
        assert judge.NO_PANELS in (tmp_path / "out" / "hidden" / file).read_text()
    for change, message in (
        ("model=their_models:hidden weights=null masking.by=margin", "masking: units are chosen by gradients"),
        ("model=their_models:wrong", "model: it must return logits, one floating-point tensor (N, num_classes) = (2, 2)"),
        ("weights=nowhere.pt", "weights: expected a run folder or a file of weights"),
        ("weights=other.pt", "weights: other.pt does not fit the network: 4.weight (3, 4) instead of (2, 4)"),
        ("model=nowhere:make", "model: module 'nowhere' must be importable"),
        (
            "model=their_models:pair",
            "model: it must return logits, one floating-point tensor (N, num_classes) = (2, 2) Got: t",
        ),
        ("model=their_models:training", "Got: RuntimeError: no eval mode here"),
        ("model=their_models:missing", "model: 'their_models:missing' must name a callable"),
        ("network=small_cnn", "model: takes the place of network="),
    ):
        with pytest.raises(SystemExit):
            command(monkeypatch, evaluate, *common, *folder, "out=out", "name=other", *change.split())
        assert message in capsys.readouterr().err
    shutil.rmtree(tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit):
        command(monkeypatch, evaluate, *common, *folder, "out=out", "name=other")
    assert "data.path" in capsys.readouterr().err
    for arrays, message in (
        ({"images": images, "labels": labels + 5}, "test labels must lie in 0..1 (2 classes), found 5..6"),
        ({"images": images / 255, "labels": labels}, "images must be uint8 in 0..255, got float64"),
        ({"pictures": images, "labels": labels}, "must have the keys images and labels, found ['pictures', 'labels']"),
    ):
        np.savez(tmp_path / "arrays" / "test.npz", **arrays)
        with pytest.raises(SystemExit):
            command(monkeypatch, evaluate, *common, "data=arrays", "data.path=arrays", "out=out", "name=other")
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["arrays", "folder", "hidden"]


def test_a_radius_is_set_by_eps_where_the_run_brings_the_threat() -> None:
    words = ("checkpoint=RUN", "suite=fast", "threat.eps=2")
    said = refusal("Could not override 'threat.eps'.", words, evaluate.CONFIGS, "evaluate")
    assert said.startswith("threat.eps: nothing is chosen for threat here; expected eps=")
    said = refusal("Could not override 'threat.epsilon'.", words, evaluate.CONFIGS, "evaluate")
    assert "expected a key of the config" in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("suite=autoattack", "suite: expected probe, fast, standard, strong, adaptive; found 'autoattack'"),
        ("images=100000", "images: expected 1 to 359 images of the test split"),
        ("images=0", "images: expected null or a whole number >= 1"),
        ("batch=0", "batch: expected null or a whole number >= 1"),
        ("split=train", "split: expected val or test"),
        ("eps=8", "threat.eps"),
        ("name=a/b", "plain name"),
        ("network.width=0.5", "does not fit the network"),
        ("checkpoint=nowhere", "checkpoint: expected a run folder or a file of weights"),
        ("checkpoint=null", "checkpoint: expected a run folder or a file of weights, e.g."),
        ("weights=net.pt", "weights: says what checkpoint= says; expected one of them, found both"),
        ("twin=nowhere", "twin: expected a run folder"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    override: str,
    message: str,
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, evaluate, *NAMED, f"checkpoint={weights}", f"out={out}", "suite=probe", override)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_net_whose_own_names_begin_with_net_takes_its_own_weights(tmp_path: Path) -> None:
    net = nn.Sequential()
    net.add_module("net", nn.Linear(2, 2))
    saved = {name: value + 1 for name, value in net.state_dict().items()}
    torch.save(saved, tmp_path / "own.pt")
    load_weights(net, tmp_path / "own.pt")
    assert torch.equal(net.net.bias, saved["net.bias"])


NETS = """
import torch
from torch import nn

class Gaps(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))

    def forward(self, x):
        return self.body(x).masked_fill((x.mean((1, 2, 3)) > 0.6)[:, None], float("nan"))

def gaps():
    torch.manual_seed(0)
    return Gaps().eval()

def plain():
    torch.manual_seed(0)
    return Gaps().body.eval()
"""


def strokes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grey 28×28 images, of which 5 of 20 are bright, in arrays; and nets that are made by ``their_gaps``."""
    (folder / "their_gaps.py").write_text(NETS)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    rng = np.random.default_rng(0)
    images = rng.integers(0, 100, (20, 28, 28), dtype=np.uint8)
    images[5:10] += 150
    (folder / "arrays").mkdir()
    for part in ("train", "test"):
        np.savez(folder / "arrays" / f"{part}.npz", images=images, labels=np.arange(20) % 2)


ARRAYS = ("data=arrays", "data.path=arrays", "threat=linf", "suite=probe", "threads=1", "out=out")


def test_logits_that_are_no_numbers_make_an_invalid_card_that_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strokes(tmp_path, monkeypatch)
    command(monkeypatch, evaluate, *ARRAYS, "model=their_gaps:gaps", "name=gaps", "panels=[outcome]", "threat.eps=0.1")
    card = judged(tmp_path / "out" / "gaps")
    assert card["sanity"]["verdict"] == "invalid"
    assert card["sanity"]["reasons"][0] == "5 of 20 images have logits that are not finite"
    assert sum(card["examples"]["correct"][5:10]) == 0
    assert "Verdict: invalid; 5 of 20 images have logits" in " ".join(capsys.readouterr().out.split())


def test_the_verdict_names_threat_and_radius_and_says_when_nobody_chose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strokes(tmp_path, monkeypatch)
    asked = (*ARRAYS, "model=their_gaps:plain", "panels=[]")
    command(monkeypatch, evaluate, *asked, "name=forgotten")
    said = " ".join(capsys.readouterr().out.split())
    assert "against Linf ε = 8/255 by the probe suite" in said
    words = "Linf ε = 8/255 is the default of data=arrays, meant for small colour photographs; images of strokes, such as"
    assert words in said.split("Verdict:")[1]
    assert any(note.startswith(words) for note in judged(tmp_path / "out" / "forgotten")["notes"])
    command(monkeypatch, evaluate, *asked, "name=chosen", "threat.eps=0.3")
    said = " ".join(capsys.readouterr().out.split())
    assert "against Linf ε = 0.3 by the probe suite" in said
    assert "is the default" not in said
    assert not any("is the default" in note for note in judged(tmp_path / "out" / "chosen")["notes"])


def test_a_net_for_normalised_images_is_judged_behind_its_mean_and_std(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strokes(tmp_path, monkeypatch)
    sys.path.append(str(tmp_path))
    import their_gaps

    net = their_gaps.plain()
    torch.save(net.state_dict(), "plain.pt")
    asked = (*ARRAYS, "model=their_gaps:plain", "weights=plain.pt", "panels=[]", "eps=0.1", "mean=[0.3]", "std=[0.2]")
    command(monkeypatch, evaluate, *asked, "name=normalised")
    card = judged(tmp_path / "out" / "normalised")
    data = np.load("arrays/test.npz")
    x, y = torch.from_numpy(data["images"])[:, None].float() / 255, torch.from_numpy(data["labels"])
    whole = normalised(net, [0.3], [0.2])
    torch.testing.assert_close(whole(x), net((x - 0.3) / 0.2))
    assert card["examples"]["correct"] == (whole(x).argmax(1) == y).tolist()
    for change, message in (
        ("std=null", "mean: expected mean and std together"),
        ("mean=[0.3,0.3]", "mean and std must hold one value for each channel"),
    ):
        with pytest.raises(SystemExit):
            command(monkeypatch, evaluate, *asked, "name=other", change)
        assert message in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        command(monkeypatch, evaluate, *NAMED, "suite=probe", "mean=[0.3]")
    assert "mean: expected model=module:callable beside it" in " ".join(capsys.readouterr().err.split())
