"""The reference pages of recipes and of files, and the JSON Schema of a recipe."""

import ast
import importlib
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeGuard,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from reference_code import table

from laptop.fields import Length, OneOf, Plain, Range
from laptop.recipe import Recipe
from laptop.records import Record

ROOT = Path(__file__).parent.parent
PACKAGES = {"toolchain": "laptop"} | {
    name: f"laptop.{name}" for name in ("pruning", "distill", "export", "benchmarks")
}
WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def recipe_page() -> str:
    """Every setting of a run: table, key, default, type and meaning."""
    text = ""
    for name_of_table, config in tables(Recipe()):
        rows = []
        for name, hint, comment in settings(type(config)):
            if not is_dataclass(default := getattr(config, name)):
                rows.append((f"`{name}`", _toml(default), _words(hint), comment))
        heading = f"## [{name_of_table}]" if name_of_table else "## Outside of all tables"
        text += f"{heading}\n\n{table(('key', 'default', 'value', 'meaning'), rows)}\n"
    return text


def tables(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The dataclass and those inside it, each with its name in TOML."""
    yield name, config
    for field in fields(config):
        if is_dataclass(value := getattr(config, field.name)):
            yield from tables(value, f"{name}.{field.name}".lstrip("."))


def settings(kind: type) -> Iterator[tuple[str, Any, str]]:
    """Each field of a dataclass: name, annotation, and the comment on its line or above it."""
    hints = get_type_hints(kind, include_extras=True)
    for owner in reversed(kind.__mro__):
        if owner.__module__.startswith("laptop."):
            for name, comment in _comments(owner):
                if get_origin(hints[name]) is not ClassVar:
                    yield name, hints[name], comment.replace("None:", "left out:")


def _comments(kind: type) -> Iterator[tuple[str, str]]:
    """The annotated names in the body of a class, with their comments."""
    path = Path(sys.modules[kind.__module__].__file__ or "")
    source = path.read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = source.splitlines()
    (node,) = (n for n in ast.walk(ast.parse(source)) if _is_class(n, kind.__name__))
    for place in node.body:
        if isinstance(place, ast.AnnAssign) and isinstance(place.target, ast.Name):
            first, last = place.lineno, place.end_lineno or place.lineno
            texts = [comments[i] for i in range(first, last + 1) if i in comments]
            above = first - 1
            while above in comments and lines[above - 1].lstrip().startswith("#"):
                texts.insert(0, comments[above])
                above -= 1
            yield place.target.id, " ".join(texts)


def _is_class(node: ast.AST, name: str) -> TypeGuard[ast.ClassDef]:
    return isinstance(node, ast.ClassDef) and node.name == name


def _toml(value: Any) -> str:
    """A default as TOML writes it; nothing for a key that is left out."""
    if value is None:
        return ""
    return f"`{json.dumps(value)}`" if not isinstance(value, Mapping) else "`{}`"


def _parts(hint: Any) -> tuple[Any, list[Any]]:
    """The type of a field without None, and its limits."""
    limits: list[Any] = []
    while get_origin(hint) is Annotated or len(_choices(hint)) == 1:
        if get_origin(hint) is Annotated:
            hint, *more = get_args(hint)
            limits += more
        else:
            (hint,) = _choices(hint)
    return hint, limits


def _choices(hint: Any) -> list[Any]:
    """The types of a union but None; nothing for another type."""
    is_union = get_origin(hint) in (Union, UnionType)
    return [h for h in get_args(hint) if h is not NoneType] if is_union else []


def _words(hint: Any) -> str:
    """What a value may be, for a reader."""
    kind, limits = _parts(hint)
    origin, parts = get_origin(kind), get_args(kind)
    for limit in limits:
        if isinstance(limit, OneOf):
            return ", ".join(f"`{c}`" for c in limit.choices)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(c)}`" for c in parts)
    if choices := _choices(kind):
        return " or ".join(_words(h) for h in choices)
    if origin in (tuple, list, Sequence):
        return f"list: {_words(parts[0])}"
    if origin in (Mapping, dict):
        return "table" if _is_open(parts[1]) else f"table: {_words(parts[1])}"
    if is_dataclass(kind) or is_typeddict(kind):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    ranges = [_range(limit) for limit in limits if isinstance(limit, Range)]
    return ", ".join([WORDS.get(kind, "any"), *filter(None, ranges)])


def _is_open(hint: Any) -> bool:
    """Whether a value may be anything."""
    return hint in (Any, object)


def _range(limit: Range) -> str:
    """The ends of a range that a reader wants to know; limits of a billion are there for typos."""
    low = next(
        (
            f"{w}{x:,g}"
            for w, x in (("from ", limit.least), ("above ", limit.above))
            if abs(x) < 1e6
        ),
        "",
    )
    high = next(
        (f"{w}{x:,g}" for w, x in (("to ", limit.most), ("below ", limit.below)) if abs(x) < 1e6),
        "",
    )
    return f"{low} {high}".strip()


def schema() -> str:
    """The JSON Schema of a recipe (draft 7, which editors of TOML read)."""
    recipe = _object(Recipe(), "Every setting of a run of laptop.")
    short = {k: v for k, v in recipe["properties"].items() if v["type"] == "object"}
    recipe["properties"]["smoke"] = {
        "type": "object",
        "description": "What --smoke changes: the same tables with short settings.",
        "additionalProperties": False,
        "properties": {name: {"$ref": f"#/properties/{name}"} for name in short},
    }
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "A recipe of laptop"}
    return json.dumps(head | recipe, indent=1, ensure_ascii=False) + "\n"


def _object(config: Any, description: str) -> dict[str, Any]:
    properties = {}
    for name, hint, comment in settings(type(config)):
        value = getattr(config, name)
        if is_dataclass(value):
            text = (type(value).__doc__ or "").partition("\n")[0]
            properties[name] = _object(value, text)
        else:
            properties[name] = {"description": comment} | _value(hint)
            if value is not None:
                properties[name]["default"] = value
    return {
        "type": "object",
        "description": description,
        "additionalProperties": False,
        "properties": properties,
    }


def _value(hint: Any) -> dict[str, Any]:
    """The JSON Schema of a field's values."""
    kind, limits = _parts(hint)
    if get_origin(kind) is tuple:
        schema: dict[str, Any] = {"type": "array", "items": _value(get_args(kind)[0])}
    elif get_origin(kind) is Mapping:
        return {"type": "object"}
    else:
        schema = {"type": JSON_TYPES[kind]}
    names = {
        "least": "minimum",
        "most": "maximum",
        "above": "exclusiveMinimum",
        "below": "exclusiveMaximum",
    }
    for limit in limits:
        if isinstance(limit, OneOf):
            schema["enum"] = list(limit.choices)
        elif isinstance(limit, Range):
            ends = {names[f.name]: getattr(limit, f.name) for f in fields(limit)}
            schema |= {name: end for name, end in ends.items() if abs(end) < float("inf")}
        elif isinstance(limit, Length):
            schema |= {"minItems": limit.least, "maxItems": limit.most}
        elif isinstance(limit, Plain) and not limit.empty:
            schema["minLength"] = 1
    return schema


# files.md, from the records


def files_page() -> str:
    """Every record that has a schema, then every record inside one, with its fields."""
    text = ""
    kinds = sorted(records(), key=lambda record: record.SCHEMA)
    for record in kinds:
        text += f"## {record.SCHEMA}\n\n{_fields(record)}\n"
    text += "## Parts of files\n\n"
    for part in sorted({p for r in kinds for p in _inner(r)}, key=lambda p: p.__name__):
        text += f"### {part.__name__}\n\n{_fields(part)}\n"
    return text


def records() -> list[type[Record]]:
    """The classes with a schema, but for the studies', whose files no user sees."""
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if re.search(r'^    SCHEMA = "laptop', path.read_text(encoding="utf-8"), re.MULTILINE):
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                importlib.import_module(".".join([package, *parts]))
    kinds = [kind for kind in _subclasses(Record) if kind.SCHEMA]
    return [kind for kind in kinds if ".studies." not in kind.__module__]


def _subclasses(kind: type[Record]) -> Iterator[type[Record]]:
    for other in kind.__subclasses__():
        if other.__module__.startswith("laptop."):
            yield other
            yield from _subclasses(other)


def _inner(kind: Any) -> set[Any]:
    """The records inside of a record, at any depth."""
    inner: set[Any] = set()
    waiting = list(get_type_hints(kind, include_extras=True).values())
    while waiting:
        hint = waiting.pop()
        waiting += get_args(hint)
        is_record = isinstance(hint, type) and (is_dataclass(hint) or is_typeddict(hint))
        if is_record and hint not in inner | {kind}:
            inner.add(hint)
            waiting += get_type_hints(hint, include_extras=True).values()
    return inner


def _fields(kind: Any) -> str:
    rows = []
    for name, hint, comment in settings(kind):
        is_nullable = NoneType in get_args(hint)
        rows.append((f"`{name}`", _words(hint) + ", or null" * is_nullable, comment))
    text = " ".join((kind.__doc__ or "").partition("\n\n")[0].split())
    return f"{text}\n\n{table(('key', 'value', 'meaning'), rows)}"
