"""What ``auto`` stands for: a function of the hardware's flags, decided once for a run and once for a sweep."""

from __future__ import annotations

import inspect
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from glassarmor.lightning_modules.commands import train
from glassarmor.lightning_modules.commands.resuming import resumed_config
from glassarmor.lightning_modules.run import hardware
from glassarmor.lightning_modules.run.hardware import Settings, resolve_auto, suited, wandb_sweep
from tests.composing import SMALL, config

PLAIN, FAST = Settings("32-true", False), Settings("bf16-mixed", True)


def machine(monkeypatch, *, cuda: tuple[int, int] | None = None, cpu: str = "AVX2", bf16: bool = False, amx: bool = False):
    """Stand-ins for torch's questions about the hardware."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)


@pytest.mark.parametrize(
    ("has", "accelerator", "expected"),
    [
        ({"cuda": (9, 0)}, "auto", FAST),
        ({"cuda": (8, 0)}, "gpu", FAST),
        ({"cuda": (7, 5)}, "auto", PLAIN),
        ({"cuda": (9, 0)}, "cpu", PLAIN),
        ({"cuda": (7, 5), "cpu": "AVX512", "bf16": True}, "auto", PLAIN),
        ({"cpu": "AVX512", "bf16": True}, "auto", FAST),
        ({"cpu": "AVX512", "amx": True}, "cpu", FAST),
        ({"cpu": "AVX512"}, "auto", Settings("32-true", True)),
        ({"cpu": "AVX2"}, "auto", PLAIN),
        ({"cpu": "AVX2", "bf16": True}, "auto", PLAIN),
        ({"cpu": "AVX512", "bf16": True}, "tpu", PLAIN),
    ],
)
def test_what_suits_follows_the_flags(monkeypatch, has, accelerator, expected):
    machine(monkeypatch, **has)
    assert suited(accelerator) == expected


def test_a_torch_that_cannot_be_asked_counts_as_no(monkeypatch):
    machine(monkeypatch, cpu="AVX512", bf16=True)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert suited().precision == "32-true"


def test_nothing_is_timed():
    assert "time" not in {name.split(".")[0] for name in vars(hardware)}
    assert "perf_counter" not in inspect.getsource(hardware)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("auto", "auto"), ("bf16-mixed", True)),
        (("auto", False), ("bf16-mixed", False)),
        (("32-true", "auto"), ("32-true", True)),
        (("16-mixed", True), ("16-mixed", True)),
        ((64, False), (64, False)),
    ],
)
def test_only_auto_is_decided(monkeypatch, given, expected):
    machine(monkeypatch, cuda=(9, 0))
    assert resolve_auto(*given, "auto") == expected


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", 16])
def test_fp16_without_a_gpu_is_refused(monkeypatch, precision):
    """Lightning would train in bf16, and the config would say something else."""
    machine(monkeypatch)
    for accelerator in ("cpu", "auto"):
        with pytest.raises(ValueError, match=rf"^trainer\.precision: {precision} needs a GPU; expected bf16-mixed"):
            resolve_auto(precision, False, accelerator)
    machine(monkeypatch, cuda=(7, 5))
    assert resolve_auto(precision, False, "auto") == (precision, False)
    with pytest.raises(ValueError, match="needs a GPU"):
        resolve_auto(precision, False, "cpu")


def test_the_first_member_of_a_wandb_sweep_decides_for_all(monkeypatch, tmp_path: Path):
    assert wandb_sweep(tmp_path) is None
    monkeypatch.setenv("WANDB_SWEEP_ID", "ab12")
    machine(monkeypatch, cuda=(9, 0))
    assert resolve_auto("auto", "auto", "auto", wandb_sweep(tmp_path)) == ("bf16-mixed", True)
    machine(monkeypatch, cpu="AVX2")
    assert resolve_auto("auto", "auto", "auto", wandb_sweep(tmp_path)) == ("bf16-mixed", True)
    monkeypatch.setenv("WANDB_SWEEP_ID", "cd34")
    assert resolve_auto("auto", "auto", "auto", wandb_sweep(tmp_path)) == ("32-true", False)


def test_another_layout_is_refused():
    with pytest.raises(ValueError, match="channels_last: expected true, false or auto, found 'maybe'"):
        resolve_auto("auto", "maybe", "auto")


def test_the_first_member_of_a_sweep_decides_for_all(monkeypatch, tmp_path: Path):
    machine(monkeypatch, cuda=(9, 0))
    assert resolve_auto("auto", "auto", "auto", tmp_path / "sweep") == ("bf16-mixed", True)
    machine(monkeypatch, cpu="AVX2")
    assert resolve_auto("auto", "auto", "auto", tmp_path / "sweep") == ("bf16-mixed", True)
    assert resolve_auto("auto", "auto", "auto") == ("32-true", False)
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["hardware.json"]


def no_links(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])
def test_members_that_start_together_agree(links, monkeypatch, tmp_path: Path):
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    answers = iter([FAST, PLAIN] * 20)
    monkeypatch.setattr(hardware, "suited", lambda _accelerator: next(answers))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: resolve_auto("auto", "auto", "auto", tmp_path), range(40)))
    assert len(set(found)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hardware.json"]


def test_the_composed_config_holds_what_was_decided(monkeypatch):
    machine(monkeypatch, cpu="AVX512", bf16=True)
    cfg = config(*SMALL, "trainer.precision=auto", "channels_last=auto")
    train.settle(cfg)
    assert (cfg.trainer.precision, cfg.channels_last) == ("bf16-mixed", True)
    net = train.build(cfg).module.net
    convolutions = [m.weight for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels > 1]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)


def test_a_resumed_run_keeps_what_was_decided(monkeypatch, tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    (tmp_path / "run.json").write_text('{"what": "digits", "wandb_id": "1", "commit": "abc", "started": "now"}')
    cfg = config("trainer.precision=auto", "channels_last=auto", f"resume={tmp_path}")
    machine(monkeypatch, cuda=(9, 0))
    train.settle(cfg)
    OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
    machine(monkeypatch, cpu="AVX2")
    again = resumed_config(cfg, [f"resume={tmp_path}", "trainer.precision=auto", "wandb.mode=auto"])
    train.settle(again)
    assert (again.trainer.precision, again.channels_last) == ("bf16-mixed", True)
    assert resumed_config(cfg, ["trainer.precision=32-true"]).trainer.precision == "32-true"


@pytest.mark.parametrize("text", ['{"precision": "bf16', "{}", "[]"])
def test_a_broken_record_of_a_sweep_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "hardware.json").write_text(text)
    with pytest.raises(ValueError, match=r"trainer.precision: .*hardware\.json .*delete it"):
        resolve_auto("auto", "auto", "cpu", tmp_path)
