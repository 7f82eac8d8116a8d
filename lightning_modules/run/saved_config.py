"""The config of somebody's run folder: plain values, and no code but ours, unless the user says that it is trusted.

A saved config is instantiated: what its ``_target_`` entries name is called.  Allowed are the targets that the YAML files
of this package name and the losses, attacks and threats of ``defenses``, without arguments that name code themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from glassarmor import defenses
from glassarmor.lightning_modules.run.targets import canonical

LARGEST: Final = 1 << 20  # bytes; a config of ours has some ten thousand
DEEPEST: Final = 50
CONFIGS: Final = Path(__file__).resolve().parents[2] / "configs"
# Arguments of our own targets that name code, which is imported and called.
NAMES_CODE: Final = {"glassarmor.lightning_modules.networks.imported": ("target",)}
# What the documents tell users to name beside what the YAML files name.
DOCUMENTED: Final = ("glassarmor.datamodules.SegmentationFolder",)
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built


def read_yaml(path: Path, key: str) -> Any:
    """Plain values from a YAML file; nothing in it is called.

    Raises:
        ValueError: above ``LARGEST``, not YAML, or with aliases, by which a short file can stand for more than memory
            holds; names the file.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"expected at most {LARGEST >> 10} KiB, found {path.stat().st_size >> 10} KiB")
        text = path.read_text(encoding="utf-8")
        _check_shape(yaml.parse(text, Loader=_LOADER))
        return yaml.load(text, Loader=_LOADER)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{key}: {path} is no readable YAML ({why})") from error


def _check_shape(events: Iterable[yaml.Event]) -> None:
    """Raises ValueError for what no file of ours has: aliases, and nesting without end."""
    depth = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it holds aliases (*name), which no file of ours does")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")


def read_config(path: Path, key: str, trusted: bool = False) -> dict[str, Any]:
    """The ``config.yaml`` of a run folder, as plain values.

    Args:
        key: what the user named the folder by, e.g. "checkpoint"; errors begin with it.
        trusted: the user said ``trust=true``: whatever it names may run.

    Raises:
        ValueError: no config, or one that would run what is not ours, or read the environment; says what.
    """
    values = read_yaml(path, key)
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{key}: {path} is no config of a run: expected keys with values, found {type(values).__name__}")
    values = canonical(values)
    foreign = [] if trusted else list(foreign_code(values))
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise ValueError(
            f"{key}: {path} would run what is not part of this package: {'; '.join(foreign[:5])}{more}. If you trust it, "
            "say so: trust=true"
        )
    if not trusted and isinstance(values.get("data"), dict) and values["data"].get("download"):
        values["data"]["download"] = False  # whoever opens it did not ask for the network
    return values


def foreign_code(value: Any, place: str = "") -> Iterator[str]:
    """What in these plain values would run code that is not ours, or read the environment, each as "key: what"."""
    if isinstance(value, Mapping):
        target = value.get("_target_")
        if target is not None and not (isinstance(target, str) and is_ours(target)):
            yield f"{place or 'config'}: {target}"
        for name in NAMES_CODE.get(str(target), ()):
            if value.get(name) is not None:
                yield f"{place}.{name}: {value[name]}"
        for name, inner in value.items():
            yield from foreign_code(inner, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from foreign_code(inner, f"{place}[{i}]")
    elif isinstance(value, str) and "${" in value:  # runs write what they resolved; a resolver may read the environment
        yield f"{place}: {value}"


@cache
def named_targets() -> frozenset[str]:
    """Every ``_target_`` of the YAML files of this package."""
    texts = (path.read_text(encoding="utf-8") for path in CONFIGS.rglob("*.yaml"))
    return frozenset(name for text in texts for name in re.findall(r"_target_:\s*[\"']?([\w.]+)", text))


def is_ours(target: str) -> bool:
    """Whether a saved config may name this."""
    if target in named_targets() or target in DOCUMENTED:
        return True
    face, _, name = target.rpartition(".")
    if face != "glassarmor.defenses" or name not in defenses.__all__:
        return False
    found = getattr(defenses, name)
    return isinstance(found, type) and _is_part(found)


def _is_part(kind: type) -> bool:
    """A threat, a loss, an attack or an attack's objective: what a defense is made of.  None of them writes files."""
    return issubclass(kind, defenses.Term | defenses.Threat) or hasattr(kind, "reseed") or hasattr(kind, "needs_clean")
