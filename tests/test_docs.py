"""The README and the pages of the site: what they name exists, and the README stays short."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from laptop import api

ROOT = Path(__file__).parent.parent
FOLDERS = {"laptop": "toolchain"} | {
    f"laptop.{name}": name for name in ("pruning", "distill", "export", "benchmarks")
}
HISTORY = {"log.md", "CHANGELOG.md"}  # they name what existed when they were written
PATTERNS = {"laptop.studies.NAME", "laptop.x", "laptop.json"}  # and a file of a run
PAGES = [
    path
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    if path.name not in HISTORY
]


def module_file(name: str) -> Path | None:
    """The file of a module of this package by its dotted name."""
    package = max((p for p in FOLDERS if f"{name}.".startswith(f"{p}.")), key=len)
    path = ROOT / FOLDERS[package] / Path(*name.removeprefix(package).strip(".").split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def names(module: Path) -> set[str]:
    """What a module defines at its top level."""
    found: set[str] = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def is_there(dotted: str) -> bool:
    """Whether a module, or a name in one, exists."""
    owner, _, name = dotted.rpartition(".")
    if module_file(dotted):
        return True
    return (module := module_file(owner)) is not None and name in names(module)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_module_function_and_file_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    dotted = set(re.findall(r"\blaptop(?:\.[a-z_]\w*)+(?![\w./-])", text))
    dotted |= set(re.findall(r"\blaptop\.[a-z_.]+\.[A-Z]\w+", text))
    folders = "|".join(["toolchain", "tests", "docs", ".ci", *list(FOLDERS.values())[1:]])
    files = set(
        re.findall(rf"(?<![\w./-])((?:{folders})/[\w/.-]+\.(?:py|toml|yaml|md|json))\b", text)
    )
    assert {name for name in dotted - PATTERNS if not is_there(name)} == set()
    assert {name for name in files if not (ROOT / name).exists()} == set()


def test_the_readme_has_at_most_700_words() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 700


@pytest.mark.parametrize("page", ["README.md", "docs/reference/python.md"])
def test_python_examples_call_the_functions_of_the_api_as_they_are(page: str) -> None:
    blocks = re.findall(
        r"```python\n(from laptop.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL
    )
    calls = [n for block in blocks for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Call)]
    assert calls
    for call in calls:
        keywords = {str(k.arg): None for k in call.keywords}
        inspect.signature(getattr(api, ast.unparse(call.func))).bind(*call.args, **keywords)
