"""Prints the lock file, for Python 3.11: what `pip install -e .[dev,slurm,timm]` takes today, at its exact version.

    python .ci/lock.py > requirements.txt

pip resolves the ranges of pyproject.toml; nothing is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Wheels that torch brings along where there may be a GPU.
LINUX = '; platform_system == "Linux" and platform_machine == "x86_64"'
HEAD = """# Exact versions, for Python 3.11; written by `make lock` from the ranges of pyproject.toml.  What `make` installs.
"""


def main() -> None:
    """Resolve, and print a line a package."""
    if sys.version_info[:2] != (3, 11):
        sys.exit(f"the lock is for Python 3.11, found {sys.version_info.major}.{sys.version_info.minor}")
    words = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", f"{ROOT}[dev,slurm,timm]"]
    report = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=True).stdout
    packages = {entry["metadata"]["name"]: entry["metadata"]["version"] for entry in json.loads(report)["install"]}
    lines = []
    for name, version in sorted(packages.items(), key=lambda pair: pair[0].lower()):
        only = f" {LINUX}" if name.lower().startswith(("nvidia-", "cuda-", "triton")) else ""
        if name != "glassarmor":
            lines.append(f"{name}=={version.partition('+')[0]}{only}")
    print(HEAD + "\n".join(lines))


if __name__ == "__main__":
    main()
