"""Other people's weights: what they publish loads bit for bit, or is refused in one sentence that says why."""

from __future__ import annotations

import argparse
import copy
import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from glassarmor.lightning_modules.networks.build import load_weights
from glassarmor.lightning_modules.networks.normalize import normalised
from glassarmor.lightning_modules.networks.small_cnn import SmallCNN

State = dict[str, Tensor]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def raw(classes: int = 4) -> nn.Sequential:
    """A net for normalised images, as others publish them."""
    parts = {"conv": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4), "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
    return nn.Sequential(OrderedDict(parts, fc=nn.Linear(4, classes)))


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(3)
    net = raw()
    for value in net.state_dict().values():
        value.copy_(torch.rand_like(value.float()) * 9 + 1)
    return net.state_dict()


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def other(state: State) -> State:
    return {name: value + 1 for name, value in state.items()}


def without(state: State, end: str) -> State:
    return {name: value for name, value in state.items() if not name.endswith(end)}


SHAPES: dict[str, Callable[[State], Any]] = {
    "plain": lambda s: s,
    "DataParallel": lambda s: prefixed(s, "module."),
    "compiled, in DataParallel": lambda s: prefixed(s, "module._orig_mod."),
    "a part compiled": lambda s: {name.replace("bn.", "bn._orig_mod."): value for name, value in s.items()},
    "a wrapper's model": lambda s: prefixed(s, "model."),
    "nested": lambda s: prefixed(s, "module.model.net.backbone."),
    "any one prefix": lambda s: prefixed(s, "classifier_net."),
    "state_dict": lambda s: {"epoch": 3, "state_dict": prefixed(s, "module."), "best_acc": 0.5},
    "net": lambda s: {"net": s, "acc": 91.2, "epoch": 3},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {0: {"step": torch.ones(())}}}},
    "averaged, of timm": lambda s: {"state_dict_ema": other(s), "state_dict": s, "args": argparse.Namespace(lr=0.1)},
    "averaged alone": lambda s: {"ema": prefixed(s, "module.") | {"n_averaged": torch.tensor(3)}},
    "deep": lambda s: {"checkpoint": {"models": {"net": s}}},
    "profiled": lambda s: s | {"total_ops": torch.zeros(1), "fc.total_params": torch.zeros(1)},
    "before counters": lambda s: without(s, "num_batches_tracked"),
    "numpy scalars": lambda s: {"model": s, "acc": np.float64(0.5), "seen": np.int64(3), "curve": np.zeros(3)},
    "numpy arrays": lambda s: {name: value.numpy() for name, value in s.items()},
    "a list of tensors": lambda s: list(s.values()),
    "pairs": lambda s: list(s.items()),
    "Lightning": lambda s: {"state_dict": prefixed(s, "net.") | {"train_acc.total": torch.ones(1)}, "loops": {}},
    "a head as 1×1 convolution": lambda s: s | {"fc.weight": s["fc.weight"][:, :, None, None]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_published_shapes_load_bit_for_bit(shape: str, state: State, tmp_path: Path) -> None:
    torch.save(SHAPES[shape](state), tmp_path / "w.pt")
    for net in (raw(), normalised(raw(), MEAN, STD)):
        filled = load_weights(net, tmp_path / "w.pt")
        inner = net.state_dict() if isinstance(net, nn.Sequential) and not hasattr(net, "net") else net.net.state_dict()
        for name, value in inner.items():
            kept = name.endswith("num_batches_tracked") and shape == "before counters"
            assert torch.equal(value, torch.zeros_like(value) if kept else state[name]), name
        assert len(filled.sha256) == 64
    if shape == "Lightning":
        assert not any("left out" in words for words in filled.notes)
    if "averaged, of" in shape:
        assert "state_dict_ema would fit too" in filled.notes[-1]


def test_a_layer_outside_of_the_net_is_told(state: State, tmp_path: Path) -> None:
    torch.save(prefixed(state, "backbone.") | {"projection.weight": torch.ones(2, 4)}, tmp_path / "w.pt")
    assert load_weights(raw(), tmp_path / "w.pt").notes == ("left out, for they lie outside 'backbone.': projection.weight",)


def test_other_formats_load_bit_for_bit(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "w.safetensors")
    np.savez(tmp_path / "w.npz", **{name: value.numpy() for name, value in state.items()})
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for path in sorted(tmp_path.iterdir()):
        net = raw()
        load_weights(net, path)
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items()), path


def test_a_files_own_normalisation_is_the_one_it_was_trained_with(state: State, tmp_path: Path) -> None:
    """RobustBench's classes hold mu and sigma as buffers."""
    brought = {"mu": torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), "sigma": torch.tensor([0.5, 0.6, 0.7]).view(1, 3, 1, 1)}
    torch.save(prefixed(state | brought, "module."), tmp_path / "w.pt")
    net = normalised(raw(), MEAN, STD)
    load_weights(net, tmp_path / "w.pt")
    torch.testing.assert_close(net.normalize.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(net.normalize.std.flatten(), torch.tensor([0.5, 0.6, 0.7]))
    with pytest.raises(ValueError, match=r"brings a normalisation, .*no place for: add mean=\[0.1, 0.2, 0.3\], std=\[0.5"):
        load_weights(raw(), tmp_path / "w.pt")
    torch.save(state | {name: 255 * value for name, value in brought.items()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"mu is for images in 0\.\.255"):
        load_weights(net, tmp_path / "w.pt")


class Foreign:
    """Of a class that no file of weights needs."""


def onnx() -> bytes:
    return b"\x08\x08\x12\x07pytorch" + bytes(100)


def script(state: State) -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(raw()), file)
    return file.getvalue()


REFUSED: dict[str, tuple[Callable[[State], Any], str]] = {
    "a module": (lambda s: raw(), r"a pickled module .*torch\.nn\.modules.*torch\.save\(net\.state_dict\(\), FILE\)"),
    "a module inside": (lambda s: {"net": raw()}, r"a pickled module"),
    "a foreign class": (lambda s: {"model": s, "config": Foreign()}, r"asks for tests\.\S*Foreign, which is not loaded"),
    "ONNX": (lambda s: onnx(), r"a graph in ONNX, .*model=module:callable"),
    "TorchScript": (script, r"a TorchScript program, .*torch\.jit\.load"),
    "HDF5": (lambda s: b"\x89HDF\r\n\x1a\n" + bytes(99), r"Keras"),
    "a pointer": (lambda s: b"version https://git-lfs.github.com/spec/v1\noid sha256:00", r"git lfs pull"),
    "a web page": (lambda s: b"<!doctype html><title>Sign in</title>", r"a web page"),
    "nothing": (lambda s: b"", r"an empty file"),
    "text": (lambda s: b"weights", r"is no file of weights"),
    "no tensors": (lambda s: {"model": {"epoch": 1}}, r"no state dict of tensors.*found a dict with keys model"),
    "another net": (
        lambda s: {"a": torch.ones(2), "b": torch.ones(1)},
        r"conv\.weight is missing; .* It holds 2 tensors, e\.g\. a, b; expected 9, e\.g\. conv\.weight, conv\.bias",
    ),
    "other classes": (lambda s: raw(7).state_dict(), r"fc\.weight \(7, 4\) instead of \(4, 4\)"),
    "too much": (lambda s: s | {"fc2.weight": torch.ones(2)}, r"fc2\.weight is not in the network"),
    "two nets": (
        lambda s: prefixed(s, "student.") | prefixed(other(s), "twin."),
        r"'student\.' and 'twin\.' hold it alike",
    ),
    "quantised": (lambda s: s | {"fc.weight": s["fc.weight"].to(torch.int8)}, r"fc\.weight is torch\.int8 instead of"),
    "a list of others": (lambda s: [torch.ones(2)], r"a list of 1 tensors without names"),
    "complex": (lambda s: s | {"fc.bias": s["fc.bias"].to(torch.complex64)}, r"fc\.bias is torch\.complex64"),
}


@pytest.mark.parametrize("shape", REFUSED)
def test_what_does_not_load_says_why(shape: str, state: State, tmp_path: Path) -> None:
    make, message = REFUSED[shape]
    content = make(state)
    if isinstance(content, bytes):
        (tmp_path / "w.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "w.pt")
    net = raw()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=rf"(?s)^weights: .*w\.pt.*{message}") as error:
        load_weights(net, tmp_path / "w.pt", "weights")
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(ValueError, match=r"weights: expected a file of weights, found none at none\.pt"):
        load_weights(net, "none.pt", "weights")


@pytest.mark.parametrize("published", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm])
def test_weight_norm_of_either_version(published: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    saved, net = raw(), raw()
    published(saved.fc)
    torch.nn.utils.parametrizations.weight_norm(net.fc)
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    load_weights(net, tmp_path / "w.pt")
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(net.eval()(x), saved.eval()(x))


def test_a_head_for_other_classes_stays_new_where_that_is_asked_for(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pt")
    net = raw(7)
    head = net.fc.weight.clone()
    filled = load_weights(net, tmp_path / "w.pt", new_head=True)
    assert filled.new == ("fc.weight", "fc.bias")
    assert torch.equal(net.fc.weight, head)
    assert torch.equal(net.conv.weight, state["conv.weight"])
    # Another width is no other number of classes.
    small, wide = (SmallCNN(num_classes=3, in_channels=3, mean=MEAN, std=STD, width=w) for w in (0.25, 0.5))
    torch.save(wide.state_dict(), tmp_path / "wide.pt")
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(small, tmp_path / "wide.pt", new_head=True)
