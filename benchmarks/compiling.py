"""Does it pay to compile the net that the attack sees?  What ``recommend.py`` and ``gpu.py`` ask, answered by measuring."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from benchmarks.timing import Times, paired, ratio, rows

AS_IT_IS = "as it is"
PAYS = 0.97  # of the time of a step, at most: less is lost in the noise


@dataclass(frozen=True)
class Compared:
    """``times`` of a step by way, the seconds that the ``first`` step of each took, and why some ways failed."""

    times: Times
    first: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> str | None:
        """The fastest way that pays; None where the net had better stay as it is."""
        found = min(self.times, key=lambda way: ratio(self.times, way, AS_IT_IS))
        return found if ratio(self.times, found, AS_IT_IS) < PAYS else None

    @property
    def repaid(self) -> int | None:
        """Steps after which compiling has paid for itself."""
        if self.best is None:
            return None
        saved = median(self.times[AS_IT_IS]) - median(self.times[self.best])
        return math.ceil(max(0.0, self.first[self.best] - self.first[AS_IT_IS]) / saved)

    def __str__(self) -> str:
        lines = [rows(self.times, AS_IT_IS)]
        lines += [f"first step, {way}: {seconds:.1f} s" for way, seconds in self.first.items()]
        lines += [f"{way} failed: {why}" for way, why in self.failed.items()]
        return "\n".join(lines)

    def advice(self) -> str:
        """What to write into the config."""
        if self.best is None:
            return "compiling: does not pay here, leave defense.compile_attack out"
        return f"compiling: +defense.compile_attack={self.best}  (repaid after {self.repaid} steps)"


def ways(device: torch.device) -> tuple[str, ...]:
    """On a GPU: fused kernels, these in CUDA graphs, and torch's own kernels in CUDA graphs; elsewhere fused kernels."""
    return ("inductor", "reduce-overhead", "cudagraphs") if device.type == "cuda" else ("inductor",)


def compare(make: Callable[[str | None], Callable[[], object]], among: Sequence[str], rounds: int) -> Compared:
    """Training steps with the attack's net as it is and compiled, in turn.

    Args:
        make: by the value of ``defense.compile_attack``, a training step.
        among: values to try.  One that fails is left out, with its reason.
    """
    runs: dict[str, Callable[[], object]] = {}
    first, failed = {}, {}
    for way in (None, *among):
        name = way or AS_IT_IS
        run = make(way)
        start = time.perf_counter()
        try:
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            first[name] = time.perf_counter() - start
            for _ in range(2):  # CUDA graphs are recorded in the second and third
                run()
        except (RuntimeError, ValueError) as error:
            if way is None:
                raise
            failed[name] = " ".join(str(error).split())[:300]
            first.pop(name, None)
            continue
        runs[name] = run
    return Compared(paired(runs, rounds), first, failed)
