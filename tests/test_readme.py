"""The README: short, quoted for every shell, and its Python runs as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/commands.md")}


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.S | re.M)


def test_it_is_short_and_leads_on() -> None:
    assert len(TEXT.split()) < 900
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []


@pytest.mark.parametrize("name", PAGES)
def test_every_command_is_taken_alike_by_bash_zsh_and_fish(name: str) -> None:
    """No bracket, brace or leading tilde outside quotes: zsh takes them for patterns, fish some of them for its own."""
    for block in blocks(PAGES[name], ""):
        for line in block.splitlines():
            if not re.match(r"\s*(python|glassarmor|make) ", line):
                continue
            bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", line.partition("  #")[0])
            assert not re.search(r"[\[\]{}*?]|\s~", bare), line


@pytest.mark.long
def test_its_python_runs_as_printed(tmp_path: Path) -> None:
    (code,) = blocks(TEXT, "python")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NETRC": os.devnull, "WANDB_MODE": "offline"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "promotion" in (tmp_path / "my-run" / "report" / "index.html").read_text(encoding="utf-8")
    assert list((tmp_path / "my-run" / "wandb").glob("offline-run-*/*.wandb"))
