"""Numbers and foreign text in the Markdown of a report."""

import re
from collections.abc import Sequence

DASH = "—"


def number(value: float | None, unit: str = "", digits: int = 3) -> str:
    """A number to significant digits, if possible without an exponent; a dash for None."""
    if value is None:
        return DASH
    text = f"{value:.{digits}g}"
    if "e" in text and 1e-4 <= abs(value) < 1e6:
        text = f"{value:.0f}"
    return f"{text} {unit}".strip()


def scaled(value: float | None, unit: str = "") -> str:
    """A number with k, M or G: 3,524,900 -> 3.52 M; a dash for None."""
    if value is None:
        return DASH
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return number(value / factor, prefix + unit)
    return number(value, unit)


def percent(portion: float | None) -> str:
    """A number from 0 to 1 as a percentage, or a dash."""
    return DASH if portion is None else f"{100 * portion:.1f} %"


def words(text: object) -> str:
    """Foreign text, escaped so that no character of it is Markdown."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>#|&!~" else c for c in _line(text))


def code(text: object) -> str:
    """Text in code type, safe in a table's cell."""
    return f"`{_line(text).replace('`', chr(39)).replace('|', chr(92) + '|') or ' '}`"


def block(text: str, language: str) -> str:
    """Foreign text as a block of code, whose fence is longer than any in the text."""
    text = "\n".join(_line(line) for line in text.split("\n"))
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _line(text: object) -> str:
    """Foreign text in one line, without invisible characters and those that reverse the text."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns are aligned to the left."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
