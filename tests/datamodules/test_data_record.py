"""The data that a run was about: found from any folder, told apart by classes and images, and held by the card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from glassarmor.datamodules import fingerprint as module
from glassarmor.datamodules.arrays import Arrays
from glassarmor.datamodules.digits import Digits
from glassarmor.datamodules.fingerprint import fingerprint
from glassarmor.datamodules.image_folder import ImageFolder
from glassarmor.datamodules.images import ImageDataModule
from glassarmor.datamodules.shapes import Shapes
from glassarmor.defenses.evaluation.card import read_card
from glassarmor.interpret.views.page.page import read_script
from glassarmor.lightning_modules.commands import evaluate, train
from glassarmor.lightning_modules.run.data_record import other_classes, other_images
from glassarmor.lightning_modules.study.records import check_comparable, record_of
from tests.commands.test_evaluate import command

CLASSES = ("ants", "bees", "wasps")


def write_folder(
    root: Path, names: tuple[str, ...] = CLASSES, parts: tuple[str, ...] = ("train", "test"), seed: int = 0
) -> Path:
    """Images of one colour a class, with noise; 16 of each class and part."""
    rng = np.random.default_rng(seed)
    for part in parts:
        for label, name in enumerate(names):
            (root / part / name).mkdir(parents=True)
            for i in range(16):
                pixels = np.clip(rng.normal(60 + 60 * label, 20, (12, 12, 3)), 0, 255).astype(np.uint8)
                PIL.Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def write_arrays(root: Path) -> Path:
    rng = np.random.default_rng(0)
    root.mkdir()
    for part in ("train", "test"):
        images, labels = rng.integers(0, 256, (48, 12, 12, 3), dtype=np.uint8), np.arange(48) % 3
        np.savez(root / f"{part}.npz", images=images, labels=labels, class_names=CLASSES)
    return root


def folder_print(path: Path, **more: Any) -> dict[str, Any]:
    return printed(ImageFolder(path=str(path), size=12, batch_size=4, **more))


def printed(data: ImageDataModule, **more: Any) -> dict[str, Any]:
    data.setup("fit")
    return json.loads(json.dumps(fingerprint(data, **more)))


@pytest.mark.parametrize("kind", ["digits", "shapes", "arrays", "parts", "classes"])
def test_a_fingerprint_is_that_of_the_data_wherever_it_lies(kind: str, tmp_path: Path) -> None:
    def made(path: Path, seed: int = 0) -> dict[str, Any]:
        if kind in ("digits", "shapes"):
            return printed(Digits(seed=seed) if kind == "digits" else Shapes(count=300, test_count=60, seed=seed))
        if not path.exists():
            path.mkdir(parents=True)
            write_arrays(path / "d") if kind == "arrays" else write_folder(path / "d", parts=("train", "test"))
        if kind == "arrays":
            return printed(Arrays(path=str(path / "d"), batch_size=4, seed=seed))
        return folder_print(path / "d" / ("train" if kind == "classes" else ""), seed=seed)

    one, other, seed = made(tmp_path / "a"), made(tmp_path / "b" / "c"), made(tmp_path / "a", 1)
    assert {**one, "places": {}} == {**other, "places": {}}
    assert bool(one["places"]) == (kind not in ("digits", "shapes"))
    assert all(Path(place).is_absolute() and Path(place).exists() for place in one["places"].values())
    assert one["sources"] == seed["sources"]  # of what was read, before any seed
    assert one["splits"]["train"]["sample"] != seed["splits"]["train"]["sample"]
    assert (one["splits"]["test"] == seed["splits"]["test"]) or kind == "none"
    assert len(one["sources"]["training"]["by_class"]) == len(one["classes"])
    assert other_classes(one, other) == ""
    assert other_images(one, other) == []


def swap(root: Path, parts: tuple[str, ...] = ("train", "test")) -> None:
    for part in parts:
        for old, new in (("ants", "other"), ("bees", "ants"), ("other", "bees")):
            (root / part / old).rename(root / part / new)


def rename(root: Path, new: str) -> None:
    for part in ("train", "test"):
        (root / part / "ants").rename(root / part / new)


CHANGES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "other classes": (
        lambda r: rename(r, "cats"),
        "other classes: expected ants, bees, wasps (3), found bees, cats, wasps",
        "",
    ),
    "a class more": (lambda r: shutil.copytree(r / "train/ants", r / "train/zebras"), "other classes", ""),
    "folders swapped": (swap, "the training images of class 'bees' are now those of 'ants'", ""),
    "swapped in the test": (lambda r: swap(r, ("test",)), "the test images of class 'bees' are now those of 'ants'", ""),
    "an image less": (lambda r: (r / "test/bees/3.png").unlink(), "", "test: 47 images where there were 48"),
    "other pixels": (
        lambda r: shutil.copy(r / "train/ants/0.png", r / "test/ants/5.png"),
        "",
        "test: other images or labels",
    ),
    "other names": (
        lambda r: (r / "test/ants/0.png").rename(r / "test/ants/00.png"),
        "",
        "test files: other names or sizes",
    ),
}


@pytest.mark.parametrize(("change", "classes", "images"), CHANGES.values(), ids=CHANGES)
def test_what_is_other_is_told(tmp_path: Path, change: Callable[[Path], Any], classes: str, images: str) -> None:
    before = folder_print(write_folder(tmp_path / "data"))
    change(tmp_path / "data")
    now = folder_print(tmp_path / "data")
    told = other_classes(before, now)
    assert told.startswith(classes) if classes else told == ""
    if images:
        assert any(line.startswith(images) for line in other_images(before, now))


def test_swapped_folders_are_told_where_test_images_are_split_off_by_chance(tmp_path: Path) -> None:
    """The split changes with the labels, so that what it leaves of a class is not what it left before."""
    folder = write_folder(tmp_path / "data") / "train"
    before = folder_print(folder)
    swap(folder, ("",))
    assert other_classes(before, folder_print(folder)).startswith(
        "the training images of class 'bees' are now those of 'ants'"
    )


def test_the_order_of_classes_counts(tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "data")
    one, other = (printed(Arrays(path=str(path), batch_size=4, names=names)) for names in (CLASSES, CLASSES[::-1]))
    assert other_classes(one, other).startswith("the same classes in another order: expected ants, bees, wasps")


def test_every_pixel_is_hashed_on_request_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change beside the sample, of no file's name or size, is seen only then; a file that was touched is read again."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (3000, 2, 2, 1), dtype=np.uint8), np.arange(3000) % 3

    def write() -> None:
        for part in ("train", "test"):
            np.savez(tmp_path / f"{part}.npz", images=images, labels=labels)

    def made(whole: bool) -> dict[str, Any]:
        return printed(Arrays(path=str(tmp_path), batch_size=4), whole=whole, cache=tmp_path / "cache")

    write()
    sampled, whole = made(False), made(True)
    hashed: list[int] = []
    pixels = module._pixels
    monkeypatch.setattr(module, "_pixels", lambda of, rows: hashed.append(len(rows)) or pixels(of, rows))
    assert made(True) == whole
    assert max(hashed) <= module.SAMPLE
    images[4] += 1
    write()
    assert other_images(sampled, made(False)) == []
    assert "test: other images or labels, 3000 as before" in other_images(whole, made(True))
    assert max(hashed) > module.SAMPLE


SMALL = (
    *("data=image_folder", "data.path=data", "data.size=12", "data.batch_size=8", "data.augment=null", "network.width=0.25"),
    *("defense=pgd_at", "regularizers=[]", "panels=[]", "health=off", "compare_undefended=false", "wandb.mode=disabled"),
    *("trainer.max_epochs=1", "trainer.accelerator=cpu", "probe.size=3", "threads=1", "name=run", "out=runs"),
    *("defense.attack.steps=1", "val_attack.steps=1", "probe.attack.steps=1", "test_attacks.PGD-20.steps=1"),
)
LOOK = ("images=6", "threads=1", "panels=[outcome]", "out=out")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ and runs/run, trained on it by a relative path."""
    root = tmp_path_factory.mktemp("made")
    write_folder(root / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        command(patch, train, *SMALL)
    return root


@pytest.fixture
def there(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, whose run says that its data lies in the copy."""
    shutil.copytree(made, tmp_path / "there")
    file = tmp_path / "there" / "runs" / "run" / "run.json"
    file.write_text(file.read_text().replace(str(made), str(tmp_path / "there")))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "there"


def said(capsys: pytest.CaptureFixture[str]) -> str:
    out = capsys.readouterr()
    return " ".join((out.out + out.err).split())


def test_a_run_holds_its_data_and_is_judged_on_it_from_anywhere(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = json.loads((there / "runs/run/run.json").read_text())
    assert info["data"]["places"] == {"path": str(there / "data")}
    assert info["data"]["classes"] == list(CLASSES)
    write_folder(tmp_path / "data", ("cats", "dogs", "emus"))  # what the relative path names from here
    words = (f"checkpoint={there}/runs/run", "suite=probe", "images=9", "threads=1", "panels=[]", "out=out", "name=card")
    command(monkeypatch, evaluate, *words)
    card = read_card(tmp_path / "out" / "card" / "card.json")
    assert card["data"]["classes"] == list(CLASSES)
    assert card["data"]["fingerprint"] == info["data"]["splits"]["test"]
    assert card["data"]["differs"] == []
    assert card["config"]["data"]["path"] == str(there / "data")
    assert card["model"]["training"] == {"config": record_of(there / "runs/run").config, "changed": []}
    assert len(card["sanity"]["places"]) == card["sanity"]["images"] == 9
    assert "differ" not in said(capsys)
    # Other images of the same classes: said, and held by the card.
    shutil.copy(there / "data/train/ants/0.png", there / "data/test/ants/5.png")
    command(monkeypatch, evaluate, *words[:-1], "name=other")
    assert "checkpoint: the images differ from those of" in said(capsys)
    card = read_card(tmp_path / "out" / "other" / "card.json")
    assert "test: other images or labels, 48 as before" in card["data"]["differs"][0]
    assert card["data"]["differs"][0] in (tmp_path / "out" / "other" / "card.md").read_text()


@pytest.mark.parametrize(
    ("how", "change"),
    [("checkpoint", "rename"), ("against", "rename"), ("twin", "swap"), ("resume", "swap"), ("resume", "rename")],
)
def test_other_classes_are_refused_by_every_door(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str, change: str
) -> None:
    run = there / "runs" / "run"
    if how in ("against", "twin"):  # beside a run that was trained after the change
        shutil.copytree(run, there / "runs" / "new")
    rename(there / "data", "cats") if change == "rename" else swap(there / "data")
    if how in ("against", "twin"):
        file = there / "runs" / "new" / "run.json"
        now = folder_print(there / "data", augment=None, val_fraction=0.1)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"data": now}))
    words = {
        "checkpoint": (evaluate, *LOOK, f"checkpoint={run}"),
        "against": (evaluate, *LOOK, f"checkpoint={there}/runs/new", f"against={run}"),
        "twin": (evaluate, *LOOK, "suite=probe", f"checkpoint={there}/runs/new", f"twin={run}"),
        "resume": (train, f"resume={run}", "trainer.max_epochs=2"),
    }[how]
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *words)
    assert stop.value.code == 2
    told = said(capsys)
    assert f"error: {how}: {run} was trained on other data" in told
    assert ("cats" if change == "rename" else "are now those of") in told
    assert (run / "config.yaml").read_bytes() == before
    assert not Path("out").exists()


def test_data_that_is_gone_is_not_taken_from_elsewhere(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (there / "data").rename(tmp_path / "moved")
    write_folder(tmp_path / "data", seed=1)  # the same classes, other images
    for words in ((evaluate, *LOOK, f"checkpoint={there}/runs/run"), (train, f"resume={there}/runs/run")):
        with pytest.raises(SystemExit):
            command(monkeypatch, *words)
        assert f"lay at {there}/data, where nothing is now" in said(capsys)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "moved").rename(tmp_path / "data")
    command(monkeypatch, evaluate, *LOOK, f"checkpoint={there}/runs/run", "name=same")
    assert "images differ" not in said(capsys)


def test_a_run_of_before_says_that_it_holds_no_record(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = there / "runs/run/run.json"
    info = json.loads(file.read_text())
    del info["data"]
    file.write_text(json.dumps(info))
    monkeypatch.chdir(there)
    command(monkeypatch, evaluate, *LOOK, "checkpoint=runs/run", "name=old")
    assert said(capsys).count("from before runs recorded their data") == 1
    file.write_text(json.dumps(info | {"data": {"classes": ["a"]}}))
    with pytest.raises(SystemExit):
        command(monkeypatch, evaluate, *LOOK, "checkpoint=runs/run", "name=damaged")
    assert "run.json: the record of the run's data is damaged" in said(capsys)


def test_a_run_that_goes_on_over_other_images_says_so_for_ever(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(there / "runs" / "run", there / "runs" / "plain")
    shutil.copy(there / "data/train/ants/0.png", there / "data/train/ants/5.png")
    command(monkeypatch, train, f"resume={there}/runs/run", "trainer.max_epochs=2")
    assert "resume: the images differ from those of" in said(capsys)
    info = json.loads((there / "runs/run/run.json").read_text())
    assert [each["step"] for each in info["earlier_data"]] == [info["earlier_data"][0]["step"]]
    assert info["data"] != info["earlier_data"][0]["data"]
    page = read_script(there / "runs/run/report/data/manifest.js")
    assert dict(page["meta"])["other images"].startswith("from epoch "), "its page says so, too"
    whole, mixed = (record_of(there / "runs" / name) for name in ("plain", "run"))
    assert any(change.startswith("data from") for change in mixed.about["changed"])
    assert not any("data.path" in change for change in mixed.about["changed"])
    with pytest.raises(ValueError, match="don't compare"):
        check_comparable([whole, mixed], any_effort=True)
