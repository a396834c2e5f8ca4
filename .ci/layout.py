"""Write the map of the modules in docs/layout.md from the first line of each module's docstring.

python .ci/layout.py [--check]
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "layout.md"
MARK = "<!-- made by .ci/layout.py from the modules' docstrings -->\n"
FOLDERS = ("pruning", "distill", "export", "benchmarks", "toolchain")  # in the order of the data


def first_line(module: Path) -> str:
    """The first line of a module's docstring, which says what it is."""
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def modules(folder: Path) -> list[Path]:
    """The modules of a folder but its __init__, and of its rooms after them."""
    own = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    rooms = sorted(path.parent for path in folder.glob("*/__init__.py"))
    return [*own, *(path for room in rooms for path in [room / "__init__.py", *modules(room)])]


def table() -> str:
    """One line a module."""
    lines = []
    for name in FOLDERS:
        lines += [f"\n## {name}/\n", f"{first_line(ROOT / name / '__init__.py')}\n"]
        for path in modules(ROOT / name):
            place = path.relative_to(ROOT / name).as_posix()
            if path.name == "__init__.py":
                lines.append(f"\n**{place.removesuffix('__init__.py')}** {first_line(path)}\n")
            else:
                lines.append(f"- `{place}`: {first_line(path)}")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with a new table below its hand-written part."""
    by_hand = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    return by_hand + MARK + table()


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/layout.md is out of date: run `python .ci/layout.py`")
