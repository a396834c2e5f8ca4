"""The result of a comparison as files that CI systems read."""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from laptop.benchmarks.compare import Change, change_percent
from laptop.benchmarks.report.text import code, table, words
from laptop.errors import BadInput, OutputExists
from laptop.files import read_text, write_text

UNITS = {  # units by path of numbers that should be small
    **{f"latency_ms.{name}": "ms" for name in ("p50", "p90", "p95", "p99", "mean", "first")},
    **dict.fromkeys(("load_s.cold", "load_s.warm", "seconds"), "s"),
    **dict.fromkeys(("size_bytes", "peak_memory_bytes", "bytes"), "bytes"),
    **dict.fromkeys(("params", "params.after"), "parameters"),
    **dict.fromkeys(("macs", "macs.after"), "MACs"),
}
NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(changes: Sequence[Change]) -> str:
    """JUnit XML: a test case for each number; it fails if a gate is breached."""
    breaches = sum(bool(change.breached) for change in changes)
    counts = {"tests": str(len(changes)), "failures": str(breaches)}
    suite = ET.Element("testsuite", {"name": "laptop compare", **counts})
    for change in changes:
        row = NOT_XML.sub("\N{REPLACEMENT CHARACTER}", change.row or "document")
        names = {"classname": row, "name": NOT_XML.sub("\N{REPLACEMENT CHARACTER}", change.path)}
        case = ET.SubElement(suite, "testcase", names)
        if change.breached:
            message = f"{_shown(change.base)} -> {_shown(change.new)} ({_percent(change)})"
            failure = ET.SubElement(case, "failure", {"message": message})
            failure.text = f"breach of {', '.join(change.breached)}"
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def markdown(changes: Sequence[Change]) -> str:
    """A table for a pull request, breaches first."""
    breaches = sum(bool(change.breached) for change in changes)
    verdict = (
        f"**{breaches} of {len(changes)} numbers breach a gate.**" if breaches else "No breach."
    )
    rows = [
        [
            words(change.row or "document"),
            code(change.path),
            _shown(change.base),
            _shown(change.new),
            _percent(change),
            f"❌ {code(', '.join(change.breached))}" if change.breached else "",
        ]
        for change in sorted(changes, key=lambda change: not change.breached)
    ]
    header = ["row", "number", "base", "new", "change", "gate"]
    return f"{verdict}\n\n{table(header, rows)}\n"


def benchmark(changes: Sequence[Change]) -> str:
    """The new numbers for github-action-benchmark's tool `customSmallerIsBetter`."""
    numbers = [
        {
            "name": f"{change.row} {change.path}".strip(),
            "unit": UNITS[change.path],
            "value": change.new,
        }
        for change in changes
        if change.path in UNITS and change.new is not None and math.isfinite(change.new)
    ]
    return json.dumps(numbers, indent=1) + "\n"


def check_outputs(files: Mapping[str, Path], *inputs: Path) -> None:
    """Raise if an output would overwrite what is compared, or a file that is not ours."""
    if len({path.resolve() for path in files.values()}) < len(files):
        raise BadInput(f"--{' and --'.join(files)} name one file twice. Give each its own.")
    for form, path in files.items():
        if _is_stream(path):
            continue
        if not path.parent.is_dir():
            raise BadInput(f"--{form} {path}: No such file or directory. Make its folder first.")
        whole = path.resolve()
        if any(whole == each.resolve() or each.resolve() in whole.parents for each in inputs):
            raise BadInput(
                f"--{form} {path} is one of the compared results, or in one. Choose another."
            )
        content = read_text(path) if path.is_file() else ""
        if content and not re.match(OWN[form], content):
            raise OutputExists(
                f"{path} holds something other than --{form} writes. Choose another file."
            )


def _is_stream(path: Path) -> bool:
    """Whether a path is a stream: "-" for stdout, or one of the system's, such as /dev/stdout."""
    return str(path) == "-" or path.is_relative_to("/dev") or path.is_relative_to("/proc")


def _shown(value: float | None) -> str:
    return "gone" if value is None else f"{value:,.6g}"


def _percent(change: Change) -> str:
    if change.base is None or change.new is None:
        return ""
    return f"{change_percent(change.base, change.new):+.1f} %"


FORMS: dict[str, Callable[[Sequence[Change]], str]] = {
    "junit": junit,
    "markdown": markdown,
    "benchmark": benchmark,
}
OWN = {  # how a file of each form begins
    "junit": r"(?s)<\?xml.{,200}laptop compare",
    "markdown": r"\*\*\d+ of \d+ numbers breach|No breach\.",
    "benchmark": r'(?s)\[\s*(\{\s*"name":.*"unit":|\])',
}


def write(form: str, path: Path, changes: Sequence[Change]) -> None:
    """Write one of `FORMS`; "-" is stdout. A link to a file is replaced, not followed."""
    text = FORMS[form](changes)
    if str(path) == "-":
        sys.stdout.write(text)
    elif _is_stream(path):
        path.write_text(text, encoding="utf-8")
    else:
        write_text(path, text)
