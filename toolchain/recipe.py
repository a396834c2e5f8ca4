"""A recipe: every setting of a run, one frozen config per stage. Defaults < TOML < flags.

    [distill]
    steps = 2000
    learning_rate = 3e-4

Each known model brings its own defaults in `recipes/<name>.toml`; a `[smoke]` table there (with the
same sub-tables) holds what `--smoke` changes.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import TypeVar, get_args, get_type_hints

from laptop.benchmarks.settings import BenchConfig, DevicesConfig, EvalConfig
from laptop.distill.settings import DataConfig, DistillConfig, TrainConfig
from laptop.errors import BadInput
from laptop.export.settings import ExportConfig, VerifyConfig
from laptop.fields import Name, Samples, check_fields
from laptop.files import read_text, reason, shown
from laptop.models.locating import random_name
from laptop.pruning.sampling_config import SamplingConfig
from laptop.pruning.settings import PlanConfig, PruneConfig, ScoreConfig

C = TypeVar("C")
FOLDER = Path(__file__).parent / "recipes"
RECIPE_BYTES = 1 << 20
MOVED = {"devices": "addresses", "python": "python", "team": "team"}  # from [bench] to [devices]


@dataclass(frozen=True)
class PromptConfig:
    """The prompts for calibration, parity checks and image quality."""

    file: Name | None = None  # a text file with one prompt a line; None: the model's own list
    calibration: Samples = 32  # prompts that score draws; verify uses the first few

    def __post_init__(self) -> None:
        check_fields(self, "prompts")

    @property
    def path(self) -> Path | None:
        """The file as a path."""
        return Path(self.file) if self.file else None

    def for_calibration(self, model: str, least: int = 1) -> list[str]:
        """Return the prompts for calibration and parity checks: `least` or more."""
        from laptop.prompts import calibration_prompts

        return calibration_prompts(model, max(self.calibration, least), self.path)


@dataclass(frozen=True)
class Recipe:
    """Every setting of a run, one config a stage."""

    model: Name = "tiny-sdxl"  # a known name, a folder or a Hub id; must be that of the command
    prompts: PromptConfig = field(default_factory=PromptConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        check_fields(self, "recipe")


def read(model: str, file: Path | None = None, *, smoke: bool = False) -> Recipe:
    """The recipe of a model, changed by a TOML file and, with `smoke`, by the short settings."""
    recipe = Recipe(model=model)
    own = FOLDER / f"{random_name(model) or model}.toml"
    is_short = False
    for path in (own if own in FOLDER.iterdir() else None, file):
        if path is not None:
            table = _load(path)
            quick = table.pop("smoke", {})
            recipe = changed(recipe, _moved(table, str(path)), str(path))
            if not isinstance(quick, Mapping):
                raise BadInput(f"{path}: smoke is a table, not {shown(quick)}.")
            where = f"{path} [smoke]"
            short = changed(recipe, _moved(quick, where), where)  # is checked in any case
            if other := {recipe.model, short.model} - {model}:
                raise BadInput(
                    f"{path}: model is {shown(min(other))}, and the command is for "
                    f"{shown(model)}. Leave it out there, or set the same."
                )
            if smoke and quick:
                recipe, is_short = short, True
    if smoke and not is_short:
        raise BadInput(
            f"--smoke: neither the recipe of {model} nor yours has a [smoke] table. Leave the flag "
            "out, or write one into your recipe: the same tables with short settings."
        )
    return recipe


def _load(path: Path) -> dict[str, object]:
    text = read_text(path, RECIPE_BYTES)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as e:  # ValueError also for a number of 5000 digits
        raise BadInput(f"the recipe {path} cannot be read: {reason(e)}") from None


def _moved(table: Mapping[str, object], where: str) -> Mapping[str, object]:
    """A recipe whose settings of devices are in [devices], not in [bench] as in laptop 0.1."""
    bench, devices = table.get("bench"), table.get("devices", {})
    if not isinstance(bench, Mapping) or not isinstance(devices, Mapping):
        return table  # refused later
    old = {MOVED[key]: value for key, value in bench.items() if key in MOVED}
    if twice := old.keys() & devices.keys():
        raise BadInput(
            f"{where}: {min(twice)} is set in [devices] and, as in earlier versions, in [bench]. "
            "Leave it out of [bench]."
        )
    rest = {key: value for key, value in bench.items() if key not in MOVED}
    return {**table, "bench": rest, "devices": old | {**devices}} if old else table


def changed(config: C, values: Mapping[str, object], where: str, table: str = "") -> C:
    """`config` with `values` set, sub-tables too; `BadInput` for an unknown key or a wrong value.

    A value None changes nothing. `where` is the file or the flags that the values come from,
    `table` the part of the recipe.
    """
    assert is_dataclass(config)
    assert not isinstance(config, type)
    hints = get_type_hints(type(config))
    changes: dict[str, object] = {}
    for key, value in values.items():
        if key not in hints:
            known = ", ".join(sorted(hints))
            raise BadInput(f"{where}{table}: {shown(key)} is unknown; known are {known}.")
        if value is None:
            continue
        old = getattr(config, key)
        if is_dataclass(old):
            if not isinstance(value, Mapping):
                raise BadInput(f"{where}{table}: {key} is a table, not {shown(value)}.")
            changes[key] = changed(old, value, where, f"{table} [{key}]")
        else:
            changes[key] = _converted(value, hints[key])
    try:
        return replace(config, **changes)
    except BadInput as e:
        raise BadInput(f"{where}: {e}") from None


def _converted(value: object, hint: object) -> object:
    """`value` in the type that TOML or a flag has another for: a tuple, a number with a point."""
    if isinstance(value, list):
        return tuple(value)
    is_float = hint is float or float in get_args(hint)  # float, float | None
    if is_float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    return value
