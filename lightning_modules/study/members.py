"""The runs of a study."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glassarmor.lightning_modules.run.targets import canonical
from glassarmor.lightning_modules.study.records import (
    ELSEWHERE,
    PLACES,
    config_hash,
)
from glassarmor.lightning_modules.study.study import Study


@dataclass(frozen=True)
class Member:
    """One run of a study.  ``overrides`` are those of ``train.py``; ``hash`` that of the composed config."""

    method: str
    setting: str
    seed: int
    overrides: tuple[str, ...]
    hash: str
    config: Mapping[str, Any]
    suites: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        stem = re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.method} {self.setting}").strip("-")
        return f"{stem[:80]}_s{self.seed}_{self.hash}"


Compose = Callable[[tuple[str, ...], int], Mapping[str, Any]]


def members_of(study: Study, compose: Compose, further: Sequence[str] = ()) -> list[Member]:
    """All runs of a study, seed by seed so that an unfinished one already compares; every config is composed here.

    Args:
        compose: overrides, seed → the composed, resolved config of ``train.py``.
        further: overrides of the command line, for every member.

    Raises:
        ValueError: a config that does not compose, or two settings that are the same.
    """
    members: dict[str, Member] = {}
    for place, seed in enumerate(study.seeds):
        for method, entry in study.methods.items():
            if place >= entry.get("seeds", len(study.seeds)):
                continue
            grid = entry.get("grid") or {}
            for values in itertools.product(*grid.values()):
                point = [f"{key}={as_override(value)}" for key, value in zip(grid, values, strict=True)]
                overrides = tuple(canonical([*study.budget, *(entry.get("overrides") or ()), *point, *further]))
                try:
                    config = compose(overrides, seed)
                except Exception as error:
                    said = " ".join(str(error).split()).partition(" Config search path")[0]  # Hydra goes on for long
                    raise ValueError(f"study.methods.{method}: {said}") from error
                setting = ", ".join(_short(part) for part in point)
                member = Member(
                    method, setting, seed, (*overrides, f"seed={seed}"), config_hash(config), config, study.suites
                )
                other = members.setdefault(member.hash, member)
                if other is not member:
                    raise ValueError(
                        f"study.methods: {other.method} {other.setting} and {method} {setting} are the same config (seed "
                        f"{seed}); a run would count twice"
                    )
    return list(members.values())


def as_override(value: Any) -> str:
    """A YAML value as in an override."""
    return json.dumps(value) if isinstance(value, bool | None) else str(value)


def _short(part: str) -> str:
    """ "regularizers.pse.weight=1" → "pse.weight=1"."""
    key, _, value = part.partition("=")
    return f"{'.'.join(key.split('.')[-2:])}={value}"


def portable_override(override: str) -> bool:
    """Whether it says what is computed, not where things lie on one machine."""
    key = override.partition("=")[0].lstrip("+~")
    return key.split(".")[0] not in ELSEWHERE and key not in {f"data.{place}" for place in PLACES}
