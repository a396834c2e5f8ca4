"""JSON files as frozen dataclasses, whose types and limits are checked before a value is used.

@dataclass(frozen=True, kw_only=True)
class Unit(Record):
    name: Name
    macs: Annotated[int, Range(0)]
    kind: str | None = None

@dataclass(frozen=True, kw_only=True)
class Scores(Record):
    SCHEMA = "laptop.scores/1"
    units: tuple[Unit, ...]

scores = Scores.read(path)  # BadInput: scores.json: units[3].macs is -1; it must be at …
scores.units[3].macs
scores.write(path)

Keys that a record lacks may be in the file: later versions add some. A whole number must fit into
64 bits and a number must be finite, unless their limits say less. What others write, such as a
model's config.json, may be a `TypedDict` that `read_record` checks.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    NotRequired,
    Self,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from laptop.errors import BadInput
from laptop.fields import WORDS
from laptop.files import read_json, reason, shown, whole_lines, write_json

T = TypeVar("T")
LARGEST = 2**63  # of whole numbers
MAPPINGS = (dict, Mapping)


class _MayBeInfinite:
    """A number that may be infinite; NaN may not."""

    def refusal(self, value: object) -> str | None:
        """How the value must be instead; None where it is right."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if is_number and value == value else "it must be a number"


if TYPE_CHECKING:
    MayBeInfinite = float
else:
    MayBeInfinite = Annotated[object, _MayBeInfinite()]
AGAIN = "Make it again."
UNFINISHED = "The unfinished work is damaged: pass --overwrite to begin again."


@dataclasses.dataclass(frozen=True)
class Record:
    """A JSON object of ours: a file with its schema, or a part of one."""

    SCHEMA: ClassVar[str] = ""
    REMEDY: ClassVar[str] = AGAIN  # the end of a message about a file that is not right
    LEFT_OUT: ClassVar[frozenset[str]] = frozenset()  # keys that a file lacks in place of a null

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record in `path`; `BadInput` for a file that holds something else."""
        return built(read_json(path, cls.SCHEMA), cls, str(path), cls.REMEDY)

    def write(self, path: Path) -> None:
        """Write the record as JSON, whole or not at all."""
        write_json(path, self.as_json())

    def as_json(self) -> dict[str, object]:
        """What the file holds: the schema, and every field as JSON has it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        kept = {k: _plain(v) for k, v in values.items() if v is not None or k not in self.LEFT_OUT}
        return {"schema": self.SCHEMA, **kept} if self.SCHEMA else kept


def _plain(value: object) -> object:
    """A field's value as JSON has it."""
    if isinstance(value, Record):
        return value.as_json()
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


class _Fault(NamedTuple):
    key: str  # such as .units[3].macs, empty for the whole
    value: str
    needed: str


def read_record(path: Path, kind: type[T], schema: str | None = None, remedy: str = AGAIN) -> T:
    """The JSON object in `path`, which is what the `TypedDict` `kind` says.

    Raises `BadInput` for anything else, naming file, key and value.
    """
    return checked(read_json(path, schema), kind, str(path), remedy)


def built(value: object, kind: type[T], where: str, remedy: str = AGAIN) -> T:
    """The dataclass `kind`, and those in it, made of the mapping `value`; else `BadInput`.

    `where` names the mapping in a message. Keys that a dataclass lacks are left out.
    """
    return cast(T, _built(checked(value, kind, where, remedy), kind))


def _dataclass(value: Mapping[str, Any], kind: Any) -> object:
    hints = _hints(kind)
    return kind(**{k: _built(value[k], hint) for k, hint in hints.items() if k in value})


def _built(value: Any, kind: Any) -> object:
    """A checked value with dataclasses in place of tables, and tuples in place of lists."""
    origin, args = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(value, kind)
    if origin is Annotated:
        return _built(value, args[0])
    if origin in (Union, UnionType):
        return _built(value, next(part for part in args if not _fault(value, part)))
    if origin is tuple:
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        return tuple(map(_built, value, kinds))
    if origin is list:
        return [_built(part, args[0]) for part in value]
    return {k: _built(part, args[1]) for k, part in value.items()} if origin in MAPPINGS else value


def read_lines(path: Path, kind: type[T]) -> list[T]:
    """The JSON values in the whole lines of unfinished work, each of which is what `kind` says."""
    try:
        values = [json.loads(line) for line in whole_lines(path)]
    except (ValueError, RecursionError) as e:
        raise BadInput(
            f"{path} holds a line that is not JSON ({reason(e)}). {UNFINISHED}"
        ) from None
    return [built(value, kind, f"{path}: [{i}]", UNFINISHED) for i, value in enumerate(values)]


def checked(value: object, kind: type[T], where: str, remedy: str = AGAIN) -> T:
    """`value` if it is what the type `kind` says; else `BadInput`, which names `where` and key."""
    if fault := _fault(value, kind):
        place = f"{where}: {fault.key.lstrip('.')}" if fault.key else where
        raise BadInput(f"{place} is {fault.value}; {fault.needed}. {remedy}".strip())
    return cast(T, value)


def _fault(value: object, kind: Any) -> _Fault | None:
    """What is wrong with a value, or with the first of those in it; None where all is right."""
    origin, args = get_origin(kind), get_args(kind)
    if is_typeddict(kind) or dataclasses.is_dataclass(kind):
        return _fault_of_object(value, kind)
    if origin is Annotated:
        return _fault_of_limits(value, args[0], args[1:])
    if origin in (Union, UnionType):
        return _fault_of_choice(value, args)
    if origin in (list, tuple):
        return _fault_of_list(value, args)
    if origin in MAPPINGS:
        return _fault_of_mapping(value, args[1])
    if origin is Literal:
        is_right = any(type(value) is type(a) and value == a for a in args)
        known = ", ".join(map(str, args))
        return None if is_right else _Fault("", shown(value), f"known are {known}")
    return None if _is(value, kind) else _Fault("", shown(value), f"it must be {_word(kind)}")


def _within(place: str, fault: _Fault) -> _Fault:
    """A fault inside the value at `place`, as its owner names it."""
    return fault._replace(key=place + fault.key)


def _fault_of_object(value: object, kind: Any) -> _Fault | None:
    if not isinstance(value, Mapping):
        return _Fault("", shown(value), "it must be a table")
    for name, hint in _hints(kind).items():
        if name in value:
            if fault := _fault(value[name], hint):
                return _within(f".{name}", fault)
        elif name in _required(kind):
            return _Fault(f".{name}", "missing", "it is needed")
    return None


def _fault_of_mapping(value: object, kind: Any) -> _Fault | None:
    if not isinstance(value, Mapping):
        return _Fault("", shown(value), "it must be a table")
    for name, part in value.items():
        if fault := _fault(part, kind):
            return _within(f"[{shown(name)}]", fault)
    return None


def _fault_of_list(value: object, kinds: tuple[Any, ...]) -> _Fault | None:
    """What is wrong in a list[X], tuple[X, ...] or tuple[X, Y], which JSON has as lists."""
    if not isinstance(value, list | tuple):
        return _Fault("", shown(value), "it must be a list")
    if kinds[0] is Any:
        return None
    if len(kinds) == 1 or kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        return _Fault("", shown(value), f"it must be a list of {len(kinds)}")
    for i, (part, kind) in enumerate(zip(value, kinds, strict=True)):
        if fault := _fault(part, kind):
            return _within(f"[{i}]", fault)
    return None


def _fault_of_limits(value: object, kind: Any, limits: Any) -> _Fault | None:
    if fault := _fault(value, kind):
        return fault
    refusals = (limit.refusal(value) for limit in limits if value is not None)
    refusal = next((r for r in refusals if r), None)
    return _Fault("", shown(value), refusal) if refusal else None


def _fault_of_choice(value: object, kinds: tuple[Any, ...]) -> _Fault | None:
    """None if one of several types fits; else the fault that is deepest, or in other words all."""
    faults = [_fault(value, kind) for kind in kinds if kind is not NoneType or value is None]
    wrong = [fault for fault in faults if fault]
    if len(wrong) < len(faults):
        return None
    of_kind = [f for f in wrong if not f.key and f.needed.startswith("it must be a ")]
    if other := [f for f in wrong if f not in of_kind]:  # of the right kind, and wrong all the same
        return max(other, key=lambda f: len(f.key))
    words = " or ".join(f.needed.removeprefix("it must be ") for f in of_kind)
    return _Fault("", shown(value), f"it must be {words}")


@cache
def _required(kind: Any) -> frozenset[str]:
    """The keys that a `TypedDict` must have, or the fields of a dataclass without a default."""
    if is_typeddict(kind):
        return frozenset(kind.__required_keys__)
    missing = dataclasses.MISSING
    return frozenset(
        f.name
        for f in dataclasses.fields(kind)
        if f.default is missing and f.default_factory is missing
    )


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of an object's keys, by name."""
    hints = get_type_hints(kind, include_extras=True)
    if dataclasses.is_dataclass(kind):
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return {k: get_args(h)[0] if get_origin(h) is NotRequired else h for k, h in hints.items()}


def _is(value: object, kind: Any) -> bool:
    if kind in (Any, object):
        return True
    if kind is float and isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= LARGEST
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return False
    if isinstance(value, int):
        return -LARGEST <= value < LARGEST
    return not isinstance(value, float) or math.isfinite(value)


def _word(kind: Any) -> str:
    if kind is NoneType:
        return "a null"
    return WORDS.get(kind, {dict: "a table", list: "a list"}.get(kind, str(kind)))
