"""Wrong values for every place of a JSON document, and the check that a reader refuses them."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

from laptop.errors import LaptopError

GONE = object()
VALUES = (
    *(GONE, None, True, -1, 0, 0.5, math.nan, math.inf, -1e308, 10**30, 10**400),
    *("", "x", "../../../etc/passwd", "a\0b", "\udc80", "x" * 5000),
    *([], [1], [None], [[[]]], ["x"] * 3, {}, {"a": 1}),
)


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of a document; of a list, those in its first item."""
    first = list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, part in value.items() if isinstance(value, dict) else first:
        yield (*at, key)
        yield from paths(part, (*at, key))


def spoiled(document: Any) -> Iterator[tuple[str, Any]]:
    """Every place with every wrong value in turn, by name."""
    for at in paths(document):
        for value in VALUES:
            wrong = copy.deepcopy(document)
            place = wrong
            for key in at[:-1]:
                place = place[key]
            if value is GONE:
                del place[at[-1]]
            else:
                place[at[-1]] = copy.deepcopy(value)
            word = "nothing" if value is GONE else repr(value)[:40] if value != 10**400 else "1e400"
            yield f"{'.'.join(map(str, at))} = {word}", wrong


def accepted(document: Any, read: Callable[[Any], object]) -> set[str]:
    """What a reader of spoiled documents takes; an error other than a `LaptopError` is raised."""
    taken = set()
    for name, wrong in spoiled(document):
        try:
            read(wrong)
        except LaptopError as e:
            if len(str(e)) > 1500:
                raise AssertionError(f"{name}: the message has {len(str(e))} characters") from None
        except Exception as e:
            raise AssertionError(f"{name}: {type(e).__name__}: {e}") from e
        else:
            taken.add(name)
    return taken
