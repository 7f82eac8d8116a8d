"""Files: written whole or not at all, never through a link; read with what is wrong in one line."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

LARGEST: Final = 1 << 29  # bytes of a JSON file that is read at all


def write_atomic(path: Path, content: str | bytes | memoryview) -> None:
    """Replace a file as a whole: readers, and a machine that was switched off, find the old one or the new one.

    Where ``path`` is a link, the link is replaced, and what it leads to is left alone.

    Raises:
        OSError: it could not be written; the old one is still there.
    """
    part = path.with_name(f".{path.name}.part")  # one name, so that what a killed process left is overwritten
    part.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)  # never into what a planted link names
    try:
        with open(os.open(part, flags, 0o666), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a write that fails does not name its file
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def file_name(text: str) -> str:
    """A plain file name from any text: no folder, nothing hidden, at most 120 letters of A to Z, digits and ``_+.-``."""
    return re.sub(r"[^A-Za-z0-9_+.-]+", "-", text).lstrip(".-")[:120] or "unnamed"


def check_name(name: str, out: str | Path) -> None:
    """Raises ValueError unless ``name`` is the plain name of something inside the folder ``out``."""
    if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
        raise ValueError(f"name: expected the plain name of a folder inside out={out}, found {name!r}")


def read_json(path: Path, key: str = "", finite: bool = True) -> Any:
    """What a JSON file holds.

    Args:
        key: what the user named it by, e.g. "checkpoint"; errors begin with it.
        finite: refuse NaN and infinity; a caller that does not checks them itself, and knows what they stand for.

    Raises:
        ValueError: no file, one above ``LARGEST``, or no JSON; one that says something twice, or a number that is none,
            which readers read in two ways.  Names the file.
    """
    said = f"{key}: {path}" if key else str(path)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
            raise ValueError(f"expected a file of at most {LARGEST >> 20} MiB, found {found.st_size >> 20} MiB")
        return json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_once, parse_constant=_number if finite else None
        )
    except FileNotFoundError:
        raise ValueError(f"{said} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:  # cut, garbage, other encodings, nested without end
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{said} is no readable JSON ({why}); it may be cut or damaged") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"two entries of one name among {', '.join(key for key, _ in pairs)[:100]}")
    return found


def _number(word: str) -> float:
    raise ValueError(f"expected numbers, found {word}")


def read_object(path: Path, key: str = "", finite: bool = True) -> dict[str, Any]:
    """As :func:`read_json`, for a file that holds one object.

    Raises:
        ValueError: see :func:`read_json`; also where it holds something else.
    """
    found = read_json(path, key, finite)
    if not isinstance(found, dict):
        said = f"{key}: {path}" if key else str(path)
        raise ValueError(f"{said}: expected a JSON object, found {type(found).__name__}; it may be damaged")
    return found


def read_numbers(path: Path, key: str = "") -> list[dict[str, float]]:
    """Rows of a CSV of numbers such as ``metrics.csv``; empty cells are left out.

    Raises:
        ValueError: a cell that is no number, or a row without an epoch: names the file and the line.
    """
    said = f"{key}: {path}" if key else str(path)
    rows = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for i, row in enumerate(csv.DictReader(file), start=2):
                try:
                    found = {name: float(value) for name, value in row.items() if value}
                    rows.append(found | {name: int(found[name]) for name in ("epoch", "step")})
                except (TypeError, ValueError, KeyError, OverflowError):
                    raise ValueError(f"line {i}: expected numbers, an epoch and a step among them") from None
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{said} is no readable table of numbers ({error}); it may be cut or damaged") from error
    return rows


def read_lines(path: Path, key: str = "") -> list[dict[str, Any]]:
    """Objects of a JSONL file such as ``health.jsonl``, oldest first, without a last line that was cut off.

    Raises:
        ValueError: a line that is no JSON object: names the file and the line.
    """
    said = f"{key}: {path}" if key else str(path)
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{said} cannot be read ({error}); it may be damaged") from error
    for i, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            event = json.loads(line, object_pairs_hook=_once, parse_constant=_number)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict):
            raise ValueError(f"{said}: line {i} is no JSON object; it may be damaged")
        found.append(event)
    return found


def check_links(
    folder: Path, key: str, into: Sequence[str] = ("checkpoints", "report", "report/data", "data", "cards")
) -> None:
    """Refuse a folder in which a file or folder is a link that leads out of it: what is written there would leave it.

    Args:
        into: its folders that are looked into, too.

    Raises:
        ValueError: names the link and where it leads.
    """
    if folder.is_symlink() and not folder.resolve().is_relative_to(folder.parent.resolve()):
        raise ValueError(f"{key}: {folder} is a link to {folder.resolve()}, and writing would follow it; name that folder")
    inside = folder.resolve()
    for place in (folder, *(folder / name for name in into)):
        if not place.is_dir():
            continue
        for entry in place.iterdir():
            if entry.is_symlink() and not entry.resolve().is_relative_to(inside):
                raise ValueError(
                    f"{key}: {entry} is a link to {entry.resolve()}, outside {folder}, and writing would follow it; "
                    "expected files and folders of its own"
                )


def to_json(value: Any) -> str:
    """JSON that is safe inside a script element and strict: non-finite numbers become null, every '<' is escaped."""
    return json.dumps(plain(value), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def plain(value: Any) -> Any:
    """Dicts, lists, strings and finite numbers only; tuples become lists, non-finite numbers None, 6 digits are kept."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
