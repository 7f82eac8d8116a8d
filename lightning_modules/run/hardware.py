"""Precision and memory layout where the config leaves them to the hardware: from what it can do, never from timings."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import sleep
from typing import Any

import torch

AUTO = "auto"


@dataclass(frozen=True)
class Settings:
    """Lightning's name of a precision, and whether feature maps lie in memory with their channels last."""

    precision: str
    channels_last: bool


def suited(accelerator: str = AUTO) -> Settings:
    """What this machine has instructions for.

    bf16 where it multiplies matrices: CUDA from compute capability 8.0, x86 with AVX512-BF16 or AMX.  Channels last where
    bf16 is used, and on x86 with AVX-512 in fp32 too: the layout that those kernels work in.  Anything else: fp32 as
    torch lays it out.  ``python benchmarks/recommend.py`` measures whether that pays.

    Args:
        accelerator: Lightning's ``trainer.accelerator``.
    """
    if accelerator in (AUTO, "gpu", "cuda") and torch.cuda.is_available():
        low = wide = torch.cuda.get_device_capability()[0] >= 8
    elif accelerator == "cpu" or (accelerator == AUTO and not torch.backends.mps.is_available()):
        wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
        low = wide and (_cpu("_is_avx512_bf16_supported") or _cpu("_is_amx_tile_supported"))
    else:
        low = wide = False
    return Settings("bf16-mixed" if low else "32-true", wide)


def _cpu(question: str) -> bool:
    """Torch's answer, as it reads the processor's flags; versions that cannot be asked count as no."""
    ask = getattr(torch.cpu, question, None)
    return bool(ask and ask())


def resolve_auto(
    precision: object, channels_last: object, accelerator: str, shared: Path | None = None
) -> tuple[object, bool]:
    """The two settings of a run, with ``auto`` decided.

    Args:
        precision: ``trainer.precision``: auto, or anything that Lightning knows, which is passed on.
        channels_last: auto, true or false.
        accelerator: ``trainer.accelerator``.
        shared: the folder of a sweep.  The first member that asks decides for all, also for members on other machines.

    Raises:
        ValueError: another ``channels_last``, fp16 where there is no GPU, or a record of the sweep that cannot be read.
    """
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if str(precision).startswith("16") and (accelerator == "cpu" or (accelerator == AUTO and not gpu)):
        raise ValueError(f"trainer.precision: {precision} needs a GPU; expected bf16-mixed or 32-true, or auto")
    if channels_last not in (True, False, AUTO):
        raise ValueError(f"channels_last: expected true, false or auto, found {channels_last!r}")
    if AUTO not in (precision, channels_last):
        return precision, bool(channels_last)
    found = suited(accelerator) if shared is None else _first(shared / "hardware.json", suited(accelerator))
    return (
        found.precision if precision == AUTO else precision,
        found.channels_last if channels_last == AUTO else bool(channels_last),
    )


def decisions(config: Mapping[str, Any], shared: Path) -> dict[str, object]:
    """Keys of a composed config that say ``auto``, and what that stands for: decided once for all who share a folder."""
    trainer = config.get("trainer") or {}
    asked = {"trainer.precision": trainer.get("precision"), "channels_last": config.get("channels_last", False)}
    if AUTO not in asked.values():
        return {}
    precision, layout = asked.values()
    found = resolve_auto(precision, layout, trainer.get("accelerator", AUTO), shared)
    return {key: value for key, value in zip(asked, found, strict=True) if asked[key] == AUTO}


def wandb_sweep(out: str | Path) -> Path | None:
    """What the members of one W&B sweep share: a folder beside their run folders, in ``out``; None outside a sweep."""
    name = os.environ.get("WANDB_SWEEP_ID")
    return Path(out) / f".sweep-{name}" if name else None


def _first(path: Path, mine: Settings) -> Settings:
    """What the first caller wrote into ``path``, whoever calls at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = json.dumps(asdict(mine))
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(record)
    try:
        os.link(file.name, path)  # whole or not at all, and only where there is none
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        with suppress(FileExistsError), path.open("x", encoding="utf-8") as own:
            own.write(record)
    finally:
        os.unlink(file.name)
    text = path.read_text(encoding="utf-8")
    for _ in range(50):  # without links, the first caller may still be writing
        if text:
            break
        sleep(0.1)
        text = path.read_text(encoding="utf-8")
    try:
        return Settings(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"trainer.precision: {path} should hold what the sweep's first member chose, found {text[:60]!r}; "
            "delete it, or name precision and channels_last instead of auto"
        ) from error
