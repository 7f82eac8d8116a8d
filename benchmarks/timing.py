"""What the benchmarks share: paired timings in one process, the machine in words, tables, straight lines."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import platform
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Final

import torch
from torch.profiler import ProfilerActivity, profile

Times = dict[str, list[float]]  # by name, seconds of each round
Spent = dict[str, dict[str, float]]  # by name, milliseconds in each operator
KINDS: Final = {  # patterns in the profiler's names
    "convolutions, forward and backward": "conv",
    "BatchNorm, forward and backward": "batch_?norm",
    "ReLU, forward and backward": "relu|threshold_backward|aten::clamp_min",  # the last is what a ReLU runs on a CPU
    "sums": r"aten::add_?$|AddBackward",
}


def positive(text: str) -> int:
    """An argument that counts something: for argparse, which says on one line what is wrong with another."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def seconds(run: Callable[[], object]) -> float:
    """With one thread the process's own time, which other jobs disturb least; else, and on a GPU, wall time."""
    clock = time.process_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
    _wait()
    start = clock()
    run()
    _wait()
    return clock() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def paired(runs: Mapping[str, Callable[[], object]], rounds: int, limit: float = math.inf) -> Times:
    """Each round runs all, in turn forwards and backwards, so that a drift of the machine meets them alike.

    No further round begins after ``limit`` seconds.
    """
    times: Times = {name: [] for name in runs}
    begun = time.perf_counter()
    for index in range(rounds):
        if index and time.perf_counter() - begun > limit:
            break
        for name in list(runs)[:: 1 if index % 2 == 0 else -1]:
            times[name].append(seconds(runs[name]))
    return times


def ratio(times: Times, of: str, to: str) -> float:
    """Median over the rounds of the time of one over that of the other."""
    return median(a / b for a, b in zip(times[of], times[to], strict=True))


def rows(times: Times, reference: str, work: float = 0.0, unit: str = "images/s") -> str:
    """A Markdown table: median, range, ratio to the reference round by round; with ``work``, that much a second."""
    head = f"| | seconds | from–to | {unit + ' | ' if work else ''}÷ {reference} | its range |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for name, found in times.items():
        ratios = [a / b for a, b in zip(found, times[reference], strict=True)]
        rate = f"{work / median(found):.1f} | " if work else ""
        lines.append(
            f"| {name} | {median(found):.3f} | {min(found):.3f}–{max(found):.3f} | {rate}"
            f"{median(ratios):.2f} | {min(ratios):.2f}–{max(ratios):.2f} |"
        )
    return "\n".join(lines)


def traced(runs: Mapping[str, Callable[[], object]], repeats: int = 3) -> Spent:
    """Where the time goes, by torch's profiler: milliseconds a run in each operator itself."""
    spent: Spent = {}
    for name, run in runs.items():
        with warnings.catch_warnings(action="ignore"), profile(activities=[ProfilerActivity.CPU]) as found:
            for _ in range(repeats):
                run()
        spent[name] = {event.key: event.self_cpu_time_total / 1e3 / repeats for event in found.key_averages()}
    return spent


def operators(spent: Spent, top: int = 12) -> str:
    """A Markdown table of milliseconds by operator, those that take most first."""
    keys = sorted(
        {key for times in spent.values() for key in times}, key=lambda k: -max(t.get(k, 0) for t in spent.values())
    )
    lines = ["| ms in | " + " | ".join(spent) + " |", "|---" * (len(spent) + 1) + "|"]
    groups = {**{key: [key] for key in keys[:top]}, "all others": keys[top:], "sum": keys}
    for name, members in groups.items():
        values = (sum(times.get(key, 0) for key in members) for times in spent.values())
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |")
    return "\n".join(lines)


def kind(operator: str) -> str:
    """Which of :data:`KINDS` the profiler's name of an operator, of the forward or the backward, belongs to."""
    return next((name for name, pattern in KINDS.items() if re.search(pattern, operator, re.IGNORECASE)), "all others")


def shares(spent: Spent) -> str:
    """A Markdown table of milliseconds by kind of operator, and their shares of the run."""
    lines = ["| ms in | " + " | ".join(f"{name} | share" for name in spent) + " |", "|---" * (2 * len(spent) + 1) + "|"]
    for name in (*KINDS, "all others"):
        cells = []
        for times in spent.values():
            value = sum(taken for operator, taken in times.items() if kind(operator) == name)
            cells.append(f"{value:,.0f} | {100 * value / sum(times.values()):.1f} %")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> str:
    """Hardware, versions and threads."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return f"{name}; Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return " ".join([model, *(flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags)])


def version(package: str) -> str:
    """Of an installed package, else "absent"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def matmul_rate(device: torch.device, dtype: torch.dtype, rounds: int = 7) -> float:
    """FLOP/s of the fastest square matrix product of a few sizes: what this machine can do at most, as measured."""
    best = 0.0
    for size in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        a @ b
        times = [seconds(lambda a=a, b=b: a @ b) for _ in range(rounds)]
        best = max(best, 2 * size**3 / min(times))
    return best


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope, intercept and R² of the least-squares line."""
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    slope = ((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum()
    intercept = b.mean() - slope * a.mean()
    residual = (b - intercept - slope * a).square().sum()
    return float(slope), float(intercept), float(1 - residual / (b - b.mean()).square().sum())
