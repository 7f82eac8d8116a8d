"""Data: splits, loaders, augmentation, every dataset, and what each says when something is wrong."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from torch import Tensor

from glassarmor.datamodules.arrays import Arrays
from glassarmor.datamodules.augment import Augment, crop_and_flip
from glassarmor.datamodules.cifar import CIFAR10, CIFAR100
from glassarmor.datamodules.digits import Digits
from glassarmor.datamodules.image_folder import ImageFolder
from glassarmor.datamodules.images import ImageDataModule, Images, channel_statistics, stratified_split, stratified_subset
from glassarmor.datamodules.loader import TensorLoader, seeded
from glassarmor.datamodules.svhn import SVHN
from tests.composing import config

ROOT = Path(__file__).parents[2]
SHARDS = Path(os.environ.get("GLASSARMOR_CIFAR10", ROOT / "../shared/data/cifar10"))
quick = settings(max_examples=40, deadline=None)
labels_of_a_few_classes = st.lists(st.integers(2, 30), min_size=2, max_size=6).flatmap(
    lambda counts: st.permutations([label for label, n in enumerate(counts) for _ in range(n)])
)


def numbered(n: int) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 2, 2) and labels that both say which sample it is."""
    return torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 2, 2).contiguous(), torch.arange(n)


@dataclass(kw_only=True, eq=False, repr=False)
class Toy(ImageDataModule):
    """Sixty random 4×4 images of three classes, thirty for the test."""

    batch_size: int = 8
    shift: int = 0  # of the labels, to put them out of range

    def load(self) -> tuple[Images, Images, tuple[str, ...]]:
        pixels = torch.randint(0, 256, (90, 3, 4, 4), generator=seeded(0), dtype=torch.uint8)
        labels = torch.arange(90) % 3 + self.shift
        return Images(pixels[:60], labels[:60]), Images(pixels[60:], labels[60:]), ("a", "b", "c")


def ready(data: ImageDataModule) -> Any:
    data.setup()
    return data


# --- splits -----------------------------------------------------------------------------------------------------------


@quick
@given(labels_of_a_few_classes, st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_split_partitions_and_keeps_shares(labels: list[int], fraction: float, seed: int) -> None:
    y = torch.tensor(labels)
    kept, held = stratified_split(y, fraction, seed)
    assert sorted(kept.tolist() + held.tolist()) == list(range(len(y)))
    for label in set(labels):
        n, taken = labels.count(label), int((y[held] == label).sum())
        assert 1 <= taken <= n - 1
        assert abs(taken - min(max(n * fraction, 1), n - 1)) <= 0.5 + 1e-5
    again = stratified_split(y, fraction, seed)
    assert torch.equal(kept, again[0])
    assert torch.equal(held, again[1])


@quick
@given(labels_of_a_few_classes, st.data())
def test_subset_keeps_shares(labels: list[int], data: st.DataObject) -> None:
    y = torch.tensor(labels)
    limit = data.draw(st.integers(1, len(labels)))
    rows = stratified_subset(y, limit, seed=3)
    assert len(set(rows.tolist())) == limit
    assert rows.tolist() == sorted(rows.tolist())
    taken = torch.bincount(y[rows], minlength=int(y.max()) + 1)
    if limit >= len(taken):
        assert (taken >= 1).all()
    assert ((taken - limit * torch.bincount(y) / len(y)).abs() <= len(taken) / 2 + 1).all()


def test_splits_draw_nothing_from_the_global_generators() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    stratified_split(torch.arange(50) % 5, 0.3, 1)
    ready(Toy(augment=Augment(1, True))).probe(4)
    assert torch.equal(torch.get_rng_state(), before)


def test_different_seeds_give_different_splits() -> None:
    labels = torch.arange(100) % 5
    assert not torch.equal(stratified_split(labels, 0.3, 1)[1], stratified_split(labels, 0.3, 2)[1])


def test_single_sample_of_a_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 2 samples of every class, found 1 of class 2"):
        stratified_split(torch.tensor([0, 0, 1, 1, 2]), 0.5, 0)


# --- augmentation -----------------------------------------------------------------------------------------------------


def slow_crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, pad: int) -> Tensor:
    out = np.zeros(tuple(images.shape), dtype=images.numpy().dtype)
    n, channels, height, width = images.shape
    for i in range(n):
        for c in range(channels):
            for row in range(height):
                for column in range(width):
                    y = row + int(top[i]) - pad
                    x = (width - 1 - column if flip[i] else column) + int(left[i]) - pad
                    if 0 <= y < height and 0 <= x < width:
                        out[i, c, row, column] = images[i, c, y, x]
    return torch.from_numpy(out)


@quick
@given(
    st.integers(1, 4),
    st.sampled_from([1, 3]),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_augmentation_equals_a_slow_loop(n: int, c: int, h: int, w: int, pad: int, as_float: bool, seed: int) -> None:
    draw = seeded(seed)
    images = torch.randint(1, 256, (n, c, h, w), generator=draw, dtype=torch.uint8)
    if as_float:
        images = images.float() / 255
    top, left = torch.randint(0, 2 * pad + 1, (2, n), generator=draw)
    flip = torch.rand(n, generator=draw) < 0.5
    expected = slow_crop_and_flip(images, top, left, flip, pad)
    got = crop_and_flip(images, top, left, flip, pad)
    assert got.dtype == images.dtype
    assert torch.equal(got, expected)


def test_augment_reaches_every_offset_and_both_sides_and_no_more() -> None:
    images = torch.zeros(2000, 1, 5, 5, dtype=torch.uint8)
    images[:, 0, 2, 1] = 1  # left of the middle, so that a mirror image shows
    shifted = Augment(pad=2)(images, seeded(1)).flatten(1)
    places = {(int(i) // 5, int(i) % 5) for i in shifted.argmax(1)[shifted.amax(1) > 0]}
    assert places == {(row, column) for row in range(5) for column in range(4)}  # column −1 falls off
    mirrored = Augment(flip=True)(images, seeded(1))
    share = (mirrored[:, 0, 2, 3] == 1).float().mean()
    assert 0.45 < share < 0.55
    assert torch.equal(mirrored[:, 0, 2, 1] + mirrored[:, 0, 2, 3], torch.ones(2000, dtype=torch.uint8))
    assert torch.equal(Augment()(images, seeded(1)), images)


# --- loader -----------------------------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 60), st.integers(1, 16), st.booleans(), st.integers(0, 5))
def test_each_sample_once_an_epoch(n: int, batch_size: int, shuffle: bool, epoch: int) -> None:
    loader = TensorLoader(*numbered(n), batch_size, shuffle=shuffle)
    loader.set_epoch(epoch)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert all(len(y) == batch_size for _, y in batches[:-1])
    seen = torch.cat([y for _, y in batches])
    assert sorted(seen.tolist()) == list(range(n))
    x = torch.cat([x for x, _ in batches])
    assert x.dtype == torch.float32
    assert torch.equal(x, (seen.float() / 255).view(n, 1, 1, 1).expand(n, 1, 2, 2))
    if not shuffle:
        assert seen.tolist() == list(range(n))


@quick
@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 4), st.booleans())
def test_ranks_partition(n: int, batch_size: int, world_size: int, drop_last: bool) -> None:
    if drop_last and n < batch_size * world_size:
        return
    ranks = [
        TensorLoader(*numbered(n), batch_size, shuffle=True, drop_last=drop_last, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    per_rank = [[y.tolist() for _, y in loader] for loader in ranks]
    assert len({len(batches) for batches in per_rank}) == 1
    seen = [sample for batches in per_rank for batch in batches for sample in batch]
    if drop_last:
        assert len(seen) == len(set(seen)) == len(ranks[0]) * batch_size * world_size
        assert all(len(batch) == batch_size for batches in per_rank for batch in batches)
    else:
        assert set(seen) == set(range(n))
        assert len(seen) - n < world_size  # repeated only where ranks would stand empty
        left = n % (batch_size * world_size)
        if left == 0 or left >= world_size:
            assert len(seen) == n


def same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def augmented_loader(**changes: Any) -> TensorLoader:
    images = torch.randint(0, 256, (50, 3, 6, 6), generator=seeded(9), dtype=torch.uint8)
    arguments: dict[str, Any] = {"shuffle": True, "drop_last": True, "augment": Augment(2, True), "seed": 4}
    return TensorLoader(images, torch.arange(50), 8, **(arguments | changes))


def test_batches_depend_on_seed_epoch_and_rank_alone() -> None:
    loader = augmented_loader()
    first, second = list(loader), list(loader)  # counts its own passes
    assert not same(first, second)
    torch.manual_seed(77)
    other = augmented_loader()
    other.set_epoch(1)
    assert same(list(other), second)
    assert not same(list(augmented_loader(seed=5)), first)
    plain = list(augmented_loader(augment=None))
    assert all(torch.equal(y, z) for (_, y), (_, z) in zip(plain, first, strict=True))  # augmentation leaves the order


@quick
@given(st.integers(0, 3), st.integers(0, 5))
def test_resume_yields_exactly_the_rest(epoch: int, position: int) -> None:
    reference = augmented_loader()
    reference.set_epoch(epoch)
    whole, following = list(reference), list(reference)

    interrupted = augmented_loader()
    interrupted.set_epoch(epoch)
    batches = iter(interrupted)
    for _ in range(position):
        next(batches)
    resumed = augmented_loader()
    iter(resumed)  # Lightning does so before it loads the state, and after
    resumed.load_state_dict(pickle.loads(pickle.dumps(interrupted.state_dict())))
    iter(resumed)
    assert len(resumed) == 6
    assert same(list(resumed), whole[position:])
    assert same(list(resumed), following)


def test_an_abandoned_pass_starts_again() -> None:
    loader = TensorLoader(*numbered(10), 4)
    next(iter(loader))  # such as Lightning's sanity check of two validation batches
    assert torch.cat([y for _, y in loader]).tolist() == list(range(10))


def test_resume_with_other_batches_is_refused() -> None:
    loader = augmented_loader()
    next(iter(loader))
    with pytest.raises(ValueError, match=r"data\.batch_size"):
        augmented_loader(world_size=2).load_state_dict(loader.state_dict())


def test_no_full_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size × processes .* 10 training samples, got 6 × 2"):
        TensorLoader(*numbered(10), 6, drop_last=True, world_size=2)


class Probe(pl.LightningModule):
    """Records what it is given, and saves one checkpoint at a chosen moment."""

    def __init__(self, save: tuple[str, int, Path] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(48, 3)
        self.save = save
        self.trained: list[tuple[int, int, Tensor, Tensor]] = []
        self.validated: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.trained.append((self.current_epoch, batch_idx, *batch))
        return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append(batch[0])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validated.append(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def _maybe_save(self, hook: str) -> None:
        if self.save and self.save[:2] == (hook, self.global_step) and not self.trainer.sanity_checking:
            self.trainer.save_checkpoint(self.save[2])

    def on_train_batch_end(self, *_: Any) -> None:
        self._maybe_save("batch")

    def on_validation_end(self) -> None:
        self._maybe_save("validation")

    def on_train_epoch_end(self) -> None:
        self._maybe_save("epoch")


def fit(module: Probe, limits: dict[str, int], resume: Path | None = None) -> tuple[pl.Trainer, Probe]:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    trainer = pl.Trainer(accelerator="cpu", **quiet, **limits)
    data = Toy(batch_size=16, eval_batch_size=2, val_fraction=0.2, augment=Augment(1, True))  # 48: 3 batches
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=False)
    return trainer, module


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 9}], ids=["epochs", "steps"])
def test_lightning_resumes_exactly(limits: dict[str, int], tmp_path: Path) -> None:
    trainer, whole = fit(Probe(), limits)
    assert [entry[:2] for entry in whole.trained] == [(epoch, i) for epoch in range(3) for i in range(3)]
    for epoch in range(3):  # what Lightning delivers is what the loader promises for that epoch
        loader = ready(Toy(batch_size=16, val_fraction=0.2, augment=Augment(1, True))).train_dataloader()
        loader.set_epoch(epoch)
        assert same([entry[2:] for entry in whole.trained[3 * epoch : 3 * epoch + 3]], list(loader))
    # The sanity check's two batches are not missing from the first validation.
    assert sum(len(x) for x in whole.validated) == 3 * 12
    whole.validated.clear()
    trainer.test(whole, datamodule=Toy(eval_batch_size=7), verbose=False)
    assert torch.equal(torch.cat(whole.validated), ready(Toy()).test.images.float() / 255)

    for hook, step in [("batch", 1), ("batch", 3), ("batch", 5), ("validation", 3), ("epoch", 3), ("epoch", 6)]:
        path = tmp_path / f"{hook}-{step}.ckpt"
        fit(Probe((hook, step, path)), limits)
        _, resumed = fit(Probe(), limits, resume=path)
        assert [entry[:2] for entry in resumed.trained] == [entry[:2] for entry in whole.trained[step:]], (hook, step)
        assert same([e[2:] for e in resumed.trained], [e[2:] for e in whole.trained[step:]]), (hook, step)
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


# --- the base class ---------------------------------------------------------------------------------------------------


def test_parts_are_disjoint_and_setup_is_idempotent() -> None:
    data = ready(Digits(val_fraction=0.2, seed=1))
    train = data.train
    data.setup("fit")
    assert data.train is train
    assert (len(data.train), len(data.val), len(data.test)) == (1151, 287, 359)
    assert (data.num_classes, data.image_shape, data.class_names) == (10, (1, 32, 32), tuple("0123456789"))
    everything = torch.cat([data.train.images, data.val.images, data.test.images]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797  # all digits differ, so no image is in two parts
    other = ready(Digits(val_fraction=0.2, seed=2))
    assert torch.equal(other.test.images, data.test.images)
    assert not torch.equal(other.val.images, data.val.images)


def test_digits_keep_their_grey_levels() -> None:
    data = ready(Digits())
    assert (data.train.images.amin().item(), data.train.images.amax().item()) == (0, 255)
    share = torch.bincount(data.test.labels) / len(data.test)
    assert ((share - 0.1).abs() < 0.005).all()


def test_statistics_are_those_of_the_training_split() -> None:
    data = ready(Toy())
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-12)
    assert channel_statistics(torch.full((2, 1, 3, 3), 51, dtype=torch.uint8)) == ((pytest.approx(0.2),), (1 / 255,))


def test_limits_take_stratified_subsets() -> None:
    data = ready(Toy(train_limit=30, test_limit=12, val_fraction=0.2))
    assert (len(data.train), len(data.val), len(data.test)) == (24, 6, 12)
    assert torch.bincount(data.test.labels).tolist() == [4, 4, 4]


@pytest.mark.parametrize("n", [1, 7, 10, 25, 216])
def test_probe_is_balanced_and_fixed(n: int) -> None:
    data = ready(Digits())
    probe = data.probe(n)
    assert probe.x.shape == (n, 1, 32, 32)
    assert probe.x.dtype == torch.float32
    rows = torch.tensor([int(name.removeprefix("val-")) for name in probe.ids])
    assert len(set(probe.ids)) == n
    assert torch.equal(probe.x, data.val.images[rows].float() / 255)
    assert torch.equal(probe.y, data.val.labels[rows])
    counts = torch.bincount(probe.y, minlength=10)
    assert counts.max() - counts.min() <= 1 or n == 216  # all of them: as many as each class has
    again = ready(Digits(batch_size=3, eval_batch_size=5)).probe(n)
    assert (again.hash, again.ids) == (probe.hash, probe.ids)
    assert len(probe.hash) == 12
    assert int(probe.hash, 16) >= 0
    assert ready(Digits(seed=1)).probe(n).hash != probe.hash


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Toy(val_fraction=1.0), r"data\.val_fraction must lie in \(0, 1\), got 1\.0"),
        (lambda: Toy(val_fraction=0.0), r"data\.val_fraction"),
        (lambda: Toy(batch_size=0), r"data\.batch_size must be a whole number ≥ 1, got 0"),
        (lambda: Toy(eval_batch_size=2.5), r"data\.eval_batch_size"),  # type: ignore[arg-type]
        (lambda: Toy(seed=-1), r"data\.seed"),
        (lambda: Toy(train_limit=0), r"data\.train_limit"),
        (lambda: Toy(batch_size=64), r"data\.batch_size must be at most the 54 samples .* got 64"),
        (lambda: Toy(train_limit=3), r"at least 2 samples of every class.*data\.train_limit"),
        (lambda: Toy(shift=1), r"training labels must lie in 0\.\.2 \(3 classes\), found 1\.\.3"),
        (lambda: Toy(shift=-1), r"found -1\.\.1"),
        (lambda: Augment(pad=-1), r"data\.augment\.pad"),
        (lambda: ImageFolder(path="x", size=0), r"data\.size"),
        (lambda: ImageFolder(path="x", test_fraction=2.0), r"data\.test_fraction"),
    ],
)
def test_bad_settings_name_their_key(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().setup()


@pytest.mark.parametrize("n", [0, 7])
def test_probe_size_is_checked(n: int) -> None:
    with pytest.raises(ValueError, match=r"probe.size: expected 1 to 6 images .* found"):
        ready(Toy()).probe(n)


# --- arrays -----------------------------------------------------------------------------------------------------------


def write(file: Path, n: int = 20, **changes: Any) -> Path:
    rng = np.random.default_rng(n)
    arrays: dict[str, Any] = {
        "images": rng.integers(0, 256, (n, 5, 6, 3), dtype=np.uint8),
        "labels": (np.arange(n) % 2).astype(np.uint8),
        "class_names": np.array(["cat", "<b>dog</b>"]),
    }
    arrays |= changes
    np.savez(file, **{key: value for key, value in arrays.items() if value is not None})
    return file


def test_arrays_join_shards(tmp_path: Path) -> None:
    for i, n in enumerate((20, 30)):
        write(tmp_path / f"train-{i}.npz", n)
    write(tmp_path / "test.npz", 10)
    data = ready(Arrays(path=str(tmp_path), batch_size=4, val_fraction=0.2))
    assert (len(data.train), len(data.val), len(data.test)) == (40, 10, 10)
    assert data.image_shape == (3, 5, 6)
    assert data.class_names == ("cat", "<b>dog</b>")
    with np.load(tmp_path / "test.npz") as test:
        assert np.array_equal(data.test.images.numpy(), test["images"].transpose(0, 3, 1, 2))
    by_pattern = Arrays(path=f"{tmp_path}/train-*.npz", test_path=f"{tmp_path}/test.npz", batch_size=4, val_fraction=0.2)
    assert torch.equal(ready(by_pattern).train.images, data.train.images)
    assert ready(Arrays(path=str(tmp_path), names=["x", "y"], batch_size=4)).class_names == ("x", "y")


def test_arrays_grey_and_unnamed(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write(tmp_path / f"{name}.npz", images=np.zeros((20, 4, 4), np.uint8), class_names=None)
    data = ready(Arrays(path=str(tmp_path), batch_size=4))
    assert (data.image_shape, data.class_names) == ((1, 4, 4), ("0", "1"))


zeros = np.zeros((20, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, r"must have the keys images and labels, found \['images', 'class_names'\]"),
        ({"images": zeros.astype(np.float32)}, "images must be uint8 in 0..255, got float32"),
        ({"images": np.zeros((20, 4, 4, 4), np.uint8)}, r"C = 1 or 3, nothing empty, got \(20, 4, 4, 4\)"),
        ({"images": zeros[:0], "labels": np.zeros(0, int)}, "nothing empty"),
        ({"images": np.zeros(20, np.uint8)}, r"images must be \(N, H, W\)"),
        ({"images": zeros[:19]}, "found 19 images and 20 labels"),
        ({"labels": np.full(20, 2)}, r"labels must lie in 0\.\.1, found 2\.\.2"),
        ({"labels": np.full(20, -1)}, r"found -1\.\.-1"),
        ({"labels": np.full(20, 2**63, np.uint64), "class_names": None}, "labels must lie in"),
        ({"labels": np.full(20, 0.5)}, "labels must be whole numbers .* got float64"),
        ({"labels": np.zeros((20, 1), int)}, r"labels must be whole numbers of shape \(N,\)"),
        ({"labels": np.arange(20) % 2 * 5, "class_names": None}, r"without gaps .*data\.names"),
        ({"class_names": np.array(["cat", object()], dtype=object)}, "no readable .npz of plain arrays"),
        ({"class_names": np.array([1, 2])}, "class_names must be strings"),
        ({"images": np.zeros((20, 7, 7, 3), np.uint8)}, r"one \(H, W, C\), got \(7, 7, 3\) .*train-0.* and \(5, 6, 3\)"),
        ({"class_names": np.array(["dog", "cat"])}, "class_names must be the same"),
    ],
)
def test_bad_arrays_say_what_and_where(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path / "train-0.npz", **changes)
    named = changes.get("class_names", "") is not None
    write(tmp_path / "train-1.npz", **({} if named else {"class_names": None}))
    write(tmp_path / "test.npz", **({} if named else {"class_names": None}))
    with pytest.raises(ValueError, match=message) as caught:
        Arrays(path=str(tmp_path), batch_size=4).setup()
    assert "data.path" in str(caught.value) or "data.names" in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"",
        lambda raw: b"not a zip",
        lambda raw: raw[:200] + bytes(200) + raw[400:],
        lambda raw: pickle.dumps({"images": 1}),
    ],
)
def test_corrupt_npz_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    good = write(tmp_path / "test.npz")
    (tmp_path / "train.npz").write_bytes(damage(good.read_bytes()))
    with pytest.raises(ValueError, match=r"data\.path: .*train\.npz.* no readable \.npz"):
        Arrays(path=str(tmp_path)).setup()


def test_missing_arrays(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.path='/nowhere' matches nothing"):
        Arrays(path="/nowhere", test_path="/nowhere").setup()
    with pytest.raises(FileNotFoundError, match=r"expected train\*\.npz in that folder"):
        Arrays(path=str(tmp_path)).setup()
    train = str(write(tmp_path / "train.npz"))
    with pytest.raises(FileNotFoundError, match=r"expected test\*\.npz in that folder"):
        Arrays(path=str(tmp_path)).setup()
    with pytest.raises(ValueError, match=r"data\.test_path must name the test \.npz"):
        Arrays(path=train).setup()
    with pytest.raises(ValueError, match="must not share files"):
        Arrays(path=f"{tmp_path}/*.npz", test_path=train).setup()


@pytest.mark.skipif(not (SHARDS / "test.npz").is_file(), reason="CIFAR-10 shards absent; set GLASSARMOR_CIFAR10")
def test_real_cifar10_arrays() -> None:
    data = ready(Arrays(path=str(SHARDS), augment=Augment(4, True)))
    assert (len(data.train), len(data.val), len(data.test)) == (45_000, 5_000, 10_000)
    assert data.class_names[0] == "airplane"
    assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=1e-3)
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, y.shape) == ((128, 3, 32, 32), (128,))
    assert x.min() >= 0
    assert x.max() <= 1


# --- image folder -----------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script>".replace("/", "∕") + " ünï; rm -rf *"


def draw(folder: Path, classes: tuple[str, ...], n: int, size: tuple[int, int] = (12, 8)) -> None:
    for value, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", size, (100 * value, i, 0)).save(folder / name / f"{i}.png")


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_image_folder_with_parts(tmp_path: Path, held_out: str) -> None:
    draw(tmp_path / "train", (HOSTILE, "b"), 10)
    draw(tmp_path / held_out, (HOSTILE,), 3)  # a test set may lack a class
    data = ready(ImageFolder(path=str(tmp_path), size=6, batch_size=4))
    assert data.class_names == (HOSTILE, "b")
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 3)
    assert data.image_shape == (3, 6, 6)
    assert (data.train.images[:, 0, 0, 0] == 100 * data.train.labels).all()


def test_image_folder_of_classes(tmp_path: Path) -> None:
    draw(tmp_path, ("car", "train"), 10)  # a class may be called train
    data = ready(ImageFolder(path=str(tmp_path), size=6, grey=True, batch_size=4))
    assert (data.class_names, data.image_shape, len(data.test)) == (("car", "train"), (1, 6, 6), 4)
    other = ready(ImageFolder(path=str(tmp_path), size=6, grey=True, batch_size=4, seed=9))
    assert torch.equal(other.test.images, data.test.images)


def test_image_folder_crops_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 255
    draw(tmp_path, ("a", "b"), 4)
    for i in range(4):
        Image.fromarray(wide).save(tmp_path / "a" / f"{i}.png")
    data = ready(ImageFolder(path=str(tmp_path), size=4, batch_size=2))
    assert (data.train.images[data.train.labels == 0] == 255).all()


def test_unreadable_images_are_all_named(tmp_path: Path) -> None:
    draw(tmp_path, ("a", "b"), 4)
    (tmp_path / "a" / "0.png").write_bytes(b"no image")
    raw = (tmp_path / "b" / "1.png").read_bytes()
    (tmp_path / "b" / "1.png").write_bytes(raw[: len(raw) // 2])
    Image.fromarray(np.full((4, 4), 3000, np.uint16)).save(tmp_path / "b" / "2.png")
    with pytest.raises(ValueError, match=r"data\.path: repair or remove 3 unreadable files") as caught:
        ImageFolder(path=str(tmp_path)).setup()
    assert all(name in str(caught.value) for name in ("a/0.png", "b/1.png", "b/2.png", "more than 8 bits"))


def test_bad_folders_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.path='/nowhere' is no folder"):
        ImageFolder(path="/nowhere").setup()
    with pytest.raises(FileNotFoundError, match="must have a folder per class, found none"):
        ImageFolder(path=str(tmp_path)).setup()
    draw(tmp_path / "train", ("a", "b"), 3)
    with pytest.raises(FileNotFoundError, match="neither test/ nor val/"):
        ImageFolder(path=str(tmp_path)).setup()
    draw(tmp_path / "test", ("a", "c"), 3)
    with pytest.raises(ValueError, match=r"classes that train/ lacks: \['c'\]"):
        ImageFolder(path=str(tmp_path)).setup()
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(FileNotFoundError, match=r"images of every class, found none of \['c'\]"):
        ImageFolder(path=str(tmp_path)).setup()


# --- torchvision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [CIFAR10, CIFAR100, SVHN])
def test_missing_downloads_say_how_to_get_them(source: type[CIFAR10 | CIFAR100 | SVHN], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{source.__name__} .*data\.root.*data\.download=true"):
        source(root=str(tmp_path)).setup()


def test_cifar10_reads_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = {name: rng.integers(0, 256, (10, 3072), dtype=np.uint8) for name in ("test_batch", "data_batch_1")}
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        content = {"data": pixels.get(name, pixels["data_batch_1"]), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = ready(CIFAR10(root=str(tmp_path), batch_size=4))
    assert (len(data.train), len(data.val), len(data.test)) == (40, 10, 10)
    assert np.array_equal(data.test.images.numpy().reshape(10, -1), pixels["test_batch"])
    assert data.class_names[3] == "class 3"


def test_svhn_reads_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 40), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(tmp_path / f"{split}_32x32.mat", {"X": images, "y": (np.arange(40) % 10 + 1).reshape(-1, 1)})
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    data = ready(SVHN(root=str(tmp_path), batch_size=4))
    assert np.array_equal(data.test.images.numpy(), images.transpose(3, 2, 0, 1))
    assert data.test.labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted((ROOT / "configs/data").glob("[!_]*.yaml")), ids=lambda file: file.stem)
def test_configs_instantiate(file: Path) -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    assert file.read_text().startswith("# @package _global_\n# ")
    composed = config(f"data={file.stem}", "seed=3")
    assert {"linf", "l2"} <= set(composed.budget)
    if OmegaConf.is_missing(composed.data, "path"):
        composed.data.path = "somewhere"
    data = instantiate(composed.data)
    assert isinstance(data, ImageDataModule)
    assert data.seed == 3
    assert data.augment is None or isinstance(data.augment, Augment)


def test_an_archive_that_unpacks_to_more_than_memory_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "train.npz", images=np.zeros((4096, 64, 64), np.uint8), labels=np.zeros(4096, np.int64))
    shutil.copy(tmp_path / "train.npz", tmp_path / "test.npz")
    assert (tmp_path / "train.npz").stat().st_size < 100_000, "a small file"
    monkeypatch.setattr("glassarmor.datamodules.arrays._memory", lambda: 16 << 20)
    with pytest.raises(ValueError, match=r"data\.path: .*train\.npz.* unpacks to 16 MiB, more than half .* here, 8 MiB"):
        Arrays(path=str(tmp_path)).setup("fit")


def test_a_header_that_asks_for_more_than_there_is_is_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 64, 64, 3)})
    with zipfile.ZipFile(tmp_path / "train.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + b"abc")
    shutil.copy(tmp_path / "train.npz", tmp_path / "test.npz")
    with pytest.raises(ValueError, match=r"images\.npy says that it holds \(1000000000, 64, 64, 3\) uint8, and is smaller"):
        Arrays(path=str(tmp_path)).setup("fit")
