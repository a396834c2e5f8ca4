"""Gates between two results, or two runs: `latency_ms.p50>+10%,params>+0%,parity.psnr<40`.

With a percent sign the limit is on the change from BASE to NEW, without it on the value in NEW.
Rows of any of our JSON files are matched by the fields that name them, numbers by dotted path,
which may begin with the kind of the file (`parity.`, `bench.`) and end without the unit.
"""

import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from laptop.errors import BadInput
from laptop.files import QUOTED, read_json, shown
from laptop.models import mistakes

NAMES = ("label", "name", "component", "runtime", "target", "kind", "a", "b")  # identify a row
FILES = {"parity": "artifact", "artifacts": "file"}  # so do their paths within the folder
MEASURED = (  # what a row that is not valid says nothing of
    "latency_ms", "load_s", "peak_memory_bytes", "power_w", "energy_j", "parts_ms", "sustained",
    "median", "low", "high", "unet_ms", "without_layers",
)  # fmt: skip
CONDITIONS = (
    "conditions", "device", "precision", "steps", "guidance", "prompts", "feature_space",
    "reference", "granularity", "criterion", "samples", "seed",
)  # fmt: skip
GATE = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(<=|>=|<|>)\s*([+-]?\d+(?:\.\d+)?)\s*(%?)\s*")
UNIT = "(?:_(?:ms|s|db|w|j|bytes))?"
RESULTS = (  # of a run folder
    "plan.json", "artifacts/artifacts.json", "parity/report.json", "bench/*.json", "eval/eval.json",
)  # fmt: skip
OPERATORS = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge}
LISTED = 100  # numbers in a message
Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Gate:
    """What must not be: `path` `op` `limit`, of the change in percent when `is_relative`."""

    text: str
    path: str
    op: str
    limit: float
    is_relative: bool

    def is_breached(self, base: float | None, new: float | None) -> bool:
        """Also by a value that is lost, or not a number, which no limit can vouch for."""
        if new is None or not math.isfinite(new) or (base is None and self.is_relative):
            return True
        v = change_percent(base, new) if self.is_relative and base is not None else new
        return math.isnan(v) or bool(OPERATORS[self.op](v, self.limit))

    def concerns(self, path: str) -> bool:
        """`params` also means `params.after`; `psnr` and `parity.psnr` mean `parity.psnr_db`."""
        names = r"\.".join(re.escape(name) + UNIT for name in self.path.split("."))
        return re.search(rf"(?:^|\.){names}(?:\.|$)", path) is not None


@dataclass(frozen=True)
class Change:
    """One number in both files; None where one lacks it."""

    row: str  # "results: label=student component=unet", empty for the document itself
    path: str
    base: float | None
    new: float | None
    breached: tuple[str, ...]  # the gates
    gates: tuple[str, ...] = ()  # all that concern it


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

    Both are files of one kind, or folders of `laptop compress`, whose results are compared file by
    file. A number that NEW has lost is a breach, and so is one of a measurement that is not valid.
    Raises `BadInput` for a gate that concerns nothing and for files, rows or conditions that cannot
    be compared.
    """
    gates = parse_gates(fail_on) if fail_on else []
    changes: list[Change] = []
    known: set[str] = set()
    for name, before, after in _pairs(base, new):
        kind = kind_of(before or after)
        before_rows, after_rows = rows(before), rows(after)
        found = list(_changes(kind, before_rows, after_rows, gates))
        if found:
            _check_conditions(before_rows, after_rows)
        changes += [replace(c, row=": ".join(filter(None, (name, c.row)))) for c in found]
        known |= {path for row in before_rows.values() for path, _ in leaves(row)}
    if unused := [g for g in gates if not any(g.text in c.gates for c in changes)]:
        raise BadInput(
            f"gate {unused[0].text!r} concerns no number here. There are {_listed(known)}."
        )
    return changes, [change for change in changes if change.breached]


def _listed(names: Iterable[str]) -> str:
    """Names of numbers for a message; a file of a stranger may have any number of any length."""
    short = [name for name in sorted(names) if len(name) <= QUOTED]
    return ", ".join(short[:LISTED]) + (", …" if len(short) > LISTED else "")


def _pairs(base: Path, new: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """What to compare with what; named in a run, where NEW may lack a file."""
    for path in (base, new):
        if not path.exists():
            raise BadInput(f"{path} does not exist. Compare two files, or two runs.")
    if base.is_dir() != new.is_dir():
        raise BadInput(f"{base} and {new}: compare two files, or two folders of `laptop compress`.")
    if not base.is_dir():
        documents = read_json(base), read_json(new)
        kinds = [document.get("schema") for document in documents]
        if kinds[0] != kinds[1]:
            raise BadInput(
                f"{base} is {shown(kinds[0])}, {new} is {shown(kinds[1])}: compare two files of "
                "one kind."
            )
        found, other = map(rows, documents)
        if not set(found) & set(other):
            raise BadInput(
                f"{base} and {new} have no row in common: {shown([*found])}; {shown([*other])}."
            )
        yield "", *documents
        return
    for run in (base, new):
        if not _results(run) or (run / "model_index.json").exists():  # a model has a plan, too
            raise BadInput(mistakes.refusal(run, "run"))
    for name in dict.fromkeys((*_results(base), *_results(new))):
        before, after = (
            read_json(run / name) if (run / name).is_file() else {} for run in (base, new)
        )
        yield name, before, after


def _results(run: Path) -> list[str]:
    """The results in a run folder, as paths in it."""
    found = [path for pattern in RESULTS for path in sorted(run.glob(pattern))]
    return [str(p.relative_to(run)) for p in found if not p.name.endswith(".manifest.json")]


def kind_of(document: Mapping[str, Any]) -> str:
    """Such as `bench`, of the schema `laptop.bench/1`."""
    return str(document.get("schema")).partition("/")[0].removeprefix("laptop.")


def rows(document: Mapping[str, Any]) -> Rows:
    """The named objects of a document's lists, and the document itself without its lists.

    What makes a document not valid makes its rows so. How a device was when it was probed is no
    condition; each row has its name.
    """
    names = (*NAMES, FILES.get(kind_of(document)))
    found: Rows = {}
    for key, value in document.items():
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            for r in value:
                if document.get("valid") is False:
                    r = {**r, "valid": False}
                found[f"{key}: " + " ".join(f"{k}={r[k]}" for k in names if r.get(k))] = r
    itself = {k: v for k, v in document.items() if not isinstance(v, list) and k != "schema"}
    for key in ("device", "probe"):
        if isinstance(itself.get(key), Mapping):
            del itself[key]
    return ({"": itself} if itself else {}) | found


def leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Dotted path and value of each number within a row's objects."""
    for key, inner in value.items():
        if isinstance(inner, Mapping) and key not in CONDITIONS:
            yield from leaves(inner, f"{prefix}{key}.")
        elif isinstance(inner, int | float):
            yield f"{prefix}{key}", _float(inner)


def _float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:  # JSON may hold a whole number of hundreds of digits
        return math.inf if number > 0 else -math.inf


def _changes(kind: str, base: Rows, new: Rows, gates: Sequence[Gate]) -> Iterator[Change]:
    """Of rows and numbers that only NEW has, those that a gate on the value concerns."""
    for name in dict.fromkeys((*base, *new)):
        sides = [side.get(name, {}) for side in (base, new)]
        before, after = (dict(leaves(row)) for row in sides)
        untrusted = any(row.get("valid") is False for row in sides)
        for path in dict.fromkeys((*before, *after)):
            concerned = [gate for gate in gates if gate.concerns(f"{kind}.{path}")]
            was, now = before.get(path), after.get(path)
            if was is None:
                concerned = [gate for gate in concerned if not gate.is_relative]
            if not concerned and (gates or was is None):
                continue
            if untrusted and path.partition(".")[0] in MEASURED:
                breached = tuple(f"{gate.text} (measurement not valid)" for gate in concerned)
            else:
                breached = tuple(g.text for g in concerned if g.is_breached(was, now))
            yield Change(name, path, was, now, breached, tuple(g.text for g in concerned))


def _condition(value: Any) -> Any:
    """Without the resolution, which is not always known, and follows from the shapes."""
    if isinstance(value, Mapping):
        return {k: v for k, v in value.items() if k != "resolution"}
    return value


def _check_conditions(base: Rows, new: Rows) -> None:
    for name in set(base) & set(new):
        for key in CONDITIONS:
            before, after = (_condition(side[name].get(key)) for side in (base, new))
            if before != after:
                raise BadInput(
                    f"row {shown(name)} was made under other conditions: {key} is {shown(before)} "
                    f"in BASE, {shown(after)} in NEW. Measure both in the same way."
                )
