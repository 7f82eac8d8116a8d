"""Dissection: hand-set units get their labels, and the counts are those of loops written from the paper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from glassarmor.interpret.concepts.dissection import STATES, Dissection, dissect, upsampling
from glassarmor.interpret.concepts.quantiles import ExactTail, HistogramTail, allowed_above
from tests.reference import dissection as reference
from tests.reference.nets import Residual, unchanged, untidy


@dataclass
class Annotated:
    images: Tensor
    labels: Tensor
    concepts: tuple[str, ...]
    categories: tuple[str, ...]
    batch: int = 4

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images.split(self.batch), self.labels.split(self.batch), strict=True)


class Identity(nn.Module):
    """The units are the channels of the image; ``pooled`` averages squares of that many pixels first."""

    def __init__(self, pooled: int = 1) -> None:
        super().__init__()
        self.units = nn.AvgPool2d(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.units(x).mean((2, 3))


def one(images: Tensor, labels: Tensor, groups: tuple[str, ...], **options) -> Dissection:
    batch, pooled = options.pop("batch", 4), options.pop("pooled", 1)
    data = Annotated(images, labels, tuple(f"c{k}" for k in range(len(groups))), groups, batch)
    return dissect(Identity(pooled), data, ["units"], **options)["units"]


def random_case(seed: int = 0, images: int = 12, units: int = 5, size: int = 8, dyadic: bool = True):
    """Images, label maps of three categories, the masks as (N, K, H, W) bool; some images lack a category."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, units, size, size, generator=generator)
    if dyadic:  # few values: many ties, and sums that fp32 holds exactly
        x = (x * 4).round() / 4
    labels = torch.randint(-1, 3, (images, 3, size, size), generator=generator)
    labels = torch.where(labels >= 0, labels + torch.tensor([0, 3, 6]).view(3, 1, 1), -1)
    labels[::3, 1] = -1
    labels[1::4, 2] = -1
    labels[2, 2] = 7  # one label for a whole image
    masks = torch.stack([(labels == k).any(1) for k in range(9)], 1)
    return x, labels, masks, ("a",) * 3 + ("b",) * 3 + ("c",) * 3


@pytest.mark.parametrize("quantile", [0.005, 0.05, 0.4])
@pytest.mark.parametrize(("pooled", "dyadic"), [(1, True), (2, True), (4, True), (2, False), (8, False)])
def test_counts_are_those_of_plain_loops(quantile: float, pooled: int, dyadic: bool) -> None:
    x, labels, masks, groups = random_case(dyadic=dyadic)
    acts = nn.functional.avg_pool2d(x, pooled)
    category_of = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    expected = reference.dissect(acts.numpy(), masks.numpy(), category_of, quantile)
    found = one(x, labels, groups, pooled=pooled, quantile=quantile)
    np.testing.assert_array_equal(found.thresholds.numpy(), expected.thresholds.astype(np.float32))
    for name in ("intersection", "unit", "concept", "unit_carried", "unit_met"):
        np.testing.assert_array_equal(getattr(found, name).numpy(), getattr(expected, name), err_msg=name)
        assert getattr(found, name).dtype == torch.int64
    np.testing.assert_array_equal(found.top_images[:, 0].numpy(), expected.top_image)
    for union in ("global", "category", "met"):
        np.testing.assert_allclose(replace(found, union=union).iou.numpy(), expected.iou(union, category_of), rtol=1e-15)
    assert found.pixels == masks[:, 0].numel()


def test_enlarging_between_sizes_that_are_no_multiples() -> None:
    act = torch.randn(5, 7, dtype=torch.float64)
    found = upsampling(5, 13, act) @ (act @ upsampling(7, 9, act).T)
    np.testing.assert_allclose(found.numpy(), reference.enlarge(act.numpy(), 13, 9), rtol=1e-12)


def test_units_that_detect_a_concept_get_its_name_and_iou_one() -> None:
    """Channel k of the image is the mask of concept k; the 1×1 weights send it, scaled and shifted, to unit 2−k."""
    labels = torch.full((10, 2, 8, 8), -1)
    labels[:4, 0, :2, :3] = 0
    labels[4:9, 0, 5, 5:7] = 1
    labels[9, 1, 4:, :2] = 2
    images = torch.stack([(labels == k).any(1) for k in range(3)], 1).float()
    net = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.0, 0, 2], [0, 0.5, 0], [3, 0, 0], [0, 0, 0], [0, 0, 0]])[:, :, None, None])
        net[0].bias.copy_(torch.tensor([0.25, -0.1, 7, -1, 0.5]))
    data = Annotated(images, labels, ("sky", "pole", "road"), ("stuff", "thing", "stuff"))
    found = dissect(net, data, ["1"], quantile=0.04)["1"]
    assert [found.concepts[k] for k in found.best_concept[:3].tolist()] == ["road", "pole", "sky"]
    assert found.best_iou.tolist() == [1, 1, 1, 0, 0]
    assert found.detectors.tolist() == [True, True, True, False, False]
    assert found.detectors_by_category == {"stuff": 2, "thing": 1} == found.unique_detectors
    assert [STATES[s] for s in found.state.tolist()] == ["alive"] * 3 + ["zero", "constant"]
    assert found.intersection[:3].tolist() == [[0, 0, 8], [0, 10, 0], [24, 0, 0]]
    assert found.top_images[:2, 0].tolist() == [9, 4]
    assert found.top_positions[:2, 0].tolist() == [[4, 0], [5, 5]]
    assert found.top_values[:2, 0].tolist() == [2.25, pytest.approx(0.4)]
    # Two units of one concept are two detectors, but one unique detector.
    with torch.no_grad():
        net[0].weight[3] = net[0].weight[2]
        net[0].bias[3] = 1
    twice = dissect(net, data, ["1"], quantile=0.04)["1"]
    assert twice.detectors_by_category == {"stuff": 3, "thing": 1}
    assert twice.unique_detectors == {"stuff": 2, "thing": 1}


def test_unions_in_closed_form() -> None:
    """Four images of 16 pixels: unit 0 fires on the upper half of each; the concept fills the left half of image 0, its
    category's other concept the lowest row of image 1."""
    x = torch.zeros(4, 1, 4, 4)
    x[:, :, :2] = 1
    labels = torch.full((4, 1, 4, 4), -1)
    labels[0, 0, :, :2] = 0
    labels[1, 0, 3] = 1
    found = one(x, labels, ("a", "a"), quantile=0.5)
    assert found.intersection.tolist() == [[4, 0]]
    assert replace(found, union="global").iou.tolist() == [[4 / (32 + 8 - 4), 0]]
    assert replace(found, union="category").iou.tolist() == [[4 / (16 + 8 - 4), 0]]  # images 0 and 1 carry it
    assert replace(found, union="met").iou.tolist() == [[4 / (8 + 8 - 4), 0]]  # in image 1 the unit doesn't meet it


def test_shuffled_masks_leave_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(400, 6, 8, 8, generator=generator)
    labels = torch.where(x > 0.95, torch.arange(6).view(6, 1, 1), -1)  # each unit's own concept, one map each
    groups = ("a",) * 6
    true = one(x, labels, groups, quantile=0.05, batch=100)
    assert true.best_iou.min() > 0.95
    mixed = labels.permute(0, 2, 3, 1).reshape(-1, 6)
    mixed = mixed[torch.randperm(len(mixed), generator=generator)].view(400, 8, 8, 6).permute(0, 3, 1, 2)
    shuffled = one(x, mixed, groups, quantile=0.05, batch=100)
    expected = float(400 * 64 * 0.05**2)  # pixels in common, with that variance and a little less
    assert ((shuffled.intersection - expected).abs() < 4 * expected**0.5).all()
    assert float((shuffled.iou / shuffled.chance).mean()) == pytest.approx(1, abs=0.03)
    assert not shuffled.detectors.any()
    assert true.detectors.all()


def test_any_batches_and_any_budget_give_the_same() -> None:
    x, labels, _, groups = random_case(seed=3, images=23)
    whole = one(x, labels, groups, quantile=0.03, pooled=2, batch=23)
    for batch, memory in ((1, 2**28), (5, 2**28), (22, 2**28), (5, 40_000)):  # the last keeps nothing: two forwards each
        part = one(x, labels, groups, quantile=0.03, pooled=2, batch=batch, memory=memory)
        assert part.relative_error == 0
        for name, value in vars(whole).items():
            if isinstance(value, Tensor):
                assert torch.equal(value, getattr(part, name)), name


def test_a_small_budget_runs_twice_a_large_one_once() -> None:
    x, labels, _, groups = random_case(images=8)
    net, runs = Identity(), []
    net.register_forward_pre_hook(lambda *_: runs.append(1))
    data = Annotated(x, labels, tuple("abcdefghi"), groups)
    dissect(net, data, ["units"])
    learned = 1  # which axis is what
    assert len(runs) == learned + 2
    dissect(net, data, ["units"], memory=40_000)
    assert len(runs) == learned + 2 + 4


def test_all_layers_at_once_and_the_net_as_it_was() -> None:
    x, labels, _, groups = random_case(units=3, dyadic=False)
    net, data = untidy(Residual()), Annotated(x, labels, tuple("abcdefghi"), groups)
    with unchanged(net):
        together = dissect(net, data, ["block2", "stem", "head"])
    assert list(together) == ["stem", "block2", "head"]
    assert together["block2"].map_size == (4, 4)
    assert together["head"].map_size == (1, 1)  # no positions: the whole image fires
    assert set((together["head"].unit % 64).tolist()) == {0}
    alone = dissect(net, data, ["block2"])["block2"]
    assert torch.equal(alone.intersection, together["block2"].intersection)


def test_top_patches() -> None:
    x = torch.zeros(9, 1, 6, 6)
    x[7, 0, 2, 5], x[1, 0, 5, 0], x[4, 0, 3, 3], x[8, 0, 0, 1] = 3, 2, 2, 1
    found = one(x, torch.zeros(9, 1, 6, 6, dtype=torch.int64), ("a",), top=5, batch=2)
    assert found.top_images.tolist() == [[7, 1, 4, 8, 0]]  # the tie, and then the zeros: in order of arrival
    assert found.top_positions[0, :4].tolist() == [[2, 5], [5, 0], [3, 3], [0, 1]]
    assert found.top_values.tolist() == [[3, 2, 2, 1, 0]]
    assert one(x, torch.zeros(9, 1, 6, 6, dtype=torch.int64), ("a",), top=99).top_images.shape == (1, 9)


def test_dead_units_are_named() -> None:
    x = torch.randn(10, 4, 4, 4)
    x[:, 1] = torch.where(torch.rand(10, 4, 4) < 0.3, 2.0, -1.0)  # its maximum is shared by more than the quantile
    x[:, 2] = -3.5
    x[:, 3] = 0
    labels = torch.zeros(10, 1, 4, 4, dtype=torch.int64)
    found = one(x, labels, ("a",), quantile=0.1)
    assert [STATES[s] for s in found.state.tolist()] == ["alive", "never exceeds", "constant", "zero"]
    assert found.dead.tolist() == [False, True, True, True]
    assert found.thresholds[1:].tolist() == [2, -3.5, 0]
    assert found.unit[1:].tolist() == [0, 0, 0]
    assert not found.detectors[1:].any()
    assert found.best_iou[1:].tolist() == [0, 0, 0]
    assert one(x, labels, ("a",), quantile=0.6).state[1] == 0  # the lower value is the threshold then


def test_a_plateau_at_the_threshold_does_not_exceed_it_after_enlarging() -> None:
    """0.1 interpolated between cells of 0.1 may round upwards; what lies at the threshold must stay at it."""
    x = torch.full((6, 1, 5, 5), 0.1)
    x[0, 0, 0, 0] = 0.7
    labels = torch.zeros(6, 1, 17, 17, dtype=torch.int64)
    found = one(x, labels, ("a",), quantile=0.01)
    expected = reference.enlarge((x[0, 0] > 0.1).double().numpy(), 17, 17) > 0
    assert found.unit.tolist() == [expected.sum()]


@given(
    st.lists(st.sampled_from([-3.0, -0.5, 0.0, 0.25, 0.5, 8.0]) | st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60),
    st.floats(0.001, 0.999),
    st.integers(1, 7),
)
def test_exact_thresholds(values: list[float], quantile: float, chunk: int) -> None:
    tail = ExactTail(quantile, len(values))
    for part in torch.tensor(values)[None].split(chunk, 1):
        tail.add(part)
    assert float(tail.threshold()) == np.float32(reference.threshold(np.array(values, np.float32), quantile))


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=60),
    st.floats(0.001, 0.999),
    st.integers(4, 10),
)
def test_histogram_thresholds_are_off_by_no_more_than_they_say(values: list[float], quantile: float, bits: int) -> None:
    found = torch.tensor(values)[None]
    tail = HistogramTail(quantile, len(values), 1, 16 * 2 ** (9 + bits))
    for part in found.split(7, 1):
        tail.add(part)
    exact = reference.threshold(np.array(values, np.float32), quantile)
    threshold = float(tail.threshold())
    assert tail.relative_error == 2.0**-bits
    assert int((found > threshold).sum()) <= allowed_above(quantile, len(values))
    assert 0 <= threshold - exact <= tail.relative_error * abs(exact) + 1.2e-38


def test_histogram_is_right_on_constant_units() -> None:
    for value in (0.0, -0.0, 0.3, -0.3, 1e30):
        tail = HistogramTail(0.005, 50, 1, 2**20)
        tail.add(torch.full((1, 50), value))
        assert float(tail.threshold()) == pytest.approx(value, rel=2**-9)
        assert not (torch.tensor(value) > tail.threshold()).any()


def test_a_budget_too_small_for_the_tail_takes_a_histogram_and_says_so() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 2, 16, 16, generator=generator)
    labels = torch.zeros(300, 1, 16, 16, dtype=torch.int64)
    exact = one(x, labels, ("a",), quantile=0.4, batch=50)
    rough = one(x, labels, ("a",), quantile=0.4, batch=50, memory=2**20)
    assert (exact.relative_error, rough.relative_error) == (0, 2**-5)
    above = (rough.thresholds - exact.thresholds) / exact.thresholds.abs()
    assert ((above >= 0) & (above <= 2**-5)).all()
    assert (rough.unit <= 0.4 * x[:, 0].numel()).all()
    with pytest.raises(ValueError, match="memory: 2 units need a histogram of at least 262,144 bytes"):
        one(x, labels, ("a",), quantile=0.4, memory=2**18)


@pytest.mark.parametrize(("quantile", "count", "allowed"), [(0.29, 100, 29), (0.005, 200, 1), (0.005, 199, 0), (0.5, 5, 2)])
def test_allowed_above(quantile: float, count: int, allowed: int) -> None:
    assert allowed_above(quantile, count) == allowed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantile": 0.0}, "quantile: expected a number in"),
        ({"union": "local"}, "union: expected one of global, category, met, found 'local'"),
        ({"layers": ["nowhere"]}, "layers: the network has no layer 'nowhere'"),
        ({"layers": []}, "layers: expected at least one"),
        ({"labels": torch.full((12, 3, 8, 8), 9)}, "labels must lie in -1..8, found 9..9"),
        ({"labels": torch.zeros(12, 8, 8, dtype=torch.int64)}, r"expected integer labels \(B, maps, H, W\)"),
        ({"categories": ("a",)}, "9 concepts, 1 categories"),
        ({"images": torch.full((12, 5, 8, 8), torch.nan)}, "'units' holds activations that are not finite"),
    ],
)
def test_errors_say_what_is_wrong(change: dict, message: str) -> None:
    x, labels, _, groups = random_case()
    options = {"layers": ["units"]} | {k: v for k, v in change.items() if k in ("quantile", "union", "layers")}
    data = Annotated(x, labels, tuple("abcdefghi"), groups)
    data = replace(data, **{k: v for k, v in change.items() if k not in options})
    with pytest.raises(ValueError, match=message):
        dissect(Identity(), data, **options)


def test_data_that_lies_about_its_length() -> None:
    class Short(Annotated):
        def __len__(self) -> int:
            return 99

    x, labels, _, groups = random_case()
    with pytest.raises(ValueError, match="announced 99 images and yielded 12"):
        dissect(Identity(), Short(x, labels, tuple("abcdefghi"), groups), ["units"])


def test_data_that_ends() -> None:
    x, labels, _, _ = random_case()
    with pytest.raises(ValueError, match="must yield its batches twice, found an iterator"):
        dissect(Identity(), iter([(x, labels)]), ["units"])
