"""Glassarmor: robust training of image classifiers, with interpretation-guided defenses and dashboards.

In a checkout the parts lie beside this folder, at the top of the repository; in an installed package inside it.
"""

from pathlib import Path
from typing import Any

__version__ = "0.2.0"

_top = Path(__file__).resolve().parent
if not (_top / "defenses").is_dir():
    __path__.append(str(_top.parent))


def __getattr__(name: str) -> Any:
    """``glassarmor.load``, found when asked for: importing the name alone imports no torch."""
    if name == "load":
        from glassarmor.lightning_modules.commands.loading import load

        return load
    raise AttributeError(f"module 'glassarmor' has no attribute {name!r}")
