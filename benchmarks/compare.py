"""Gates between two results, or two runs: `latency_ms.p50>+10%,params>+0%,parity.psnr<40`.

With a percent sign the limit is on the change from BASE to NEW, without it on the value in NEW.
Rows of any of our JSON files are matched by the fields that name them, numbers by dotted path. The
path in a gate may begin with the kind of the file (`parity.`, `bench.`) and leave out the unit.
"""

import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from laptop.errors import BadInput
from laptop.files import QUOTED, read_json, shown
from laptop.models import mistakes

NAMES = ("label", "name", "component", "runtime", "target", "kind", "a", "b")  # identify a row
FILES = {"parity": "artifact", "artifacts": "file"}  # so do paths within the folder, by kind
MEASURED = (  # numbers that cannot be trusted in a row that is not valid
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
Document = Mapping[str, object]  # any of our JSON files


@dataclass(frozen=True)
class Row:
    """A named object of a result, or the result itself without its lists."""

    numbers: Mapping[str, float]  # by dotted path
    conditions: Mapping[str, object]  # what must be the same in two results that are compared
    is_valid: bool = True  # whether its measured numbers can be trusted


Rows = dict[str, Row]
MISSING = Row({}, {})


@dataclass(frozen=True)
class Gate:
    """A breach: `path` `op` `limit`, for the change in percent if `is_relative`."""

    text: str
    path: str
    op: str
    limit: float
    is_relative: bool

    def is_breached(self, base: float | None, new: float | None) -> bool:
        """Whether the gate is breached; a value that is missing or not finite breaches any gate."""
        if new is None or not math.isfinite(new) or (base is None and self.is_relative):
            return True
        value = change_percent(base, new) if self.is_relative and base is not None else new
        return math.isnan(value) or bool(OPERATORS[self.op](value, self.limit))

    def concerns(self, path: str) -> bool:
        """Whether the gate is on a number: `params` also on `params.after`, `psnr` on `psnr_db`."""
        names = r"\.".join(re.escape(name) + UNIT for name in self.path.split("."))
        return re.search(rf"(?:^|\.){names}(?:\.|$)", path) is not None


@dataclass(frozen=True)
class Change:
    """One number in both files; None if a file lacks it."""

    row: str  # "results: label=student component=unet", empty for the document itself
    path: str
    base: float | None
    new: float | None
    breached: tuple[str, ...]  # gates
    gates: tuple[str, ...] = ()  # all that are on this number


def parse_gates(text: str) -> list[Gate]:
    """Gates from comma-separated expressions; `BadInput` quotes an expression that is no gate."""
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
    """The change from `base` to `new`; infinite from zero to anything else."""
    if base == new:
        return 0.0
    return 100 * (new - base) / abs(base) if base else math.copysign(math.inf, new)


def compare(base: Path, new: Path, fail_on: str = "") -> tuple[list[Change], list[Change]]:
    """All changes of the numbers with a gate (without gates, of every number), and the breaches.

    Both paths are files of one kind, or folders of `laptop compress`, whose results are compared
    file by file. A number that NEW lacks is a breach, and so is one of a measurement that is not
    valid. Raises `BadInput` for a gate on no number and for files, rows or conditions that cannot
    be compared.
    """
    gates = parse_gates(fail_on) if fail_on else []
    changes: list[Change] = []
    paths: set[str] = set()
    for name, before, after in _pairs(base, new):
        kind = kind_of(before or after)
        before_rows, after_rows = rows(before), rows(after)
        if own := list(_changes(kind, before_rows, after_rows, gates)):
            _check_conditions(before_rows, after_rows)
        changes += [replace(c, row=": ".join(filter(None, (name, c.row)))) for c in own]
        paths |= {path for row in before_rows.values() for path in row.numbers}
    if unused := [g for g in gates if not any(g.text in c.gates for c in changes)]:
        raise BadInput(
            f"gate {unused[0].text!r} concerns no number here. There are {_listed(paths)}."
        )
    return changes, [change for change in changes if change.breached]


def _listed(names: Iterable[str]) -> str:
    """Names of numbers for a message; a file of a stranger may have any number of any length."""
    short = [name for name in sorted(names) if len(name) <= QUOTED]
    return ", ".join(short[:LISTED]) + (", …" if len(short) > LISTED else "")


def _pairs(base: Path, new: Path) -> Iterator[tuple[str, Document, Document]]:
    """The pairs of results to compare; in a run with their name, and empty where one lacks it."""
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
        names, other = map(rows, documents)
        if not names.keys() & other.keys():
            raise BadInput(
                f"{base} and {new} have no row in common: {shown([*names])}; {shown([*other])}."
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
    paths = [path for pattern in RESULTS for path in sorted(run.glob(pattern))]
    return [str(p.relative_to(run)) for p in paths if not p.name.endswith(".manifest.json")]


def kind_of(document: Document) -> str:
    """The kind of a result, such as `bench` for the schema `laptop.bench/1`."""
    return str(document.get("schema")).partition("/")[0].removeprefix("laptop.")


def rows(document: Document) -> Rows:
    """The named objects of a document's lists, and under "" the document itself without its lists.

    If the document is not valid, none of its rows is. The state of a device when it was probed is
    no condition; each row has the device's name.
    """
    names = (*NAMES, FILES.get(kind_of(document)))
    itself = {
        key: value
        for key, value in document.items()
        if not isinstance(value, list)
        and key != "schema"
        and not (key in ("device", "probe") and isinstance(value, Mapping))
    }
    objects = {"": itself} if itself else {}
    for key, value in document.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for item in value:
                if document.get("valid") is False:
                    item = {**item, "valid": False}
                title = " ".join(f"{name}={item[name]}" for name in names if item.get(name))
                objects[f"{key}: {title}"] = item
    return {
        name: Row(
            dict(leaves(item)),
            {key: _condition(item.get(key)) for key in CONDITIONS},
            item.get("valid") is not False,
        )
        for name, item in objects.items()
    }


def leaves(value: Document, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Dotted path and value of each number in an object and the objects inside of it."""
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
    """Compare every number of two results; if there are gates, those with a gate.

    A number that only NEW has counts only if a gate on the value, not on the change, is on it.
    """
    for name in dict.fromkeys((*base, *new)):
        before, after = base.get(name, MISSING), new.get(name, MISSING)
        for path in dict.fromkeys((*before.numbers, *after.numbers)):
            old, value = before.numbers.get(path), after.numbers.get(path)
            own = [gate for gate in gates if gate.concerns(f"{kind}.{path}")]
            if old is None:
                own = [gate for gate in own if not gate.is_relative]
            if not own and (gates or old is None):
                continue
            is_measured = path.partition(".")[0] in MEASURED
            if is_measured and not (before.is_valid and after.is_valid):
                breached = tuple(f"{gate.text} (measurement not valid)" for gate in own)
            else:
                breached = tuple(gate.text for gate in own if gate.is_breached(old, value))
            yield Change(name, path, old, value, breached, tuple(gate.text for gate in own))


def _condition(value: object) -> object:
    """A condition without the resolution, which not every file has, and follows from the shapes."""
    if isinstance(value, Mapping):
        return {k: v for k, v in value.items() if k != "resolution"}
    return value


def _check_conditions(base: Rows, new: Rows) -> None:
    for name in base.keys() & new.keys():
        for key, before in base[name].conditions.items():
            if before != (after := new[name].conditions[key]):
                raise BadInput(
                    f"row {shown(name)} was made under other conditions: {key} is {shown(before)} "
                    f"in BASE, {shown(after)} in NEW. Measure both in the same way."
                )
