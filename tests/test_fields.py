"""Every setting has a range or choices, and what is out of them is refused by table and name."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from laptop import recipe
from laptop.benchmarks.settings import DevicesConfig
from laptop.distill import features, losses, optimizer
from laptop.distill import settings as distill_settings
from laptop.errors import BadInput
from laptop.fields import Length, OneOf, Plain, Range, check_value
from laptop.pruning import criteria
from laptop.pruning import settings as pruning_settings
from laptop.studies.trial import StudyConfig

RECIPE = recipe.Recipe()
FREE = {  # texts that name something, in the places that know what is known
    *("recipe.model", "prompts.file", "score.clip_model", "plan.latency_table", "plan.keep"),
    *("data.source", "data.image_column", "data.caption_column", "export.targets"),
    *("export.vae_precision", "devices.python"),
    *("devices.team", "devices.addresses"),
}


def configs(config: Any = RECIPE, table: str = "recipe") -> Iterator[tuple[str, Any]]:
    """Every config of the recipe with the name of its table, and the study's."""
    yield table, config
    for field in fields(config):
        if is_dataclass(value := getattr(config, field.name)):
            yield from configs(value, field.name if table == "recipe" else f"{table}.{field.name}")


CONFIGS = {**dict(configs()), "study": StudyConfig()}
SETTINGS = [
    (table, field.name, get_type_hints(type(config), include_extras=True)[field.name])
    for table, config in CONFIGS.items()
    for field in fields(config)
    if not is_dataclass(getattr(config, field.name))
]


def limits(hint: Any) -> list[Any]:
    """All limits in an annotation, those of a list's items too."""
    nested = [limit for part in get_args(hint) for limit in limits(part)]
    is_limit = hasattr(hint, "refusal")
    return [hint] if is_limit else nested


def kinds(hint: Any) -> set[Any]:
    """The plain types in an annotation."""
    parts = get_args(hint)
    return {k for p in parts for k in kinds(p)} if parts else {hint}


def wrong(hint: Any) -> Iterator[Any]:
    """Values that a setting of this annotation must refuse."""
    parts, origin = get_args(hint), get_origin(hint)
    types = kinds(hint) - {NoneType}
    yield from ({"a": 1}, [1, None], object(), math.nan, math.inf, -math.inf)
    if NoneType not in kinds(hint):
        yield None
    if bool not in types:
        yield True
    if str not in types:
        yield from ("x", "", "9" * 5000)
    if str in types or bool in types:
        yield from (7, 1.5)
    if int in types:
        yield from (1.5, "1", -(10**30))
    if int in types or float in types:
        yield 10**5000
    for limit in limits(hint):
        match limit:
            case Range(least, most, above, below):
                yield from (x for x in (least - 1, most + 1, above, below) if math.isfinite(x))
            case OneOf():
                yield from ("", "no such choice", "x" * 10**6)
            case Plain():
                yield from ("a\0b", "a\nb", "\ud800", "x" * 5000)
    if origin is tuple or any(get_origin(p) is tuple for p in parts):
        yield from ("abc", 7, ((),), (None,), (True,), (1.5, "x"))


@pytest.mark.parametrize(
    ("table", "name", "hint"), SETTINGS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_setting_has_a_range_or_choices_and_refuses_the_rest(table, name, hint) -> None:
    if Mapping not in {get_origin(hint)} and kinds(hint) - {NoneType} != {bool}:
        words = [limit for limit in limits(hint) if not isinstance(limit, Length)]
        assert words, "neither a range nor choices"
        assert (f"{table}.{name}" in FREE) == any(isinstance(w, Plain) for w in words)
    for value in wrong(hint):
        if isinstance(value, dict) and get_origin(hint) is Mapping:
            continue
        with pytest.raises(BadInput, match=rf"^\[{table}\] {name} is ") as error:
            replace(CONFIGS[table], **{name: value})
        assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (0, Annotated[int, Range(1, 9)], r"x is 0; it must be at least 1\."),
        (10, Annotated[int, Range(1, 9)], r"x is 10; it must be at most 9\."),
        (1.0, Annotated[float, Range(0, below=1)], r"x is 1\.0; it must be below 1\."),
        (True, int, r"x is True; it must be a whole number\."),
        (math.nan, float, r"x is nan; it must be a number\."),
        ("d", Annotated[str, OneOf("a", "b")] | None, r"x is 'd'; known are a, b\."),
        ((1, "2"), tuple[int, ...], r"x is '2'; it must be a whole number\."),
    ],
)
def test_a_refusal_says_what_is_wrong_and_what_is_right(value, hint, message) -> None:
    with pytest.raises(BadInput, match=message):
        check_value(value, hint, "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[score]\nsamples = 0\n", r"r\.toml: \[score\] samples is 0; it must be at "),
        ("[distill]\nlearning_rate = 'x'\n", r"learning_rate is 'x'; it must be a number"),
        ("[distill]\nseed = " + "9" * 5000 + "\n", r"r\.toml cannot be read"),
        ("a = " + "[" * 100_000, r"r\.toml cannot be read"),
        ("score = 3\n", r"score is a table, not 3"),
        ("[score]\nsamplse = 3\n", r"'samplse' is unknown; known are batch_size"),
        ("[distill]\nlearning_rate = 1979-05-27\n", r"learning_rate is .*; it must be a number"),
        ("#" * (2 << 20), r"r\.toml is larger than 1 MB"),
        ("model = '/etc'", r"r\.toml: model is '/etc', and the command is for 'tiny-sdxl'"),
        ("[smoke]\nmodel = 'sdxl'", r"r\.toml: model is 'sdxl', and the command is for"),
        ("smoke = 3", r"r\.toml: smoke is a table, not 3"),
        ("[smoke.score]\nnone = 1", "'none' is unknown"),
        ("[bench]\nruntimes = ['zzz']", "runtimes is 'zzz'; known are pytorch"),
        (
            "[bench]\npython = 'a'\n[devices]\npython = 'b'",
            "python is set in .devices. and",
        ),
        ("[smoke.bench]\nteam = 3", r"\[devices\] team is 3; it must be a text"),
        ("[bench]\ncomponents = ['zzz']", "components is 'zzz'; known are text_encoder"),
    ],
)
def test_a_recipe_with_garbage_is_refused_with_file_and_key(text, message, tmp_path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(text)
    with pytest.raises(BadInput, match=message):
        recipe.read("tiny-sdxl", file)


def test_a_recipe_may_write_a_whole_number_for_any_number(tmp_path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("[plan]\nmax_latency_ms = 5\n[distill]\nmax_grad_norm = 2\n")
    read = recipe.read("tiny-sdxl", file)
    assert (repr(read.plan.max_latency_ms), repr(read.distill.max_grad_norm)) == ("5.0", "2.0")


def test_devices_may_stand_in_the_bench_table_as_in_earlier_recipes(tmp_path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(
        "[bench]\nrounds = 7\ndevices = ['ssh://orin']\npython = '~/x'\n[devices]\nteam = 'A1'\n"
    )
    read = recipe.read("tiny-sdxl", file)
    assert read.devices == DevicesConfig(("ssh://orin",), "~/x", "A1")
    assert read.bench == replace(recipe.read("tiny-sdxl").bench, rounds=7)


def test_the_choices_of_settings_are_what_is_implemented() -> None:
    assert tuple(criteria.CRITERIA) == pruning_settings.CRITERIA
    assert tuple(features.PAIRINGS) == distill_settings.FEATURES
    assert tuple(losses.WEIGHTINGS) == distill_settings.WEIGHTINGS
    assert tuple(optimizer.OPTIMIZERS) == distill_settings.OPTIMIZERS
    assert tuple(optimizer.SCHEDULES) == distill_settings.SCHEDULES
