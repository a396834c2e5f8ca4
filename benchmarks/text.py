"""Numbers and foreign text as the report's Markdown shows them."""

from collections.abc import Sequence

DASH = "—"


def number(value: float | None, unit: str = "", digits: int = 3) -> str:
    """To significant digits, without an exponent where it is short; a dash for None."""
    if value is None:
        return DASH
    text = f"{value:.{digits}g}"
    if "e" in text and 1e-4 <= abs(value) < 1e6:
        text = f"{value:.0f}"
    return f"{text} {unit}".strip()


def scaled(value: float | None, unit: str = "") -> str:
    """With k, M or G: 3,524,900 -> 3.52 M."""
    if value is None:
        return DASH
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return number(value / factor, prefix + unit)
    return number(value, unit)


def share(value: float | None) -> str:
    """A share as a percentage, or a dash."""
    return DASH if value is None else f"{100 * value:.1f} %"


def words(text: object) -> str:
    """Foreign text with nothing left that Markdown would obey."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>#|&!~" else c for c in str(text)).replace("\n", " ")


def code(text: object) -> str:
    """Text in code type, safe in a table's cell."""
    return f"`{str(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, as are all."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
