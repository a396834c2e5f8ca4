"""Wrong values for every place of a JSON document, and the check that a reader refuses them."""

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from laptop.errors import LaptopError

GONE = object()
LONGEST = 1500  # characters of a message
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
    return {name for name, wrong in spoiled(document) if not is_refused(name, partial(read, wrong))}


def refused_in(path: Path, read: Callable[[], object], every: int = 1) -> int:
    """How many of each `every`-th spoiled form of a JSON file are refused; then it is whole again.

    An error other than a `LaptopError` is raised.
    """
    whole, refused = path.read_bytes(), 0
    for name, wrong in itertools.islice(spoiled(json.loads(whole)), 0, None, every):
        path.write_text(json.dumps(wrong))
        refused += is_refused(name, read)
    path.write_bytes(whole)
    read()
    return refused


def is_refused(name: str, read: Callable[[], object]) -> bool:
    """Whether reading the wrong value `name` ends in a message, and one of some lines at most."""
    try:
        read()
    except LaptopError as e:
        if len(str(e)) > LONGEST:
            raise AssertionError(f"{name}: the message has {len(str(e))} characters") from None
        return True
    except Exception as e:
        raise AssertionError(f"{name}: {type(e).__name__}: {e}") from e
    return False
