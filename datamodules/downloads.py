"""Opening torchvision's downloadable datasets, with one clear message where the files are missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def open_dataset(open_it: Callable[[], T], name: str, root: str, download: bool) -> T:
    """``open_it()``, torchvision's constructor.

    Raises:
        FileNotFoundError: the files are absent or damaged, or the download failed.
    """
    try:
        return open_it()
    except (RuntimeError, OSError) as error:  # torchvision raises RuntimeError for both absent and damaged files
        found = f"the download failed ({error})" if download else "it is missing or damaged"
        remedy = "check the connection" if download else "pass data.download=true to fetch it"
        raise FileNotFoundError(f"{name} was expected in data.root={root!r}, but {found}; {remedy}") from error
