"""Types and ranges of settings, written at each field of a config and checked when it is made.

@dataclass(frozen=True)
class TeaConfig:
    cups: Annotated[int, Range(1, 100)] = 2
    sort: Annotated[str, OneOf("green", "black")] = "green"
    shop: Name | None = None

    def __post_init__(self) -> None:
        check_fields(self, "tea")

TeaConfig(cups=0)  # BadInput: [tea] cups is 0; it must be at least 1
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Protocol, Union, get_args, get_origin, get_type_hints

from laptop.errors import BadInput
from laptop.files import shown

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
LONGEST = 4096  # characters of a text: the longest path of Linux


class Limit(Protocol):
    """A condition on a value besides its type."""

    def refusal(self, value: Any) -> str | None:
        """How the value must be instead; None where it is right."""


@dataclass(frozen=True)
class Range:
    """A number from `least` to `most`, both allowed, above `above` and below `below`."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def refusal(self, value: float) -> str | None:
        """How the number must be instead; None where it is right."""
        for holds, words, limit in (
            (value >= self.least, "at least", self.least),
            (value <= self.most, "at most", self.most),
            (value > self.above, "above", self.above),
            (value < self.below, "below", self.below),
        ):
            if not holds:
                return f"it must be {words} {limit:,}".replace(",", "_")
        return None


class OneOf:
    """One of a few texts."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def refusal(self, value: str) -> str | None:
        """The choices; None where the value is among them."""
        return None if value in self.choices else f"known are {', '.join(self.choices)}"


@dataclass(frozen=True)
class Plain:
    """A text that a file, an option or a message can hold: not empty, no control characters."""

    empty: bool = False  # may be empty

    def refusal(self, value: str) -> str | None:
        """How the text must be instead; None where it is right."""
        is_plain = all(c >= " " and not "\ud800" <= c <= "\udfff" for c in value)
        if is_plain and (value or self.empty) and len(value) <= LONGEST:
            return None
        return f"it must be a text of 1 to {LONGEST} characters without control characters"


@dataclass(frozen=True)
class Length:
    """How many items a list may have."""

    most: int
    least: int = 0

    def refusal(self, value: Collection[object]) -> str | None:
        """How long the list must be instead; None where it is right."""
        if self.least <= len(value) <= self.most:
            return None
        return f"it must have {self.least} to {self.most} items"


Name = Annotated[str, Plain()]  # free text: a path, a model, a column
Count = Annotated[int, Range(1, 10**9)]  # of things that are made or read
Samples = Annotated[int, Range(1, 1_000_000)]  # of a batch, or of what is held in memory
Steps = Annotated[int, Range(1, 1000)]  # of sampling: more than schedulers have timesteps is none
Pixels = Annotated[int, Range(8, 8192)]  # a side
Seed = Annotated[int, Range(0, 2**63 - 1)]
Seconds = Annotated[float, Range(0, 1_000_000)]  # 11 days
Share = Annotated[float, Range(0, below=1)]
Weight = Annotated[float, Range(0, 1_000_000)]


def check_fields(config: Any, table: str) -> None:
    """Raise `BadInput` unless each field of a config has its type and keeps to its limits.

    `table` is what the config is called in a recipe, for the message.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        check_value(getattr(config, field.name), hints[field.name], f"[{table}] {field.name}")


def check_value(value: object, hint: Any, where: str) -> None:
    """Raise `BadInput`, which names `where`, unless `value` is what the annotation says."""
    if get_origin(hint) is Annotated:
        kind, *limits = get_args(hint)
        check_value(value, kind, where)
        if value is None:
            return
        for limit in limits:
            if refusal := limit.refusal(value):
                raise BadInput(f"{where} is {shown(value)}; {refusal}.")
    elif get_origin(hint) in (Union, UnionType):
        (kind,) = (h for h in get_args(hint) if h is not NoneType)
        if value is not None:
            check_value(value, kind, where)
    elif get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise BadInput(f"{where} is {shown(value)}; it must be a list.")
        for item in value:
            check_value(item, get_args(hint)[0], where)
    elif get_origin(hint) is Mapping:
        if not isinstance(value, Mapping):
            raise BadInput(f"{where} is {shown(value)}; it must be a table.")
    else:
        _check_type(value, hint, where)


def _check_type(value: object, kind: type, where: str) -> None:
    kinds = (int, float) if kind is float else kind
    is_right = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
    if not is_right or (isinstance(value, float) and not math.isfinite(value)):
        word = WORDS.get(kind, "a table" if is_dataclass(kind) else kind.__name__)
        raise BadInput(f"{where} is {shown(value)}; it must be {word}.")
