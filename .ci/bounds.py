"""Prints what to install for a test of the dependency ranges: python .ci/bounds.py lowest|newest

lowest: every direct dependency at its tested lower bound, those to test with too.  newest: as new as the ranges allow.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(which: str) -> list[str]:
    """The direct dependencies with those of "slurm", "timm" and "dev", at their lower bounds or as ranges."""
    extras = PROJECT["optional-dependencies"]
    ranges = [*PROJECT["dependencies"], *extras["slurm"], *extras["timm"], *extras["dev"]]
    if which == "newest":
        return ranges
    found = []
    for one in ranges:
        match = re.match(r"([\w.-]+)\s*(?:>=|==)\s*([\w.]+)", one)
        if match is None:
            raise ValueError(f"pyproject.toml: expected a lower bound such as numpy>=2.2, found {one!r}")
        found.append(f"{match[1]}=={match[2]}")
    return found


if __name__ == "__main__":
    if sys.argv[1:] not in (["lowest"], ["newest"]):
        sys.exit(f"expected lowest or newest, found {' '.join(sys.argv[1:]) or 'nothing'}")
    print("\n".join(requirements(sys.argv[1])))
