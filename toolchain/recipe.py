"""A recipe: every setting of a run, one frozen config per stage. Defaults < TOML < flags.

    [distill]
    steps = 2000
    learning_rate = 3e-4

Each known model brings its own defaults in `recipes/<name>.toml`; a `[smoke]` table there (with the
same sub-tables) holds what `--smoke` changes.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from laptop.benchmarks.latency import BenchConfig
from laptop.benchmarks.quality import EvalConfig
from laptop.distill.encoding import DataConfig
from laptop.distill.session import DistillConfig, TrainConfig
from laptop.errors import BadInput
from laptop.export.parity import VerifyConfig
from laptop.export.settings import ExportConfig
from laptop.files import read_text
from laptop.models import random_name
from laptop.pruning.budgets import PlanConfig
from laptop.pruning.sampling_config import SamplingConfig
from laptop.pruning.score import ScoreConfig
from laptop.pruning.surgery import PruneConfig

C = TypeVar("C")
FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class PromptConfig:
    """What is drawn to calibrate, to check parity and to judge."""

    file: str | None = None  # one prompt a line; None: the model's own list
    calibration: int = 32  # prompts of `score`; `verify` uses the first few

    @property
    def path(self) -> Path | None:
        """The file as a path."""
        return Path(self.file) if self.file else None


@dataclass(frozen=True)
class Recipe:
    model: str = "tiny-sdxl"
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
    bench: BenchConfig = field(default_factory=BenchConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def read(model: str, file: Path | None = None, *, smoke: bool = False) -> Recipe:
    """The recipe of a model, changed by a TOML file and, with `smoke`, by the short settings."""
    recipe = Recipe(model=model)
    own = FOLDER / f"{random_name(model) or model}.toml"
    is_short = False
    for path in (own if own in FOLDER.iterdir() else None, file):
        if path is not None:
            table = _load(path)
            quick = table.pop("smoke", {})
            recipe = changed(recipe, table, str(path))
            if smoke and quick:
                recipe, is_short = changed(recipe, quick, f"{path} [smoke]"), True
    if smoke and not is_short:
        raise BadInput(f"--smoke: neither the recipe of {model} nor yours has a [smoke] table.")
    return replace(recipe, model=model)


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except (BadInput, tomllib.TOMLDecodeError) as e:
        raise BadInput(f"the recipe {path} cannot be read: {e}") from None


def changed(config: C, values: Mapping[str, Any], where: str) -> C:
    """`config` with `values` set, sub-tables too; `BadInput` for an unknown or ill-typed key."""
    assert is_dataclass(config)
    assert not isinstance(config, type)
    known = {f.name for f in fields(config)}
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise BadInput(f"{where}: {key!r} is unknown; known are {', '.join(sorted(known))}.")
        old = getattr(config, key)
        if is_dataclass(old):
            if not isinstance(value, Mapping):
                raise BadInput(f"{where}: {key} is a table, not {value!r}.")
            changes[key] = changed(old, value, f"{where} [{key}]")
        else:
            changes[key] = _converted(value, get_type_hints(type(config))[key], f"{where}: {key}")
    return replace(config, **changes)


def _converted(value: Any, hint: Any, where: str) -> Any:
    """`value` as a field of type `hint` holds it; `BadInput` when it is of another type."""
    options = [h for h in get_args(hint) if h is not type(None)]
    if isinstance(hint, UnionType) and len(options) == 1:  # "T | None", where None is not given
        hint = options[0]
    if get_origin(hint) is Mapping:
        if not isinstance(value, Mapping):
            raise BadInput(f"{where} is a table, not {value!r}.")
        return dict(value)
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        if not isinstance(value, list | tuple) or not all(isinstance(v, item) for v in value):
            raise BadInput(f"{where} needs a list of {item.__name__}, not {value!r}.")
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    simple = hint if isinstance(hint, type) and not hasattr(hint, "__args__") else None
    wrong_bool = isinstance(value, bool) and simple is not bool
    if simple and (not isinstance(value, simple) or wrong_bool):
        raise BadInput(f"{where} needs a {simple.__name__}, not {value!r}.")
    return value
