"""A JSON file is checked against a type before a value of it is used; the message names the key."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from laptop.errors import BadInput
from laptop.fields import Name, OneOf, Range
from laptop.records import Record, checked, read_record


class Cup(TypedDict):
    size_ml: Annotated[int, Range(1, 1000)]
    lid: NotRequired[bool | None]


class Tea(TypedDict):
    sort: Annotated[str, OneOf("green", "black")]
    cups: list[Cup]
    grams: float
    shops: NotRequired[dict[str, Name]]
    minutes: NotRequired[int | list[int]]
    size: NotRequired[tuple[int, int]]
    version: NotRequired[Literal[1, 2]]


TEA: dict[str, Any] = {"sort": "green", "cups": [{"size_ml": 200}], "grams": 2}


def test_a_right_file_is_read_with_keys_that_the_type_lacks(tmp_path: Path) -> None:
    more = {"shops": {"a": "b"}, "minutes": [3, 4], "size": [1, 2], "version": 2, "note": [None]}
    (tmp_path / "tea.json").write_text(json.dumps(TEA | more))
    assert read_record(tmp_path / "tea.json", Tea) == TEA | more
    assert checked(TEA | {"minutes": 3, "cups": [{"size_ml": 1, "lid": None}]}, Tea, "tea")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sort": "red"}, "tea.json: sort is 'red'; known are green, black. Make it again."),
        ({"cups": None}, "cups is None; it must be a list"),
        ({"cups": [{"size_ml": 1}, {"size_ml": 0}]}, "cups[1].size_ml is 0; it must be at least 1"),
        ({"cups": [{}]}, "cups[0].size_ml is missing; it is needed"),
        ({"cups": [[]]}, "cups[0] is []; it must be a table"),
        ({"cups": [{"size_ml": True}]}, "cups[0].size_ml is True; it must be a whole number"),
        ({"cups": [{"size_ml": 1, "lid": 1}]}, "lid is 1; it must be true or false"),
        ({"grams": math.nan}, "grams is nan; it must be a number"),
        ({"grams": 10**400}, "it must be a number"),
        ({"grams": "2"}, "grams is '2'; it must be a number"),
        ({"shops": {"a": "b\0"}}, r"shops['a'] is 'b\x00'; it must be a text of"),
        ({"minutes": "x"}, "minutes is 'x'; it must be a whole number or a list"),
        ({"minutes": [3, "x"]}, "minutes[1] is 'x'; it must be a whole number"),
        ({"minutes": 10**30}, "minutes is 1000"),
        ({"size": [1]}, "size is [1]; it must be a list of 2"),
        ({"version": True}, "version is True; known are 1, 2"),
        ({"sort": "x" * 9999}, f"sort is '{'x' * 200}…'; known"),
    ],
)
def test_a_wrong_value_is_named_by_file_and_key(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        checked(TEA | wrong, Tea, "tea.json")


@dataclass(frozen=True, kw_only=True)
class Leaf(Record):
    name: Name
    grams: Annotated[float, Range(0)] | None = None


@dataclass(frozen=True, kw_only=True)
class Blend(Record):
    SCHEMA = "laptop.blend/1"
    LEFT_OUT = frozenset({"best"})

    leaves: tuple[Leaf, ...]
    by_shop: Mapping[str, Leaf]
    best: Leaf | None = None
    size: tuple[int, int] = (1, 2)
    price: float | None = None


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    blend = Blend(leaves=(Leaf(name="a", grams=2), Leaf(name="b")), by_shop={"x": Leaf(name="c")})
    blend.write(tmp_path / "blend.json")
    content = json.loads((tmp_path / "blend.json").read_text())
    assert content["schema"] == "laptop.blend/1"
    assert content["leaves"][1] == {"name": "b", "grams": None}
    assert content["price"] is None
    assert "best" not in content
    assert Blend.read(tmp_path / "blend.json") == blend


def test_a_record_takes_files_of_earlier_and_of_later_versions(tmp_path: Path) -> None:
    path = tmp_path / "blend.json"
    later = {"leaves": [{"name": "a", "colour": 3}], "by_shop": {}, "best": {"name": "b"}, "new": 1}
    path.write_text(json.dumps({"schema": "laptop.blend/1", **later}))
    assert Blend.read(path) == Blend(leaves=(Leaf(name="a"),), by_shop={}, best=Leaf(name="b"))


def test_a_fault_deep_in_a_record_is_named_by_its_key(tmp_path: Path) -> None:
    path = tmp_path / "blend.json"
    blend = {"schema": "laptop.blend/1", "leaves": [{"name": "a", "grams": -1}], "by_shop": {}}
    path.write_text(json.dumps(blend))
    with pytest.raises(BadInput, match=r"blend.json: leaves\[0\].grams is -1; it must be at least"):
        Blend.read(path)
