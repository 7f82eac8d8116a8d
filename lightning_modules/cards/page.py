"""Views as a page of their own, with a picture each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glassarmor.interpret.views.draw.figures import save, to_array, write_png
from glassarmor.interpret.views.page.page import KeyFigure, ReportPage
from glassarmor.interpret.views.view import View


def draw(folder: Path, meta: dict[str, Any], views: Sequence[View], figures: tuple[KeyFigure, ...]) -> ReportPage:
    """A self-contained page, and a PNG and SVG a panel."""
    folder.mkdir(parents=True, exist_ok=True)
    for view in views:
        if view.drawing is not None:
            write_png(to_array(view.drawing), folder / f"{view.name}.png")
            save(view.drawing, folder / f"{view.name}.svg")
    page = ReportPage(folder, folder.name, meta, key_figures=figures, overview=None)
    page.write_epoch(0, 0, {}, views)
    page.finish()
    return page
