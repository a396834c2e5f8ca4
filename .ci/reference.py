"""Write the pages in docs/reference/, and the JSON Schema of a recipe, from the code.

python .ci/reference.py [--check]
"""

import sys
from collections.abc import Callable
from pathlib import Path

from reference_code import cli_page, python_page
from reference_data import files_page, recipe_page, schema

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "reference"
MARK = "<!-- made by .ci/reference.py -->\n\n"


def page(path: Path, text: str) -> str:
    """The page with a new part below its hand-written one."""
    by_hand = path.read_text(encoding="utf-8").partition(MARK)[0]
    return f"{by_hand}{MARK}{text.rstrip()}\n"


MADE: dict[Path, Callable[[], str]] = {
    PAGES / "cli.md": cli_page,
    PAGES / "recipe.md": recipe_page,
    PAGES / "files.md": files_page,
    PAGES / "python.md": lambda: python_page(ROOT / "toolchain" / "api.py"),
    ROOT / "toolchain" / "recipes" / "recipe.schema.json": schema,
}


def text(path: Path) -> str:
    """What a file must hold."""
    return page(path, MADE[path]()) if path.suffix == ".md" else MADE[path]()


if __name__ == "__main__":
    for path in MADE:
        if "--check" not in sys.argv:
            path.write_text(text(path), encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text(path):
            sys.exit(f"{path.relative_to(ROOT)} is out of date: run `python .ci/reference.py`")
