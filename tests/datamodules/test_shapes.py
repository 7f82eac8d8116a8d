"""Drawn scenes: the masks are those of the geometry, the attributes independent, and the class is the one chosen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from glassarmor.datamodules.colours import COLOURS, TYPICAL, luminance, name_colours
from glassarmor.datamodules.loader import seeded
from glassarmor.datamodules.shapes import (
    CHROMATIC,
    FREQUENCIES,
    LABELS,
    ORIENTATIONS,
    PARTS,
    SHAPES,
    TEXTURES,
    Scenes,
    Shapes,
    _outline,
    draw_scenes,
)
from tests.composing import config


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes(1000, 32, seeded(1))


def outline(shape: str, size: int = 200, radius: float = 80.0, angle: float = 0.0) -> tuple[Tensor, Tensor]:
    middle = torch.full((1, 2), size / 2)
    return _outline(torch.tensor([SHAPES.index(shape)]), middle, torch.tensor([radius]), torch.tensor([angle]), size)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("disc", math.pi),
        ("square", 1.6**2),
        ("triangle", 3 * math.sqrt(3) / 4),
        ("ring", math.pi * (1 - 0.4**2)),
        ("cross", 2 * (2 * 0.33) * (2 * 0.94) - 0.66**2),
    ],
)
@pytest.mark.parametrize("angle", [0.0, 0.2])
def test_areas_of_the_shapes(shape: str, area: float, angle: float) -> None:
    depth, _ = outline(shape, angle=angle)
    assert int((depth > 0).sum()) / 80**2 == pytest.approx(area, rel=0.02)


def test_corners_lie_at_the_corners() -> None:
    for shape, count in (("disc", 0), ("ring", 0), ("square", 4), ("triangle", 3), ("cross", 8)):
        depth, corner = outline(shape)
        rows, columns = (corner & (depth > 0))[0].nonzero(as_tuple=True)
        assert bool(len(rows)) == bool(count)
        if count:  # far from the centre, as no other part is
            away = torch.hypot(rows + 0.5 - 100, columns + 0.5 - 100) / 80
            assert away.min() > 0.55
    depth, corner = outline("triangle")
    assert corner[0, 100 - 78, 100]  # its tip points upwards
    assert not corner[0, 100 + 38, 100]


@pytest.mark.parametrize("size", [8, 13, 32, 64])
def test_any_size(size: int) -> None:
    drawn = draw_scenes(300, size, seeded(2))
    assert drawn.images.shape == (300, 3, size, size)
    share = drawn.inside.float().mean((1, 2))
    assert 0.02 < share.min() < share.max() < 0.6
    # Wholly in the image: a frame of the background is never cut at all four sides, and a disc is whole.
    disc = drawn.inside[drawn.shape == SHAPES.index("disc")]
    width, height = disc.any(1).sum(1), disc.any(2).sum(1)
    assert ((width - height).abs() <= 1).all()


def test_what_was_drawn_is_what_is_seen(scenes: Scenes) -> None:
    """Plain regions show the colour that they are said to have; patterned ones vary, and along their stripes don't."""
    named = name_colours(scenes.images)
    for side, region in ((1, scenes.inside), (0, ~scenes.inside)):
        plain = scenes.texture[:, side] == TEXTURES.index("plain")
        agrees = (named == scenes.colour[:, side, None, None])[plain][region[plain]]
        assert agrees.float().mean() > 0.99
    grey = luminance(scenes.images.float())
    for name, shift in (("horizontal", (0, 1)), ("vertical", (1, 0))):
        orientation = ORIENTATIONS.index(name)
        rows = (scenes.orientation[:, 0] == orientation) & (scenes.shape == SHAPES.index("triangle"))
        picture, background = grey[rows], ~scenes.inside[rows]
        moved, there = picture.roll(shift, (1, 2)), background & background.roll(shift, (1, 2))
        along = ((picture - moved).abs() * there)[:, 1:, 1:]
        assert along.max() == 0, name
        assert ((picture - picture.roll(shift[::-1], (1, 2))).abs() * background)[:, 1:, 1:].amax((1, 2)).min() > 10
    for name, shift in (("rising", (1, -1)), ("falling", (1, 1))):
        rows = scenes.orientation[:, 0] == ORIENTATIONS.index(name)
        picture, background = grey[rows], ~scenes.inside[rows]
        there = (background & background.roll(shift, (1, 2)))[:, 1:, 1:-1]
        same = (picture == picture.roll(shift, (1, 2)))[:, 1:, 1:-1]
        assert same[there].float().mean() > 0.99, name


def test_fine_patterns_change_more_often_than_coarse_ones(scenes: Scenes) -> None:
    grey = luminance(scenes.images.float())
    background = ~scenes.inside
    changes = ((grey[:, :, 1:] - grey[:, :, :-1]).abs() > 5) & background[:, :, 1:] & background[:, :, :-1]
    striped = scenes.orientation[:, 0] == ORIENTATIONS.index("vertical")
    rates = [
        float(changes[striped & (scenes.frequency[:, 0] == f)].float().mean((1, 2)).mean()) for f in range(len(FREQUENCIES))
    ]
    assert rates[0] > 1.7 * rates[1] > 1.7**2 * rates[2]


def test_attributes_are_independent_and_object_and_background_differ(scenes: Scenes) -> None:
    assert (scenes.colour[:, 0] != scenes.colour[:, 1]).all()
    for first, second in ((scenes.shape, scenes.texture[:, 1]), (scenes.shape, scenes.colour[:, 1])):
        table = torch.zeros(int(first.max()) + 1, int(second.max()) + 1).index_put_(
            (first, second), torch.ones(()), accumulate=True
        )
        expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
        freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
        assert ((table - expected) ** 2 / expected).sum() < freedom + 4 * math.sqrt(2 * freedom)
    periodic = [TEXTURES.index(name) for name in ("stripes", "checks", "dots")]
    assert torch.equal(scenes.frequency >= 0, torch.isin(scenes.texture, torch.tensor(periodic)))
    assert torch.equal(scenes.orientation >= 0, scenes.texture == TEXTURES.index("stripes"))
    assert torch.equal(scenes.part >= 0, scenes.inside)
    assert set(scenes.part.unique().tolist()) == {-1, *range(len(PARTS))}


def test_every_typical_colour_has_its_own_name() -> None:
    assert name_colours(TYPICAL[:, :, None, None])[:, 0, 0].tolist() == list(range(len(COLOURS)))


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((255, 0, 0), "red"),
        ((0, 255, 0), "green"),
        ((0, 0, 255), "blue"),
        ((255, 255, 0), "yellow"),
        ((255, 165, 0), "orange"),
        ((128, 0, 128), "purple"),
        ((255, 192, 203), "pink"),
        ((139, 69, 19), "brown"),
        ((128, 128, 128), "grey"),
        ((248, 248, 255), "white"),
        ((12, 12, 12), "black"),
        ((135, 206, 235), "blue"),  # sky
        ((34, 139, 34), "green"),  # forest
    ],
)
def test_colours_that_style_sheets_name(rgb: tuple[int, int, int], name: str) -> None:
    assert COLOURS[int(name_colours(torch.tensor(rgb, dtype=torch.uint8)[None, :, None, None]))] == name


@pytest.mark.parametrize("label", LABELS)
def test_the_class_is_the_one_chosen(label: str) -> None:
    data = Shapes(label=label, count=300, test_count=50, size=16)
    data.setup()
    assert data.image_shape == (3, 16, 16)
    assert data.num_classes == 5
    assert len(data.train) + len(data.val) == 300
    assert data.class_names == {"shape": SHAPES, "texture": TEXTURES}.get(label, tuple(COLOURS[i] for i in CHROMATIC))
    assert set(data.train.labels.tolist()) == set(range(5))


def test_the_images_are_the_same_whatever_decides_and_whatever_the_seed() -> None:
    loaded = [Shapes(label=label, count=60, test_count=20, size=8, seed=seed).load() for seed, label in enumerate(LABELS)]
    for train, test, _ in loaded[1:]:
        assert torch.equal(train.images, loaded[0][0].images)
        assert torch.equal(test.images, loaded[0][1].images)
    assert not torch.equal(loaded[0][0].images[:20], loaded[0][1].images)
    scenes = draw_scenes(60, 8, seeded(31, 8), CHROMATIC)
    assert torch.equal(scenes.images, loaded[0][0].images)
    assert torch.equal(scenes.shape, loaded[0][0].labels)
    assert torch.equal(torch.tensor(CHROMATIC)[loaded[1][0].labels], scenes.colour[:, 1])
    assert torch.equal(loaded[2][0].labels, scenes.texture[:, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "size"}, "data.label must be one of shape, colour, texture, got 'size'"),
        ({"size": 7}, "data.size must be a whole number ≥ 8"),
        ({"count": 0}, "data.count"),
        ({"test_count": 0}, "data.test_count"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shapes(**options)


def test_the_config_makes_it() -> None:
    from glassarmor.lightning_modules.commands import train

    few = ["data.count=60", "data.test_count=20", "data.size=8", "data.batch_size=8"]
    cfg = config("data=shapes", "data.label=texture", *few, "panels=[]")
    data = train.instantiate(cfg.data)
    data.setup()
    assert data.class_names == TEXTURES
    assert 0 < train.instantiate(cfg.threat).eps <= 1
