"""Batches from uint8 tensors in memory; what a batch holds is a pure function of (seed, epoch, batch, rank)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glassarmor.datamodules.augment import Augmentation, send


def seeded(*entropy: int) -> torch.Generator:
    """A generator for one purpose: nearby entropies, such as batch 3 and batch 4, give unrelated streams."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


_ORDER, _AUGMENT = 1, 2  # keep the two uses of one seed apart


class TensorLoader:
    """Yields ``(x float32 (B, C, H, W) in [0, 1], y int64 (B,))``; stateful, and sharded by itself.

    Lightning 2.6 shards only a ``DataLoader``; hence the sharding here. It saves ``state_dict()`` of the training loader
    with every checkpoint, and hands it back only when the checkpoint lies inside an epoch. It tells the epoch only to
    ``loader.sampler``, and one too high after some resumes (``max_steps``, checkpoint from ``on_train_epoch_end``);
    hence ``current_epoch``.

    Args:
        images: (N, C, H, W) uint8, on any device; gathered and augmented there.
        labels: (N,) int64, on the same device.
        batch_size: samples per rank and batch.
        shuffle: a new order each epoch, from (seed, epoch); the same on every device and rank.
        drop_last: drop the incomplete last batch, so that every rank has the same number of full batches. Otherwise its
            samples are dealt out evenly; only where they are fewer than the ranks does a rank repeat one, since ranks
            with different numbers of batches would wait for each other forever.
        current_epoch: asked at the beginning of each pass, e.g. ``lambda: trainer.current_epoch``; without it the loader
            counts its whole passes.
        augment: applied to the uint8 batch, with a CPU generator from (seed, epoch, batch, rank).
        pinned: yield batches in pinned memory, from which a GPU takes them without waiting; for images on the CPU.

    Raises:
        ValueError: with ``drop_last``, no full batch fits.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        augment: Augmentation | None = None,
        seed: int = 0,
        current_epoch: Callable[[], int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        pinned: bool = False,
    ) -> None:
        self.images, self.labels = images, labels
        self.batch_size, self.shuffle, self.drop_last = batch_size, shuffle, drop_last
        self.augment, self.seed, self.current_epoch = augment, seed, current_epoch
        self.rank, self.world_size, self.pinned = rank, world_size, pinned
        self._epoch = 0
        self._position = 0  # of the batch that comes next
        self._resumed = False
        if drop_last and len(self) == 0:
            raise ValueError(
                f"data.batch_size × processes must be at most the {len(images)} training samples,"
                f" got {batch_size} × {world_size}"
            )

    def __len__(self) -> int:
        """Batches of a whole epoch, also when iteration resumes inside one."""
        together = self.batch_size * self.world_size
        return len(self.images) // together if self.drop_last else -(-len(self.images) // together)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator: nothing here runs before the first `next`. Lightning calls iter() early, and more than once,
        # before the epoch is known and the state loaded.
        if self.current_epoch is not None:
            self.set_epoch(self.current_epoch())
        epoch, start = self._epoch, self._position if self._resumed else 0
        self._resumed = False  # later passes begin at the beginning, also after one that was abandoned half-way
        order = self._order(epoch)
        for index in range(start, len(self)):
            batch = self._batch(order, epoch, index)
            # Before the yield: a checkpoint written while this batch is trained on must not repeat it.
            whole = index + 1 == len(self)
            self._epoch, self._position = (epoch + 1, 0) if whole else (epoch, index + 1)
            yield batch

    def _order(self, epoch: int) -> Tensor:
        n = len(self.images)
        order = torch.randperm(n, generator=seeded(_ORDER, self.seed, epoch)) if self.shuffle else torch.arange(n)
        return send(order, self.images.device)

    def _batch(self, order: Tensor, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        together = self.batch_size * self.world_size
        joint = order[index * together : (index + 1) * together]
        mine = joint.tensor_split(self.world_size)[self.rank]
        rows = mine if len(mine) else joint[:1]
        images = self.images[rows]
        if self.augment is not None:
            images = self.augment(images, seeded(_AUGMENT, self.seed, epoch, index, self.rank))
        x, y = images.float().div_(255), self.labels[rows]
        return (x.pin_memory(), y.pin_memory()) if self.pinned else (x, y)

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next pass. A resumed position is kept if it lies in this epoch."""
        if epoch != self._epoch:
            self._epoch, self._position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position of the batch that comes next; after an epoch's last batch, the beginning of the next."""
        return {"epoch": self._epoch, "position": self._position, "batches": len(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next pass yields exactly the batches that were left.

        Raises:
            ValueError: inside an epoch, when the number of batches has changed since.
        """
        if state_dict["position"] and state_dict["batches"] != len(self):
            raise ValueError(
                f"can't resume inside an epoch of {state_dict['batches']} batches with one of {len(self)}:"
                " data.batch_size, data.train_limit, data.val_fraction and the number of processes must be those of"
                " the checkpoint"
            )
        self._epoch, self._position, self._resumed = state_dict["epoch"], state_dict["position"], True


class Replayed:
    """Each batch of a loader several times in a row, as free adversarial training asks for; an epoch is so much longer.

    Saves, and resumes at, the replay that comes next.
    """

    def __init__(self, loader: TensorLoader, times: int) -> None:
        self.loader, self.times = loader, times
        self._next: dict[str, Any] | None = None
        self._done = 0  # replays of the next batch that lie before a checkpoint

    def __len__(self) -> int:
        return self.times * len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        done, self._done = self._done, 0
        batches = iter(self.loader)
        while True:
            before = self.loader.state_dict()
            batch = next(batches, None)
            if batch is None:
                return
            for replay in range(done + 1, self.times + 1):
                # Before the yield, as in the loader itself.
                self._next = {**before, "replayed": replay} if replay < self.times else self._whole()
                yield batch
            done = 0

    def _whole(self) -> dict[str, Any]:
        return {**self.loader.state_dict(), "replayed": 0}

    def state_dict(self) -> dict[str, Any]:
        """The loader's state before the next batch, and how many of its replays are done."""
        return self._next or self._whole()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loader.load_state_dict(state_dict)
        self._done, self._next = state_dict["replayed"], dict(state_dict)
