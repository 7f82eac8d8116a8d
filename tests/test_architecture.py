"""The house rules of imports, read from the source: who may know whom."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("interpret", "defenses", "datamodules", "lightning_modules")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Full dotted names of all modules a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=where)
def test_rooms_know_only_what_lies_below(path: Path) -> None:
    below = {
        "interpret": {"interpret"},
        "defenses": {"defenses", "interpret"},
        "datamodules": {"datamodules"},
        "lightning_modules": {"lightning_modules", "defenses", "interpret"},
    }
    room = path.relative_to(ROOT).parts[0]
    ours = top(imports(path)) & ({*ROOMS, "train", "evaluate", "compare", "tests", "benchmarks"})
    assert ours <= below[room]


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("captum", lambda p: p == "interpret/signals/captum_bridge.py"),
        ("wandb", lambda p: p == "lightning_modules/run/log.py"),
        ("matplotlib", lambda p: p.startswith("interpret/views/")),
        ("plotly", lambda p: p.startswith("interpret/views/")),
        ("jinja2", lambda p: p.startswith("interpret/views/")),
        ("pytorch_lightning", lambda p: p.startswith(("datamodules/", "lightning_modules/"))),
        ("pyautoattack", lambda p: p == "defenses/attacks/autoattack.py"),
        ("lightning", lambda p: False),
        ("hydra", lambda p: p == "lightning_modules/commands/errors.py"),  # what the scripts share of it
        ("omegaconf", lambda p: p in ("lightning_modules/commands/errors.py", "lightning_modules/commands/resuming.py")),
    ],
)
def test_libraries_stay_in_their_rooms(library, allowed) -> None:
    users = [where(path) for path in FILES if library in top(imports(path))]
    assert [path for path in users if not allowed(path)] == []
    if library in ("captum", "wandb", "matplotlib", "jinja2", "pytorch_lightning"):
        assert users, f"{library} is no longer used: drop it from this test and from the requirements"


def test_interpretation_is_no_part_of_a_network() -> None:
    """The deployed net is an ordinary net, so an attacker sees its true gradients."""
    for path in (ROOT / "lightning_modules" / "networks").glob("*.py"):
        assert not top(imports(path)) & {"interpret", "defenses"}, path


def test_configs_stay_few_and_hold_no_programs() -> None:
    files = list((ROOT / "configs").rglob("*.yaml"))
    assert len([path for path in files if path.parent.name != "study"]) <= 80  # studies are records; they add up
    for path in files:
        assert not re.search(r"\beval\b(?!uate)", path.read_text(encoding="utf-8")), path


def test_the_readme_is_whole() -> None:
    """Every picture it shows exists, and no place-holder was left."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert pictures
    assert [name for name in pictures if not (ROOT / name).is_file()] == []
    assert not re.findall(r"@[A-Z]+@", text)
