"""Words of the code: names say what a thing is, docstrings read alone, a class name occurs once."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("toolchain", "pruning", "distill", "export", "benchmarks", ".ci")
# Names that name nothing; a value that lives for three lines at most may have one.
EMPTY_NAMES = {"found", "given", "made", "known", "which", "there", "one", "told", "how"}
MOST_LINES = 3
HANGING = {  # first words of docstrings that lean on the line above
    *("that", "those", "of", "as", "its", "their", "them", "likewise", "ditto"),
    *("such", "for", "and", "or", "with", "to"),
}
HANGING_PAIRS = {("the", "same"), ("the", "other"), ("the", "rest")}


@cache
def trees() -> dict[Path, ast.Module]:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def nodes(*kinds: type[ast.AST]) -> Iterator[tuple[Path, ast.AST]]:
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                yield path, node


def bound(function: ast.FunctionDef) -> Iterator[tuple[str, int, int]]:
    """Each name that a function binds, with its first and last line."""
    arguments = [*function.args.args, *function.args.kwonlyargs, *function.args.posonlyargs]
    names = [n for n in ast.walk(function) if isinstance(n, ast.Name)]
    stores = {a.arg for a in arguments} | {n.id for n in names if isinstance(n.ctx, ast.Store)}
    for name in stores:
        lines = [n.lineno for n in names if n.id == name]
        lines += [a.lineno for a in arguments if a.arg == name]
        yield name, min(lines), max(lines)


def test_a_value_that_lives_longer_than_three_lines_has_a_name_that_says_what_it_is() -> None:
    empty = [
        f"{path.relative_to(ROOT)}:{first} {name}"
        for path, node in nodes(ast.FunctionDef)
        for name, first, last in bound(node)
        if name in EMPTY_NAMES and last - first >= MOST_LINES
    ]
    assert empty == []


def test_a_docstring_reads_alone() -> None:
    hanging = []
    for path, node in nodes(ast.FunctionDef, ast.ClassDef, ast.Module):
        text = ast.get_docstring(node)
        if text is None:
            continue
        words = [word.strip(".,:;'`\"").lower() for word in text.split()[:2]]
        if not words or words[0] in HANGING or tuple(words) in HANGING_PAIRS:
            hanging.append(f"{path.relative_to(ROOT)}:{node.body[0].lineno} {text.splitlines()[0]}")
    assert hanging == []


def test_a_public_class_name_occurs_once() -> None:
    names = Counter(n.name for _, n in nodes(ast.ClassDef) if not n.name.startswith("_"))
    assert [name for name, count in names.items() if count > 1] == []


def test_untyped_values_stay_at_the_edges_of_libraries() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in trees())
    tables = text.count("dict[str, Any]")
    assert tables <= 60
    assert len(re.findall(r"\bAny\b", text)) - tables <= 140
