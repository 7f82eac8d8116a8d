"""Batches for a GPU, where there may be none: what is computed there, what is sent, and that nobody waits.

FakeTensorMode stands in: its "cuda" tensors have shapes and devices but no values, and whatever would read one raises.  It
cannot show that a copy is waited for; it shows from where and how each is made.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from glassarmor.datamodules import augment, loader
from glassarmor.datamodules.augment import Augment
from glassarmor.datamodules.images import Images
from glassarmor.datamodules.loader import TensorLoader
from tests.datamodules.test_datamodules import Probe, Toy, same

CUDA = torch.device("cuda", 0)


class Traffic(TorchDispatchMode):
    """The tensors that go to the GPU, each with whether nobody waits for it; an operation on both devices is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[Tensor, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        flat = [part for arg in args for part in (arg if isinstance(arg, (list, tuple)) else [arg])]
        places = {part.device.type for part in flat if isinstance(part, Tensor) and part.dim() > 0}
        assert len(places) < 2, f"{func} waits for the one device or the other"
        if func is torch.ops.aten._to_copy.default and kwargs.get("device", args[0].device) != args[0].device:
            assert out.device.type == "cuda", "nothing comes back"
            self.sent.append((args[0], kwargs.get("non_blocking", False)))
        return out


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The tensors that were pinned, by id: without a GPU none can be."""
    found: list[Tensor] = []  # alive, so that no id comes back

    def pin(tensor: Tensor) -> Tensor:
        assert tensor.device.type == "cpu"
        found.append(tensor)
        ids.add(id(tensor))
        return tensor

    ids: set[int] = set()
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    return ids


def blank(n: int, device: torch.device = CUDA) -> tuple[Tensor, Tensor]:
    return torch.zeros(n, 3, 6, 6, dtype=torch.uint8, device=device), torch.zeros(n, dtype=torch.int64, device=device)


def test_the_stand_in_notices_a_value_that_is_read() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        float(torch.zeros(3, device=CUDA).sum())


def test_images_on_the_device_are_gathered_and_augmented_there_and_nobody_waits(pinned: set[int]) -> None:
    with FakeTensorMode(), Traffic() as seen:
        batches = list(TensorLoader(*blank(50), 8, shuffle=True, drop_last=True, augment=Augment(2, True)))
    assert [(x.device, x.dtype, x.shape, y.device) for x, y in batches] == [(CUDA, torch.float32, (8, 3, 6, 6), CUDA)] * 6
    # The order once an epoch, and three numbers an image.
    assert [tuple(tensor.shape) for tensor, _ in seen.sent] == [(50,)] + [(3, 8)] * 6
    assert all(id(tensor) in pinned and unwaited for tensor, unwaited in seen.sent)


def test_images_that_stay_behind_leave_pinned_memory_batch_by_batch(pinned: set[int]) -> None:
    for wanted in (True, False):
        pinned.clear()
        for batch in TensorLoader(*blank(20, torch.device("cpu")), 8, augment=Augment(2, True), pinned=wanted):
            assert [id(part) in pinned for part in batch] == [wanted, wanted]


def stand_in(device: torch.device) -> Any:
    """Of a Trainer, what a datamodule asks."""
    return SimpleNamespace(strategy=SimpleNamespace(root_device=device), current_epoch=1, global_rank=0, world_size=1)


def toy(on_device: bool, device: torch.device) -> Toy:
    data = Toy(batch_size=16, augment=Augment(2, True), on_device=on_device)
    data.setup()
    data.trainer = stand_in(device)
    return data


def test_data_on_device_decides_where_images_lie_and_what_is_pinned() -> None:
    meta = torch.device("meta")
    assert toy(True, meta).train_dataloader().images.device == meta  # type: ignore[union-attr]
    assert toy(False, meta).train_dataloader().images.device.type == "cpu"  # type: ignore[union-attr]
    assert not toy(False, torch.device("cpu")).train_dataloader().pinned  # type: ignore[union-attr]
    assert toy(False, CUDA).train_dataloader().pinned  # type: ignore[union-attr]
    data, mode = toy(True, CUDA), FakeTensorMode()
    part = Images(mode.from_tensor(data.train.images), mode.from_tensor(data.train.labels))
    with mode:
        assert not data._loader(part, 8, training=True).pinned


def test_data_on_device_takes_the_same_images_with_the_same_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another device, here one without values: the rows, and how each is shifted and mirrored."""
    drawn: list[Tensor] = []

    def record(tensor: Tensor, device: torch.device) -> Tensor:
        drawn.append(tensor)
        return tensor.to(device)

    for module in (augment, loader):
        monkeypatch.setattr(module, "send", record)
    found = []
    for on_device in (True, False):
        drawn.clear()
        shapes = [(x.shape, x.dtype, y.shape) for x, y in toy(on_device, torch.device("meta")).train_dataloader()]
        found.append((shapes, list(drawn)))
    (shapes, on), (others, off) = found
    assert shapes == others
    assert len(on) == 1 + len(shapes) == 4
    assert all(torch.equal(one, other) for one, other in zip(on, off, strict=True))


def trained(on_device: bool, accelerator: str) -> list[tuple[Tensor, Tensor]]:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    probe = Probe()
    data = Toy(batch_size=16, val_fraction=0.2, augment=Augment(1, True), on_device=on_device)
    pl.Trainer(accelerator=accelerator, devices=1, max_epochs=2, **quiet).fit(probe, datamodule=data)
    return [(x.cpu(), y.cpu()) for _, _, x, y in probe.trained]


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("cuda", marks=gpu)])
def test_a_training_with_data_on_device_sees_the_same_batches(accelerator: str) -> None:
    on, off = trained(True, accelerator), trained(False, accelerator)
    assert len(on) == 6
    for (x, y), (other, labels) in zip(on, off, strict=True):
        assert torch.equal(y, labels)
        torch.testing.assert_close(x, other, rtol=1e-6, atol=0)  # a GPU divides by 255 as it multiplies
    assert not same(on[:3], on[3:]), "or nothing is drawn"


@gpu
def test_a_gpu_is_not_waited_for() -> None:
    batches = iter(TensorLoader(*blank(50), 8, shuffle=True, drop_last=True, augment=Augment(2, True)))
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(batches)) == 5
    finally:
        torch.cuda.set_sync_debug_mode("default")
