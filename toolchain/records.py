"""What a JSON file must hold, written as a type, and checked before a value of it is used.

class Unit(TypedDict):
    name: Name
    macs: Annotated[int, Range(0)]
    kind: NotRequired[str | None]

class Scores(TypedDict):
    units: list[Unit]

scores = read_record(path, Scores)  # BadInput: scores.json: units[3].macs is -1; it must be at …

Keys that a type lacks may be in the file: later versions add some. A whole number must fit into 64
bits and a number must be finite, unless their limits say less.
"""

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
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
from laptop.files import read_json, shown

T = TypeVar("T")
LARGEST = 2**63  # of whole numbers
AGAIN = "Make it again."


class _Fault(NamedTuple):
    key: str  # such as units[3].macs; empty for the whole
    value: str
    needed: str


def read_record(path: Path, kind: type[T], schema: str | None = None, remedy: str = AGAIN) -> T:
    """The JSON object in `path`, which is what the `TypedDict` `kind` says.

    Raises `BadInput` for anything else, naming file, key and value.
    """
    return checked(read_json(path, schema), kind, str(path), remedy)


def checked(value: object, kind: type[T], where: str, remedy: str = AGAIN) -> T:
    """`value` if it is what the type `kind` says; else `BadInput`, which names `where` and key."""
    if fault := _fault(value, kind, ""):
        place = f"{where}: {fault.key}" if fault.key else where
        raise BadInput(f"{place} is {fault.value}; {fault.needed}. {remedy}".strip())
    return cast(T, value)


def _fault(value: object, kind: Any, key: str) -> _Fault | None:
    """What is wrong with a value, or with the first of those in it; None where all is right."""
    origin, args = get_origin(kind), get_args(kind)
    if is_typeddict(kind):
        return _fault_of_object(value, kind, key)
    if origin is Annotated:
        return _fault_of_limits(value, args[0], args[1:], key)
    if origin in (Union, UnionType):
        return _fault_of_choice(value, args, key)
    if origin in (list, tuple):
        return _fault_of_list(value, args, key)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            return _Fault(key, shown(value), "it must be a table")
        values = ((v, args[1], f"{key}[{shown(k)}]") for k, v in value.items())
        return next((fault for item in values if (fault := _fault(*item))), None)
    if origin is Literal:
        is_right = any(type(value) is type(a) and value == a for a in args)
        known = ", ".join(map(str, args))
        return None if is_right else _Fault(key, shown(value), f"known are {known}")
    return None if _is(value, kind) else _Fault(key, shown(value), f"it must be {_word(kind)}")


def _fault_of_object(value: object, kind: Any, key: str) -> _Fault | None:
    if not isinstance(value, Mapping):
        return _Fault(key, shown(value), "it must be a table")
    for name, hint in _hints(kind).items():
        at = f"{key}.{name}" if key else name
        if name in value:
            if fault := _fault(value[name], hint, at):
                return fault
        elif name in kind.__required_keys__:
            return _Fault(at, "missing", "it is needed")
    return None


def _fault_of_limits(value: object, kind: Any, limits: Any, key: str) -> _Fault | None:
    if fault := _fault(value, kind, key):
        return fault
    refusals = (limit.refusal(value) for limit in limits if value is not None)
    refusal = next((r for r in refusals if r), None)
    return _Fault(key, shown(value), refusal) if refusal else None


def _fault_of_choice(value: object, kinds: tuple[Any, ...], key: str) -> _Fault | None:
    """None if one of several types fits; else the fault of the one that comes closest."""
    faults = [_fault(value, kind, key) for kind in kinds if kind is not NoneType or value is None]
    wrong = [fault for fault in faults if fault]
    if len(wrong) < len(faults):
        return None
    closest = max(wrong, key=lambda f: (len(f.key), not f.needed.startswith("it must be a ")))
    if closest.key != key or not all(f.needed.startswith("it must be a") for f in wrong):
        return closest
    words = " or ".join(f.needed.removeprefix("it must be ") for f in wrong)
    return _Fault(key, shown(value), f"it must be {words}")


def _fault_of_list(value: object, kinds: tuple[Any, ...], key: str) -> _Fault | None:
    """Of list[X], tuple[X, ...] and tuple[X, Y], which JSON has as lists."""
    if not isinstance(value, list | tuple):
        return _Fault(key, shown(value), "it must be a list")
    if len(kinds) == 1 or kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        return _Fault(key, shown(value), f"it must be a list of {len(kinds)}")
    items = ((v, kind, f"{key}[{i}]") for i, (v, kind) in enumerate(zip(value, kinds, strict=True)))
    return next((fault for item in items if (fault := _fault(*item))), None)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of an object's keys, by name."""
    hints = get_type_hints(kind, include_extras=True)
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
