"""A study: methods × grids × seeds from one YAML, trained by ``train.py`` in processes of their own, resumably.

    OUT/members/NAME/   member.json (hash, overrides, attempts), log.txt, lock, run/ (the run folder), suites/ (evaluations)
    OUT/cards/NAME.json one small card a member, failures included
    OUT/hardware.json   what ``auto`` stands for, decided by the first member for all (not part of any hash)

A member's name ends in the hash of its composed config: what is done is skipped, and a changed config is another member.
A card is enough to count as done: copied to another machine, the cards carry a study on there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from glassarmor.lightning_modules.study.verdicts import SELECTED


@dataclass(frozen=True)
class Study:
    """What one YAML says.

    Args:
        name: of the study.
        seeds: each setting is trained with each.
        baseline: the method that the others are judged against.
        methods: name → ``overrides`` (a list, as on the command line of ``train.py``), ``grid`` (key → values; a method's
            settings are all combinations of it), ``seeds`` (it is trained with the first so many; all by default) and
            ``base``: the method, or a list of methods, whose settings are its control; the baseline by default.
        budget: overrides that every member shares: data, network, epochs, ...
        suites: name → overrides of ``evaluate.py``, such as ``suite=standard``: what judges the best epoch of every member
            after its training, beside ``test_attacks``.
        rounds: of a race (``race.py`` beside this file); without any, every setting is trained with every seed.
        attack: of ``test_attacks`` or ``suites``, whose accuracy is compared; None takes the last.
        network: row of ``results.json`` that is compared.

    Raises:
        ValueError: names the key of the YAML that is wrong, what was expected and found.
    """

    name: str
    seeds: tuple[int, ...]
    baseline: str
    methods: Mapping[str, Mapping[str, Any]]
    budget: tuple[str, ...] = ()
    suites: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rounds: tuple[Mapping[str, Any], ...] = ()
    attack: str | None = None
    network: str = SELECTED

    def __post_init__(self) -> None:
        if (
            not self.seeds
            or len(set(self.seeds)) < len(self.seeds)
            or not all(type(s) is int and s >= 0 for s in self.seeds)
        ):
            raise ValueError(f"study.seeds: expected different whole numbers >= 0, found {list(self.seeds)}")
        if not isinstance(self.baseline, str) or self.baseline not in self.methods:
            raise ValueError(f"study.baseline: expected one of {', '.join(self.methods)}; found {self.baseline!r}")
        for name, method in self.methods.items():
            unknown = set(method) - {"overrides", "grid", "seeds", "base"}
            if unknown:
                found = ", ".join(sorted(unknown))
                raise ValueError(f"study.methods.{name}: expected overrides, grid, seeds and base, found {found}")
            if type(method.get("seeds", 1)) is not int or not 1 <= method.get("seeds", 1) <= len(self.seeds):
                raise ValueError(
                    f"study.methods.{name}.seeds: expected some of {len(self.seeds)} seeds, found {method['seeds']!r}"
                )
            bases = method.get("base", self.baseline)
            if not bases or not all(base in [*self.methods] for base in (bases if isinstance(bases, list) else [bases])):
                raise ValueError(f"study.methods.{name}.base: expected some of {', '.join(self.methods)}; found {bases!r}")
            for key, values in (method.get("grid") or {}).items():
                if not isinstance(values, list) or not values:
                    raise ValueError(f"study.methods.{name}.grid.{key}: expected a list of values, found {values!r}")
        named: dict[str, Sequence[Any]] = {"budget": self.budget}
        named |= {f"methods.{name}.overrides": method.get("overrides") or () for name, method in self.methods.items()}
        named |= {f"suites.{name}": lines for name, lines in self.suites.items()}
        for key, lines in named.items():
            for line in lines:
                if not isinstance(line, str) or ("=" not in line and not line.startswith("~")):
                    raise ValueError(f"study.{key}: expected overrides such as defense=trades, found {line!r}")

    @property
    def bases(self) -> dict[str, tuple[str, ...]]:
        """Method → the methods whose settings are its control."""
        named = {name: entry.get("base", self.baseline) for name, entry in self.methods.items()}
        return {name: tuple(base) if isinstance(base, list) else (base,) for name, base in named.items()}


def read_study(path: Path) -> Study:
    """A study from its YAML.

    Raises:
        ValueError: no such file, an entry that is missing or unknown, or one that is wrong.
    """
    if not path.is_file():
        raise ValueError(f"--study: expected a YAML file such as configs/study/tiny.yaml, found none at {path}")
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--study: {path} is no YAML: {' '.join(str(error).split())[:200]}") from error
    known = {entry.name for entry in fields(Study)}
    if not isinstance(entries, dict) or set(entries) - known or {"name", "seeds", "baseline", "methods"} - set(entries):
        found = ", ".join(map(str, entries)) if isinstance(entries, dict) else type(entries).__name__
        raise ValueError(
            "--study: expected name, seeds, baseline, methods and perhaps budget, suites, rounds, attack, network; found "
            f"{found}"
        )
    for key in ("seeds", "budget", "rounds"):
        if not isinstance(entries.get(key) or [], list):
            raise ValueError(f"study.{key}: expected a list, found {entries[key]!r}")
    for key in ("methods", "suites"):
        if not isinstance(entries.get(key) or {}, dict):
            raise ValueError(f"study.{key}: expected names with what belongs to them, found {entries[key]!r}")
    for name, method in entries["methods"].items():
        parts = method if isinstance(method, dict) else {}
        if not isinstance(method, dict | None) or not isinstance(parts.get("grid") or {}, dict):
            raise ValueError(f"study.methods.{name}: expected overrides: [...] and grid: {{key: [...]}}, found {method!r}")
        entries["methods"][name] = parts
    for key, lines in [
        *((f"methods.{name}.overrides", method.get("overrides")) for name, method in entries["methods"].items()),
        *((f"suites.{name}", lines or "nothing") for name, lines in (entries.get("suites") or {}).items()),
    ]:
        if not isinstance(lines or [], list):
            raise ValueError(f"study.{key}: expected a list of overrides, found {lines!r}")
    lists = {key: tuple(entries.get(key) or ()) for key in ("seeds", "budget", "rounds")}
    return Study(**{**entries, **lists, "suites": entries.get("suites") or {}})


# ---- one member's folder --------------------------------------------------------------------------------------------


# ---- all of them ----------------------------------------------------------------------------------------------------
