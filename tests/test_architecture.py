"""The house rules of imports, read from the source: who may know whom."""

from __future__ import annotations

import ast
import functools
import re
from importlib import import_module
from pathlib import Path

import pytest

from glassarmor.lightning_modules.run.saved_config import named_targets

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("interpret", "defenses", "datamodules", "lightning_modules")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Full dotted names of all modules a file imports, wherever in the file; of a package, what is taken from it."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if _is_module(inner) else node.module or "")
    return frozenset(found)


def _is_module(name: str) -> bool:
    place = ROOT / name.removeprefix("glassarmor.").replace(".", "/")
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def top(names: frozenset[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Each wing may import what stands below it; wings in one row are apart from each other.
FLOORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "interpret": (
        ("views.panels", "views.page"),
        ("views.draw",),
        ("views",),
        ("profiles", "concepts"),
        ("signals",),
        ("observation",),
        ("network",),
        ("inputs",),
        ("modes", "storage", "statistics"),
    ),
    "defenses": (
        ("monitoring", "evaluation", "masking"),
        ("training",),
        ("attacks",),
        ("losses", "threat"),
        ("options",),
    ),
    "lightning_modules": (
        ("commands",),
        ("cards", "study", "callbacks"),
        ("run", "networks", "classifier"),
        ("selection", "schedules", "randomness", "learning"),
    ),
    "datamodules": (("",),),
}


def wing(name: str) -> tuple[str, str]:
    """Room and wing of a dotted name below glassarmor: "interpret", "views.panels"."""
    room, *inner = name.removeprefix("glassarmor.").split(".")
    known = {each for floor in FLOORS[room] for each in floor}
    deep = ".".join(inner[:2])
    return room, deep if deep in known else (inner[0] if inner and inner[0] in known else "")


@pytest.mark.parametrize("path", FILES, ids=where)
def test_rooms_and_wings_know_only_what_lies_below(path: Path) -> None:
    room, own = wing("glassarmor." + where(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    below = {
        "interpret": {"interpret"},
        "defenses": {"defenses", "interpret"},
        "datamodules": {"datamodules"},
        "lightning_modules": {"lightning_modules", "defenses", "interpret"},
    }[room]
    if own == "commands":
        below = {*below, "datamodules"}
    floor = {name: i for i, names in enumerate(FLOORS[room]) for name in names}
    for name in (n for n in imports(path) if n.startswith("glassarmor.")):
        theirs, inside = wing(name)
        assert theirs in below, name
        if room == "defenses":
            assert not name.startswith("glassarmor.interpret.views"), f"{name}: what draws stands above"
        if theirs == room and own and inside and own != inside:
            assert floor[inside] > floor[own] or path.name == "__init__.py", name


def test_everything_is_called_by_one_name() -> None:
    """A bare ``import defenses`` would make every class a second time."""
    for path in (ROOT / folder for folder in (*ROOMS, "tests", "benchmarks", "docs", "glassarmor")):
        for file in path.rglob("*.py"):
            assert not top(imports(file)) & {*ROOMS, "configs", "train", "evaluate", "compare"}, file


def test_no_private_name_crosses_files() -> None:
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("glassarmor."):
                assert [alias.name for alias in node.names if alias.name.startswith("_")] == [], where(path)


def test_functions_are_short_and_doors_thin() -> None:
    for path in (*FILES, *sorted((ROOT / "benchmarks").rglob("*.py"))):
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                allowed = 60 if "/commands/" in where(path) else 80
                assert lines <= allowed, f"{where(path)}: {node.name} has {lines} lines"
    for door in ("train.py", "evaluate.py", "compare.py"):
        assert len((ROOT / door).read_text(encoding="utf-8").splitlines()) <= 80


def test_yaml_names_public_faces() -> None:
    for name in sorted(named_targets()):
        if name.startswith("glassarmor."):
            face, _, what = name.rpartition(".")
            assert what in import_module(face).__all__, f"{name}: {face} does not show it"


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("captum", lambda p: p == "interpret/signals/captum_bridge.py"),
        ("wandb", lambda p: p == "lightning_modules/run/log.py"),
        (
            "matplotlib",
            lambda p: p.startswith("interpret/views/draw/") or p == "interpret/views/view.py",
        ),  # the figure's type
        ("jinja2", lambda p: p.startswith("interpret/views/page/")),
        ("pytorch_lightning", lambda p: p.startswith(("datamodules/", "lightning_modules/"))),
        ("pyautoattack", lambda p: p == "defenses/attacks/autoattack.py"),
        ("lightning", lambda p: False),
        ("hydra", lambda p: p.startswith("lightning_modules/commands/")),
        ("omegaconf", lambda p: p.startswith("lightning_modules/commands/")),
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
        assert not [name for name in imports(path) if name.startswith(("glassarmor.interpret", "glassarmor.defenses"))], path


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
