"""Concepts of any image in closed form; the procedural set; annotation read from folders and from Broden's layout."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from glassarmor.datamodules.colours import COLOURS
from glassarmor.datamodules.concepts import (
    ConceptSet,
    WithImageConcepts,
    image_concepts,
    label_image_concepts,
    procedural_concepts,
)
from glassarmor.datamodules.segmentation import Broden, SegmentationFolder
from glassarmor.interpret.concepts.dissection import dissect

ROOT = Path(__file__).resolve().parents[2]
CAMVID = Path(os.environ.get("GLASSARMOR_CAMVID", ROOT / "../shared/data/camvid"))


def seen(images: Tensor, category: str) -> list[list[list[str]]]:
    """Names of the concepts of one category, pixel by pixel, of the first image; "" for none."""
    concepts, categories = image_concepts(images.shape[1])
    labels = label_image_concepts(images)[:, list(dict.fromkeys(categories)).index(category)]
    names = np.array([*concepts, ""])[labels.numpy()]
    assert set(names.ravel()) <= {"", *(c for c, g in zip(concepts, categories, strict=True) if g == category)}
    return names.tolist()


def test_edges_have_the_direction_of_the_line() -> None:
    y, x = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    for name, side in (("vertical", x > 4), ("horizontal", y > 4), ("rising", x + y > 8), ("falling", x > y)):
        for picture in (side, ~side):
            rows = seen(picture.float()[None, None], "edge")[0]
            inner = {name for row in rows[2:-2] for name in row[2:-2]}
            assert inner == {"", f"{name} edge"}
            flat = np.array(rows) == ""
            assert 0.5 < flat.mean() < 0.9
    assert set(np.ravel(seen(torch.full((1, 3, 5, 5), 0.4), "edge"))) == {""}
    assert set(np.ravel(seen(0.5 + 0.1 * (x > 4).float()[None, None], "edge"))) == {""}  # too weak


def test_brightness_contrast_and_position() -> None:
    grey = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1, 1).expand(3, 1, 6, 6)
    assert [rows[0][0] for rows in seen(grey, "brightness")] == ["dark", "medium", "bright"]
    assert {name for rows in seen(grey, "contrast") for row in rows for name in row} == {"flat"}
    checks = (torch.arange(6)[:, None] + torch.arange(6)) % 2
    weak, strong = 0.5 + 0.1 * checks, checks.float()
    assert seen(weak[None, None], "contrast")[0][3][3] == "low contrast"
    assert seen(strong[None, None], "contrast")[0][3][3] == "high contrast"
    rows = seen(grey, "position")[0]
    assert rows[0] == ["top left"] * 2 + ["top"] * 2 + ["top right"] * 2
    assert rows[3][::2] == ["left", "middle", "right"]
    assert rows[5][4] == "bottom right"


def test_colours_and_their_absence_in_grey_images() -> None:
    image = torch.zeros(1, 3, 2, 2)
    image[0, 0, 0] = 1
    image[0, :, 1, 1] = 1
    assert seen(image, "colour")[0] == [["red", "red"], ["black", "white"]]
    assert label_image_concepts(image).shape == (1, 5, 2, 2)
    assert label_image_concepts(image[:, :1]).shape == (1, 4, 2, 2)
    assert "colour" in image_concepts(3)[1]
    assert "colour" not in image_concepts(1)[1]
    assert torch.equal(label_image_concepts(image), label_image_concepts((image * 255).to(torch.uint8)))


@pytest.mark.parametrize(("size", "channels"), [(8, 3), (32, 3), (32, 1), (21, 1)])
def test_procedural_set(size: int, channels: int) -> None:
    found = procedural_concepts(300, size, channels, batch_size=128)
    assert found.images.shape == (300, channels, size, size)
    assert len(found.concepts) == len(set(found.concepts)) == len(found.categories) == (60 if channels == 3 else 49)
    assert [len(images) for images, _ in found] == [128, 128, 44]
    labels = found.labels
    assert labels.dtype == torch.int16
    shares = torch.bincount(labels[labels >= 0].long(), minlength=len(found.concepts)) / labels[:, 0].numel()
    assert (shares > 0.0005).all()
    # A map holds one category, so that no pixel carries a concept twice.
    categories = list(dict.fromkeys(found.categories))
    assert labels.shape[1] == len(categories)
    of = torch.tensor([categories.index(name) for name in found.categories])
    for index in range(labels.shape[1]):
        present = labels[:, index][labels[:, index] >= 0].long()
        assert set(of[present].tolist()) == {index}
    # What is drawn of an object lies on it: shape and part are there together, each part on its own shape.
    shape, part = labels[:, 0], labels[:, 1]
    assert torch.equal(shape >= 0, part >= 0)
    for image, row, column in (part >= 0).nonzero()[::997].tolist():
        name = found.concepts[int(part[image, row, column])]
        assert name.startswith(found.concepts[int(shape[image, row, column])])
    assert "disc corner" not in found.concepts
    x, _ = next(iter(found))
    assert x.dtype == torch.float32
    assert 0 <= float(x.min()) < float(x.max()) <= 1


def test_same_seed_same_set() -> None:
    first, second, other = (procedural_concepts(20, 16, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.images, other.images)


def test_grey_scenes_are_those_in_colour_without_their_colours() -> None:
    colour, grey = procedural_concepts(20, 16, 3), procedural_concepts(20, 16, 1)
    assert torch.equal(colour.labels[:, :5], grey.labels[:, :5])
    assert float(colour.images.float().mean()) == pytest.approx(float(grey.images.float().mean()), rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 7}, "concepts.size must be a whole number ≥ 8"),
        ({"count": 0}, "concepts.count"),
        ({"channels": 2}, "concepts.channels must be 1 or 3, got 2"),
    ],
)
def test_procedural_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        procedural_concepts(**options)


def test_a_unit_that_sees_red_is_found_to_detect_red() -> None:
    """Red minus the larger of green and blue, at full resolution: the whole chain on drawn scenes."""
    data = procedural_concepts(200, 32)
    net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[2.0, -3, -2], [-2, -1, 2], [-1, -1, -1]])[..., None, None])
    found = dissect(net, data, ["0"], quantile=0.05)["0"]
    assert [found.concepts[k] for k in found.best_concept.tolist()] == ["red", "blue", "black"]
    assert found.detectors.all()
    assert found.best_iou.min() > 0.4
    assert (found.best_iou > 4 * found.chance.gather(1, found.best_concept[:, None])[:, 0]).all()


# --- Folders of images with index masks ------------------------------------------------------------------------------


def write_folder(root: Path, count: int = 3, width: int = 12, height: int = 8) -> None:
    """Grey value = 20 · class index + 10, so that crops of image and mask can be compared."""
    (root / "classes.json").write_text(json.dumps({"0": "sky", "1": "road", "2": "tree", "5": "unlabelled"}))
    for part in ("images", "masks"):
        (root / "train" / part).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        mask = generator.choice([0, 1, 2, 5], size=(height // 4, width // 4)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
        Image.fromarray(mask).save(root / "train" / "masks" / f"{number:02d}.png")
        Image.fromarray(np.stack([20 * mask + 10] * 3, -1)).save(root / "train" / "images" / f"{number:02d}.png")


def classes_of(images: Tensor) -> Tensor:
    """Index of sky, road, tree, −1, from the grey values."""
    value = ((images[:, 0] * 255).round() - 10) / 20
    return torch.where(value == 5, -1, value)


def test_folder_reads_the_centre_square(tmp_path: Path) -> None:
    write_folder(tmp_path)
    found = SegmentationFolder(str(tmp_path), size=8, batch_size=2)
    assert (found.concepts, found.categories) == (("sky", "road", "tree"), ("object",) * 3)
    assert len(found) == 3
    batches = list(found)
    assert [len(images) for images, _ in batches] == [2, 1]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(classes_of(images), labels[:, 0].float())
    mask = np.array(Image.open(tmp_path / "train" / "masks" / "01.png")).astype(int)[:, 2:10]
    np.testing.assert_array_equal(labels[1, 0].numpy(), np.where(mask == 5, -1, mask))


def test_folder_crops_image_and_mask_alike_and_the_same_each_time(tmp_path: Path) -> None:
    write_folder(tmp_path)
    found = SegmentationFolder(str(tmp_path), size=16, crops=5, crop=0.5, channels=1)
    assert len(found) == 15
    (images, labels), (again, _) = next(iter(found)), next(iter(found))
    assert images.shape == (15, 1, 16, 16)
    assert torch.equal(images, again)
    assert (classes_of(images) == labels[:, 0]).float().mean() > 0.6  # apart from where enlarging mixes two classes
    assert len({image.numpy().tobytes() for image in images}) > 10
    other = SegmentationFolder(str(tmp_path), size=16, crops=5, crop=0.5, channels=1, seed=1)
    assert not torch.equal(images, next(iter(other))[0])


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"concepts.path: expected the names of the classes"):
        SegmentationFolder(str(tmp_path))
    write_folder(tmp_path)
    with pytest.raises(ValueError, match=r"concepts.crop must lie in \(0, 1\], got 2"):
        SegmentationFolder(str(tmp_path), crop=2)
    with pytest.raises(FileNotFoundError, match=r"no folder .*val"):
        SegmentationFolder(str(tmp_path), split="val")
    (tmp_path / "classes.json").write_text('{"0": "sky", "1": "road", "2": "tree"}')
    with pytest.raises(ValueError, match=r"holds indices without a name in classes.json: \[5\]"):
        list(SegmentationFolder(str(tmp_path), size=8))
    (tmp_path / "train" / "masks" / "00.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 images have no mask of the same name, e.g. '00.png'"):
        SegmentationFolder(str(tmp_path))
    (tmp_path / "classes.json").write_text('["sky"]')
    with pytest.raises(ValueError, match="must map indices to names"):
        SegmentationFolder(str(tmp_path))


def test_image_concepts_beside_real_annotation(tmp_path: Path) -> None:
    write_folder(tmp_path)
    plain = SegmentationFolder(str(tmp_path), size=8)
    both = WithImageConcepts(plain)
    assert len(both) == 3
    assert both.concepts[:4] == ("sky", "road", "tree", "black")
    assert both.categories[3] == "colour"
    images, labels = next(iter(both))
    assert labels.shape == (3, 6, 8, 8)
    assert torch.equal(labels[:, 0], next(iter(plain))[1][:, 0])
    colours = labels[:, 1].unique().tolist()
    assert {both.concepts[k] for k in colours} <= set(COLOURS)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert (
        dissect(net, both, ["1"])["1"].concept.tolist()[3:14]
        == torch.bincount(labels[:, 1].flatten().long(), minlength=14)[3:].tolist()
    )
    assert images.shape == (3, 3, 8, 8)


@pytest.mark.skipif(not CAMVID.is_dir(), reason="needs the CamVid images; GLASSARMOR_CAMVID names their folder")
def test_camvid() -> None:
    found = SegmentationFolder(str(CAMVID), split="val", size=32, crops=2)
    assert len(found) == 202
    assert len(found.concepts) == 11
    images, labels = next(iter(found))
    assert images.shape == (64, 3, 32, 32)
    road, sky = ((labels[:, 0] == found.concepts.index(name)).float() for name in ("road", "sky"))
    height = torch.arange(32.0)[:, None]
    assert (road * height).sum() / road.sum() > (sky * height).sum() / sky.sum()  # the sky lies above the road
    bright = images.mean(1)
    assert (bright * sky).sum() / sky.sum() > (bright * road).sum() / road.sum()


# --- Broden ----------------------------------------------------------------------------------------------------------


def write_broden(root: Path) -> None:
    """Three pictures of 4×4; label 300 needs the green channel."""
    (root / "images" / "set").mkdir(parents=True)
    (root / "category.csv").write_text("name,first,last,count,frequency\nobject,1,300,3,2\npart,2,2,1,1\nscene,4,4,1,1\n")
    (root / "label.csv").write_text(
        "number,name,category,frequency,coverage,syns\n"
        "1,cat,object(2),2,1.0,\n2,paw,part(9);object(3),1,0.1,paws\n4,kitchen,scene(1),1,1.0,\n300,lamp,object(1),1,0.2,\n"
    )
    header = "image,split,ih,iw,sh,sw,object,part,scene\n"
    rows = (
        "set/a.jpg,train,4,4,4,4,set/a_object.png;set/a_more.png,set/a_part.png,4\n"
        "set/b.jpg,val,4,4,4,4,300,,\n"
        "set/c.jpg,train,4,4,4,4,,,\n"
    )
    (root / "index.csv").write_text(header + rows)
    for name, value in (("a", 50), ("b", 150), ("c", 250)):
        Image.new("RGB", (4, 4), (value,) * 3).save(root / "images" / "set" / f"{name}.jpg")

    def save(name: str, numbers: np.ndarray) -> None:
        coded = np.stack([numbers % 256, numbers // 256, 0 * numbers], -1).astype(np.uint8)
        Image.fromarray(coded).save(root / "images" / "set" / f"{name}.png")

    first = np.zeros((4, 4), int)
    first[:2] = 1
    more = np.zeros((4, 4), int)
    more[1] = 1  # the cat again: counts once
    more[3, 3] = 300
    part = np.zeros((4, 4), int)
    part[0, 0] = 2
    for name, numbers in (("a_object", first), ("a_more", more), ("a_part", part)):
        save(name, numbers)


def test_broden(tmp_path: Path) -> None:
    write_broden(tmp_path)
    found = Broden(str(tmp_path), size=4)
    assert found.concepts == ("cat", "paw", "kitchen", "lamp")
    assert found.categories == ("object", "part", "scene", "object")
    assert len(found) == 2  # c is not annotated
    images, labels = next(iter(found))
    assert [round(float(image.mean()) * 255) for image in images] == [50, 150]
    assert labels.shape == (2, 4, 4, 4)
    counts = torch.stack([(labels == k).sum((1, 2, 3)) for k in range(4)], 1)
    assert counts.tolist() == [[8, 1, 16, 1], [0, 0, 0, 16]]
    assert labels[0, 1, 3, 3] == 3
    assert (labels[1, 1:] == -1).all()
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert dissect(net, found, ["0"], union="category")["0"].concept.tolist() == [8, 1, 16, 17]


def test_broden_by_split_and_category(tmp_path: Path) -> None:
    write_broden(tmp_path)
    assert len(Broden(str(tmp_path), size=4, split="val")) == 1
    parts = Broden(str(tmp_path), size=4, use=("part",))
    assert (parts.concepts, len(parts)) == (("paw",), 1)
    assert int((next(iter(parts))[1] == 0).sum()) == 1
    with pytest.raises(ValueError, match=r"concepts.use: expected names among object, part, scene, found"):
        Broden(str(tmp_path), use=("colour",))
    with pytest.raises(ValueError, match="no image of split 'test'"):
        Broden(str(tmp_path), split="test")
    (tmp_path / "label.csv").write_text("number,name,category\n1,cat,object(2)\n")
    with pytest.raises(ValueError, match=r"holds labels that label.csv lacks"):
        list(Broden(str(tmp_path), size=4))
    (tmp_path / "category.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected Broden's category.csv"):
        Broden(str(tmp_path))


def test_a_set_in_memory_is_read_as_it_is() -> None:
    images, labels = torch.full((3, 1, 2, 2), 255, dtype=torch.uint8), torch.zeros(3, 1, 2, 2, dtype=torch.int16)
    batches = list(ConceptSet(images, labels, ("a",), ("x",), batch_size=2))
    assert [float(x.max()) for x, _ in batches] == [1, 1]
    assert [len(x) for x, _ in batches] == [2, 1]
