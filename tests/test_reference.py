"""The reference pages and the JSON Schema of a recipe say what the code says."""

import importlib
import json
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from laptop.recipe import FOLDER, Recipe

ROOT = Path(__file__).parent.parent


sys.path.insert(0, str(ROOT / ".ci"))
reference = importlib.import_module("reference")
data = importlib.import_module("reference_data")


@pytest.mark.parametrize("path", reference.MADE, ids=lambda path: path.name)
def test_a_reference_page_is_the_one_made_from_the_code(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == reference.text(path), "run .ci/reference.py"


def test_every_setting_says_what_it_means() -> None:
    settings = [
        (table, name, comment)
        for table, config in data.tables(Recipe())
        for name, _, comment in data.settings(type(config))
        if not hasattr(getattr(config, name), "__dataclass_fields__")
    ]
    assert len(settings) > 100
    assert [s for s in settings if not s[2]] == []


def test_the_schema_knows_every_key_of_the_shipped_recipes() -> None:
    schema = json.loads((FOLDER / "recipe.schema.json").read_text(encoding="utf-8"))

    def check(table: Mapping[str, Any], properties: Mapping[str, Any]) -> None:
        assert table.keys() <= properties.keys()
        for key, value in table.items():
            if isinstance(value, dict) and key != "smoke":
                check(value, properties[key]["properties"])

    for path in FOLDER.glob("*.toml"):
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
        check(recipe, schema["properties"])
        check(recipe.get("smoke", {}), schema["properties"])


def test_every_schema_stands_on_the_page_of_files() -> None:
    folders = ("toolchain", "pruning", "distill", "export", "benchmarks")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    schema = re.compile(r'"(laptop\.[a-z.-]+/1)"')
    written = {name for path in sources for name in schema.findall(path.read_text("utf-8"))}
    page = (ROOT / "docs" / "reference" / "files.md").read_text(encoding="utf-8")
    assert {name for name in written if f"`{name}`" not in page} == set()
