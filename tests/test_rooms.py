"""The direction of imports, those inside functions counted: no circle, and no arrow that runs back.

floor, models, hosts <- pruning <- distill <- export <- benchmarks <- the rest of toolchain
"""

import ast
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("pruning", "distill", "export", "benchmarks")  # each may import those before it
FLOOR = {
    *("console", "contents", "errors", "fields", "files", "machine", "processes"),
    *("parallel_stage", "records", "run", "unfinished", "models", "hosts"),
}
LARGEST_ROOM = 25  # modules


@cache
def modules() -> dict[str, Path]:
    """The modules of this package by name."""
    folders = {"toolchain": "laptop"} | {stage: f"laptop.{stage}" for stage in STAGES}
    paths = {}
    for folder, package in folders.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            paths[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return paths


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of this package that one of them imports."""
    targets = set()
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            targets |= {name if name in modules() else str(node.module) for name in names}
    return frozenset(name for name in targets & modules().keys() if name != module)


def room(module: str) -> str:
    """The first name below the package: a stage, a room of toolchain, or a module there."""
    return module.split(".")[1] if "." in module else ""


def in_room(name: str) -> list[str]:
    members = [module for module in modules() if room(module) == name]
    assert members, f"there is no {name}"
    return members


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_only_the_floor_and_the_stages_before_it(stage: str) -> None:
    allowed = FLOOR | {*STAGES[: STAGES.index(stage) + 1]}
    for module in in_room(stage):
        assert {room(name) for name in imports(module)} <= allowed, module


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_the_floor_stands_on_the_floor(name: str) -> None:
    for module in in_room(name):
        assert {room(other) for other in imports(module)} <= FLOOR, module


def test_the_embedded_model_needs_no_stage() -> None:
    for module in in_room("tiny"):
        assert {room(name) for name in imports(module)} <= FLOOR | {"tiny"}, module


def test_the_shipped_class_file_needs_nothing_of_this_package() -> None:
    assert imports("laptop.models.laptop_unet_v1") == frozenset()


def test_nobody_imports_the_command_line_or_a_study() -> None:
    for module in modules():
        ends = {room(name) for name in imports(module)} & {"cli", "studies"} - {room(module)}
        assert not ends or module == "laptop.__main__", module


def test_no_imports_go_in_circles() -> None:
    left = {module: set(imports(module)) for module in modules()}
    while free := {module for module, needed in left.items() if not needed & left.keys()}:
        left = {module: needed for module, needed in left.items() if module not in free}
    assert sorted(left) == []


def test_no_room_is_crowded() -> None:
    folders = [path.parent for path in modules().values()]
    crowded = {str(f): n for f in {*folders} if (n := folders.count(f)) > LARGEST_ROOM}
    assert crowded == {}


def test_every_folder_of_modules_is_a_package_of_the_wheel() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    rooms = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert rooms <= {*packages}


def test_the_map_of_the_modules_is_that_of_the_docstrings() -> None:
    subprocess.run([sys.executable, str(ROOT / ".ci" / "layout.py"), "--check"], check=True)


def test_the_glossary_has_each_word_once() -> None:
    text = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    words = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert 25 < len(words) == len(set(words))
