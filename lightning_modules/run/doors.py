"""How this process was called: by ``glassarmor train`` or by ``python train.py``; what it says and starts again follows."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import glassarmor

_given: list[str] = []


def enter() -> None:
    """Called by ``glassarmor COMMAND …``: the command's own words are what its parser sees."""
    _given[:] = sys.argv
    del sys.argv[1]


def as_given() -> None:
    """Put back the words of the whole command, once they are parsed: Lightning starts further processes by them."""
    if _given:
        sys.argv[:] = _given


def spelled(command: str) -> list[str]:
    """The words that a user types for "train", "evaluate" or "compare", in the way this process was called."""
    return ["glassarmor", command] if _given else ["python", f"{command}.py"]


def started(command: str) -> list[str]:
    """The words that start this command in a process of its own, whatever folder that is in."""
    return [sys.executable, "-m", "glassarmor", command]


def make_importable() -> None:
    """Processes that this one starts find the package, in a checkout too: what a launcher sends them names its modules."""
    top = str(Path(glassarmor.__file__).resolve().parents[1])
    if top not in (known := os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        os.environ["PYTHONPATH"] = os.pathsep.join([top, *filter(None, known)])
