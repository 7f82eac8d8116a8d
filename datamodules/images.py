"""What every dataset shares: images in memory, stratified splits, loaders, and a fixed probe batch.

Images stay uint8 in memory and reach the net as float32 in [0, 1]. Normalisation lives inside the net, so that ε keeps
the image's own units; ``mean`` and ``std`` are what the net needs for it.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from glassarmor.datamodules.augment import Augmentation
from glassarmor.datamodules.fingerprint import SourceFile, source_print
from glassarmor.datamodules.loader import Replayed, TensorLoader, seeded

_SPLIT, _LIMIT, _PROBE = 11, 12, 13  # keep the uses of one seed apart


@dataclass(frozen=True, eq=False)
class Images:
    """Images (N, C, H, W) uint8 with C = 1 (grey) or 3 (RGB), and labels (N,) int64.

    Raises:
        ValueError: another type, shape or length, or no images at all.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape:
            raise ValueError(
                f"images must be uint8 (N, C, H, W) with C = 1 or 3 and N, H, W ≥ 1, got {self.images.dtype} {shape}"
            )
        if self.labels.dtype != torch.int64 or tuple(self.labels.shape) != shape[:1]:
            raise ValueError(
                f"labels must be int64 ({shape[0]},), one per image, got {self.labels.dtype} {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Images:
        """The samples ``rows`` (int64 indices), in that order."""
        return Images(self.images[rows], self.labels[rows])


@dataclass(frozen=True, eq=False)
class ProbeBatch:
    """The images a dashboard follows from epoch to epoch.

    x: (n, C, H, W) float32 in [0, 1]; y: (n,) int64; ids: places in the split ("val-17");
    hash: first 12 hex digits of the SHA-256 of pixels (uint8) and labels (int64).
    """

    x: Tensor
    y: Tensor
    ids: tuple[str, ...]
    hash: str


def class_ranks(labels: Tensor, generator: torch.Generator) -> Tensor:
    """(N,) int64: the place of each sample in a random order of its own class, from 0."""
    shuffled = torch.randperm(len(labels), generator=generator)
    grouped = shuffled[labels[shuffled].argsort(stable=True)]  # class after class, random within each
    counts = torch.bincount(labels)
    ranks = torch.empty_like(labels)
    ranks[grouped] = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return ranks


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split off ``fraction`` of every class, rounded, at least one sample and never all of a class.

    Args:
        labels: (N,) int64 ≥ 0.
        fraction: in (0, 1), the share of the second part.

    Returns:
        Two increasing int64 index tensors: the larger rest, and the part split off.

    Raises:
        ValueError: a class has a single sample.
    """
    counts = torch.bincount(labels)
    if (counts == 1).any():
        classes = (counts == 1).nonzero().flatten().tolist()
        raise ValueError(
            f"a stratified split needs at least 2 samples of every class, found 1 of class {classes[0]}"
            f" ({len(classes)} such classes): add images, raise data.train_limit, or drop the class"
        )
    quota = (counts * fraction).round().long().clamp(min=1).minimum((counts - 1).clamp(min=0))
    held = class_ranks(labels, seeded(_SPLIT, seed)) < quota[labels]
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def stratified_subset(labels: Tensor, limit: int, seed: int) -> Tensor:
    """``limit`` increasing indices with the classes' shares kept, each class present if ``limit`` allows it."""
    ranks = class_ranks(labels, seeded(_LIMIT, seed))
    turn = (ranks + 0.5) / torch.bincount(labels)[labels]  # spreads each class evenly over (0, 1)
    turn[ranks == 0] -= 1
    return turn.argsort(stable=True)[:limit].sort().values


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of (N, C, H, W) uint8, in [0, 1] units.

    Exact, from the histogram: a float copy of the images would take eight times their memory. A constant channel gets
    1/255, for the net divides by it.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(mean.item())
        stds.append(max((share * (values - mean) ** 2).sum().sqrt().item(), 1 / 255))
    return tuple(means), tuple(stds)


def require_whole(key: str, value: object, least: int) -> None:
    """Raises ValueError unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{key} must be a whole number ≥ {least}, got {value!r}")


def require_fraction(key: str, value: object) -> None:
    """Raises ValueError unless 0 < ``value`` < 1."""
    if not isinstance(value, float) or not 0 < value < 1:
        raise ValueError(f"{key} must lie in (0, 1), got {value!r}")


@dataclass(kw_only=True, eq=False, repr=False)
class ImageDataModule(pl.LightningDataModule, ABC):
    """Train, validation and test images; a dataset implements ``load``.

    The validation split comes from the training data; the test images are for ``test_dataloader`` alone.

    Args:
        batch_size: training samples per process and step.
        eval_batch_size: the same for validation and test.
        val_fraction: share of the training data held out for validation, in (0, 1), stratified.
        seed: of the validation split, the subsets, the order, the augmentation and the probe; ≥ 0.
        augment: for training batches only, e.g. ``Augment(pad=4, flip=True)``.
        train_limit, test_limit: use a stratified subset of so many samples; ``train_limit`` includes the validation.
        on_device: keep the images in the accelerator's memory during a run.
        replays: yield each training batch so many times in a row (:class:`.Replayed`).

    Raises:
        ValueError: an argument out of its range.
    """

    batch_size: int = 128
    eval_batch_size: int = 512
    val_fraction: float = 0.1
    seed: int = 0
    augment: Augmentation | None = None
    train_limit: int | None = None
    test_limit: int | None = None
    on_device: bool = False
    replays: int = 1

    train: Images = field(init=False)
    val: Images = field(init=False)
    test: Images = field(init=False)
    class_names: tuple[str, ...] = field(init=False)
    mean: tuple[float, ...] = field(init=False)
    std: tuple[float, ...] = field(init=False)
    sources: dict[str, Any] = field(init=False)  # prints of all that was read: glassarmor.datamodules.fingerprint

    def __post_init__(self) -> None:
        super().__init__()
        self.files: dict[str, list[SourceFile]] = {}  # by source, training and test; ``load`` fills it where there are any
        self.whole: Images | None = None  # what ``load`` read and then split by chance into training and test images
        self._position: dict[str, Any] | None = None  # of the next training loader
        require_whole("data.batch_size", self.batch_size, 1)
        require_whole("data.eval_batch_size", self.eval_batch_size, 1)
        require_whole("data.seed", self.seed, 0)
        require_whole("data.replays", self.replays, 1)
        if self.train_limit is not None:
            require_whole("data.train_limit", self.train_limit, 1)
        if self.test_limit is not None:
            require_whole("data.test_limit", self.test_limit, 1)
        require_fraction("data.val_fraction", self.val_fraction)

    @abstractmethod
    def load(self) -> tuple[Images, Images, tuple[str, ...]]:
        """All training images, all test images, and the class names in the order of the labels."""

    def setup(self, stage: str | None = None) -> None:
        """Load and split; a second call changes nothing.

        Raises:
            ValueError: the data can't be used as asked for; the message names the key to change.
            FileNotFoundError: there is no data.
        """
        if hasattr(self, "train"):
            return
        everything, test, names = self.load()
        if everything.images.shape[1:] != test.images.shape[1:]:
            raise ValueError(
                "training and test images must have one shape (C, H, W), got"
                f" {tuple(everything.images.shape[1:])} and {tuple(test.images.shape[1:])}"
            )
        for part, labels in (("training", everything.labels), ("test", test.labels)):
            lowest, highest = int(labels.min()), int(labels.max())
            if lowest < 0 or highest >= len(names):
                raise ValueError(
                    f"{part} labels must lie in 0..{len(names) - 1} ({len(names)} classes), found {lowest}..{highest}"
                )
        if len(names) < 2:
            raise ValueError(f"a classifier needs at least 2 classes, found {len(names)}: {names!r}")
        # Before any split: which images a split by chance draws changes with the labels.
        read = {"training": everything, "test": test} if self.whole is None else {"training": self.whole}
        self.sources = {name: source_print(images, len(names), self.files.get(name, ())) for name, images in read.items()}
        self.whole = None
        if self.train_limit is not None:
            everything = everything[stratified_subset(everything.labels, self.train_limit, self.seed)]
        if self.test_limit is not None:
            test = test[stratified_subset(test.labels, self.test_limit, self.seed)]
        train_rows, val_rows = stratified_split(everything.labels, self.val_fraction, self.seed)
        if self.batch_size > len(train_rows):
            raise ValueError(
                f"data.batch_size must be at most the {len(train_rows)} samples of the training split, got {self.batch_size}"
            )
        self.class_names = names
        self.mean, self.std = channel_statistics(everything.images[train_rows])
        self.val, self.test = everything[val_rows], test
        self.train = everything[train_rows]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def train_dataloader(self) -> TensorLoader | Replayed:
        loader: TensorLoader | Replayed = self._loader(self.train, self.batch_size, training=True)
        if self.replays > 1:
            assert isinstance(loader, TensorLoader)
            loader = Replayed(loader, self.replays)
        if self._position is not None:
            loader.load_state_dict(self._position)
            self._position = None
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Where the training loader is.

        Lightning keeps this of loaders, too, but gives it back too late where a schedule has asked for the number of steps.
        """
        loader = None if self.trainer is None else self.trainer.train_dataloader
        return {} if loader is None else loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next training loader goes on from there."""
        self._position = state_dict

    def val_dataloader(self) -> TensorLoader:
        return self._loader(self.val, self.eval_batch_size, training=False)

    def test_dataloader(self) -> TensorLoader:
        return self._loader(self.test, self.eval_batch_size, training=False)

    def whole_test(self) -> TensorLoader:
        """All test images in order, on each of several processes, which take turns themselves."""
        return TensorLoader(self.test.images, self.test.labels, self.eval_batch_size)

    def _loader(self, part: Images, batch_size: int, *, training: bool) -> TensorLoader:
        trainer = self.trainer
        target = part.images.device if trainer is None else trainer.strategy.root_device
        device = target if self.on_device else part.images.device
        return TensorLoader(
            part.images.to(device),
            part.labels.to(device),
            batch_size,
            shuffle=training,
            drop_last=training,
            augment=self.augment if training else None,
            seed=self.seed,
            current_epoch=None if trainer is None else lambda: trainer.current_epoch,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
            pinned=target.type == "cuda" and device.type == "cpu",
        )

    def probe(self, n: int, split: Literal["val", "test"] = "val", key: str = "probe.size") -> ProbeBatch:
        """``n`` images of a split, as many of each class as it has to give, the same in every run with this seed.

        Args:
            key: what an error calls ``n``.

        Raises:
            ValueError: another split, or ``n`` is not in 1..its length.
        """
        if split not in ("val", "test"):
            raise ValueError(f"split: expected val or test, found {split!r}")
        part = self.val if split == "val" else self.test
        if not isinstance(n, int) or not 1 <= n <= len(part):
            raise ValueError(f"{key}: expected 1 to {len(part)} images of the {split} split, found {n!r}")
        labels = part.labels
        generator = seeded(_PROBE, self.seed)
        ranks = class_ranks(labels, generator)
        # A random turn within each round over the classes: where n is no multiple of the classes, none is favoured.
        turn = torch.rand(len(labels), generator=generator, dtype=torch.float64) + ranks
        rows = turn.argsort(stable=True)[:n]
        rows = rows[(ranks[rows] * self.num_classes + labels[rows]).argsort()]  # each round in class order
        chosen = part[rows]
        digest = hashlib.sha256(chosen.images.numpy().tobytes() + chosen.labels.numpy().tobytes())
        ids = tuple(f"{split}-{row}" for row in rows.tolist())
        return ProbeBatch(chosen.images.float().div_(255), chosen.labels, ids, digest.hexdigest()[:12])

    def sample_training(self, n: int) -> tuple[Tensor, Tensor]:
        """``n`` training images as float32 in [0, 1], (n, C, H, W), and labels: classes in their shares, the same each time.

        All of them where there are fewer.
        """
        require_whole("probe.training", n, 1)
        rows = stratified_subset(self.train.labels, min(n, len(self.train)), self.seed)
        return self.train.images[rows].float().div_(255), self.train.labels[rows]
