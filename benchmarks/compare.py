"""Gates between two results of the same kind: `latency_ms.p50>+10%,params>+0%,psnr_db<40`.

With a percent sign the limit is on the change from BASE to NEW, without it on the value in NEW.
Rows of any of our JSON files are matched by the fields that name them, numbers by dotted path.
"""

import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laptop.errors import BadInput
from laptop.run import read_json

NAMES = ("label", "name", "component", "runtime", "target", "kind", "a", "b")  # identify a row
CONDITIONS = (
    "conditions", "device", "precision", "steps", "guidance", "prompts", "feature_space",
    "reference", "granularity", "criterion", "samples", "seed",
)  # fmt: skip
GATE = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(<=|>=|<|>)\s*([+-]?\d+(?:\.\d+)?)\s*(%?)\s*")
OPERATORS = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge}
Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Gate:
    """What must not be: `path` `op` `limit`, of the change in percent when `is_relative`."""

    text: str
    path: str
    op: str
    limit: float
    is_relative: bool

    def is_breached(self, base: float, new: float) -> bool:
        """Also by a value that is not a number, which no limit can vouch for."""
        v = change_percent(base, new) if self.is_relative else new
        return math.isnan(v) or bool(OPERATORS[self.op](v, self.limit))


@dataclass(frozen=True)
class Change:
    """One number in both files; None where one lacks it."""

    row: str  # "label=student component=unet", empty for the document itself
    path: str
    base: float | None
    new: float | None
    breached: tuple[str, ...]  # the gates


def parse_gates(text: str) -> list[Gate]:
    """Gates from comma-separated expressions; `BadInput` names the one that is not understood."""
    gates = []
    for part in text.split(","):
        if (match := GATE.fullmatch(part)) is None:
            raise BadInput(
                f"--fail-on: {part.strip()!r} is no gate. A gate is PATH, one of < > <= >=, and a "
                "number; with % it limits the change: 'latency_ms.p50>+10%' or 'psnr_db<40'."
            )
        gates.append(Gate(part.strip(), match[1], match[2], float(match[3]), bool(match[4])))
    return gates


def change_percent(base: float, new: float) -> float:
    """From `base` to `new`; infinite from zero to anything else."""
    if base == new:
        return 0.0
    return 100 * (new - base) / abs(base) if base else math.copysign(math.inf, new)


def compare(base: Path, new: Path, fail_on: str = "") -> tuple[list[Change], list[Change]]:
    """All changes of the gated numbers (of every number without gates), and the breaches.

    A number that NEW has lost is a breach. Raises `BadInput` for a gate that concerns nothing and
    for files, rows or conditions that cannot be compared.
    """
    gates = parse_gates(fail_on) if fail_on else []
    documents = [read_json(path) for path in (base, new)]
    if len({d.get("schema") for d in documents}) > 1:
        raise BadInput(
            f"{base} is {documents[0].get('schema')}, {new} is {documents[1].get('schema')}: "
            "compare two files of one kind."
        )
    rows_base, rows_new = (rows(d) for d in documents)
    if not set(rows_base) & set(rows_new):
        raise BadInput(f"{base} and {new} have no row in common: {[*rows_base]}; {[*rows_new]}.")
    _check_conditions(rows_base, rows_new)
    changes = list(_changes(rows_base, rows_new, gates))
    _check_used(gates, rows_base)
    return changes, [change for change in changes if change.breached]


def rows(document: Mapping[str, Any]) -> Rows:
    """The named objects of a document's lists, and the document itself without its lists."""
    found: Rows = {}
    for key, value in document.items():
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            for r in value:
                found[f"{key}: " + " ".join(f"{k}={r[k]}" for k in NAMES if r.get(k))] = r
    itself = {k: v for k, v in document.items() if not isinstance(v, list) and k != "schema"}
    return ({"": itself} if itself else {}) | found


def leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Dotted path and value of each number within a row's objects."""
    for key, inner in value.items():
        if isinstance(inner, Mapping) and key not in CONDITIONS:
            yield from leaves(inner, f"{prefix}{key}.")
        elif isinstance(inner, int | float):
            yield f"{prefix}{key}", float(inner)


def _concerns(gate: Gate, path: str) -> bool:
    """`params` also means `params.after`, and `psnr_db` means `outputs.psnr_db`."""
    return f".{gate.path}." in f".{path}."


def _changes(base: Rows, new: Rows, gates: Sequence[Gate]) -> Iterator[Change]:
    for name, row in base.items():
        new_values = dict(leaves(new.get(name, {})))
        for path, value in leaves(row):
            concerned = [gate for gate in gates if _concerns(gate, path)]
            if gates and not concerned:
                continue
            now = new_values.get(path)
            breached = tuple(g.text for g in concerned if now is None or g.is_breached(value, now))
            yield Change(name, path, value, now, breached)


def _check_conditions(base: Rows, new: Rows) -> None:
    for name in set(base) & set(new):
        for key in CONDITIONS:
            before, after = base[name].get(key), new[name].get(key)
            if before != after:
                raise BadInput(
                    f"row {name!r} was made under other conditions: {key} is {before} in BASE, "
                    f"{after} in NEW. Measure both in the same way."
                )


def _check_used(gates: Sequence[Gate], base: Rows) -> None:
    known = sorted({path for row in base.values() for path, _ in leaves(row)})
    for gate in gates:
        if not any(_concerns(gate, path) for path in known):
            raise BadInput(f"gate {gate.text!r} concerns no number here. There are {known}.")
