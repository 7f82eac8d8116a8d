"""Options from a config or a caller: refused in one sentence that names the key, what was expected and what was found."""

from __future__ import annotations

import math
from collections.abc import Sequence


def require_whole(key: str, value: object, least: int, *, null: bool = False) -> None:
    """A whole number of at least ``least``; true and 2.0 are none.  ``null``: None will do, too.

    Raises:
        ValueError: anything else.
    """
    if not (null and value is None) and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise ValueError(f"{key}: expected {'null or ' * null}a whole number >= {least}, found {value!r}")


def require_number(key: str, value: object, interval: str, *, null: bool = False) -> None:
    """A finite number in an interval such as "(0, 1]", whose round ends do not belong to it; the end "inf" bounds nothing.

    Raises:
        ValueError: anything else.
    """
    if null and value is None:
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high and math.isfinite(value)
    if not fits or (value == low and interval[0] == "(") or (value == high and interval[-1] == ")"):
        above = f" {'>' if interval[0] == '(' else '>='} {low:g}" if math.isfinite(low) else ""
        kind = "share" if low >= 0 and high == 1 else "number"
        what = f"a {kind} in {interval}" if math.isfinite(high) else f"a finite number{above}"
        raise ValueError(f"{key}: expected {'null or ' * null}{what}, found {value!r}")


def require_one_of(key: str, value: object, allowed: Sequence[object], *, null: bool = False) -> None:
    """One of a few values.

    Raises:
        ValueError: anything else.
    """
    if value not in allowed and not (null and value is None):
        names = [*(["null"] if null else []), *(str(name) for name in allowed)]
        stop = "," if len(names) == 2 else ";"  # after a list with commas
        raise ValueError(f"{key}: expected {', '.join(names[:-1])} or {names[-1]}{stop} found {value!r}")


def require_flag(key: str, value: object) -> None:
    """True or false.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{key}: expected true or false, found {value!r}")
