"""The page of methods says what the code does now."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_of_methods_is_current() -> None:
    """If this fails, run: python docs/catalogue.py"""
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs" / "catalogue.py"))["page"]() == text
    for group in ("defense", "regularizers"):
        for path in (ROOT / "configs" / group).glob("[!_]*.yaml"):
            assert f"`{path.stem}`" in text
