"""The sources of training data that `--data` can name, and the cache made from them."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from laptop.distill.cache import check_cache, is_cache
from laptop.distill.encoding import choose_drawing, make_cache
from laptop.distill.hf_dataset import Table
from laptop.distill.settings import DataConfig
from laptop.distill.sources import Broken, Example, Folder, Prompts, Source, runs
from laptop.distill.tar_shards import ENDINGS, Tars
from laptop.errors import BadInput
from laptop.files import exists, shown
from laptop.models import mistakes
from laptop.prompts import read_prompts, training_prompts
from laptop.pruning.sampling_config import SamplingConfig
from laptop.run import Overwrite
from laptop.tiny import draws_scenes
from laptop.tiny.scenes import draw, scenes

ENDLESS = 8000  # examples of an endless source where [data] count is not set
KINDS = (
    "a folder of pictures with metadata.jsonl, hf:NAME[:SPLIT], tar shards such as "
    "path/{00000..00009}.tar (or their address), prompts[:FILE], a folder that `laptop cache` "
    "made, or, for tiny-sdxl, scenes"
)


def prepared(
    model: str,
    config: DataConfig,
    out: Path,
    *,
    sampling: SamplingConfig | None = None,
    overwrite: Overwrite = False,
    allow_commands: bool = False,
) -> Path:
    """The cache to train on: `config.source` if it is a cache, else one made as `out`."""
    if is_cache(Path(config.source)):
        check_cache(Path(config.source), model)
        return Path(config.source)
    return make(
        model, config, out, sampling=sampling, overwrite=overwrite, allow_commands=allow_commands
    )


def make(
    model: str,
    config: DataConfig,
    out: Path,
    *,
    sampling: SamplingConfig | None = None,
    overwrite: Overwrite = False,
    allow_commands: bool = False,
) -> Path:
    """Make a cache of `config.source` as the folder `out`."""
    if is_cache(Path(config.source)):
        raise BadInput(f"--data {config.source} is a cache already.")
    folder = Path(config.source)
    if folder.is_dir() and folder.resolve() in out.resolve().parents:
        raise BadInput(f"{out} is inside {folder}, the training data. Choose another -o.")
    source = source_of(model, config, allow_commands=allow_commands)
    return make_cache(model, source, out, config, sampling=sampling, overwrite=overwrite)


def check_data(
    model: str,
    config: DataConfig,
    sampling: SamplingConfig | None = None,
    *,
    allow_commands: bool = False,
) -> None:
    """Raise `BadInput` unless the training data can be read for this model."""
    if is_cache(Path(config.source)):
        check_cache(Path(config.source), model)
    else:
        choose_drawing(model, config, sampling)
        source_of(model, config, allow_commands=allow_commands)


def source_of(model: str, config: DataConfig, *, allow_commands: bool = False) -> Source:
    """Open the source that `config` names; `BadInput` for one that cannot be read.

    Addresses that run a program, such as `pipe:`, need `allow_commands`, which only the command
    line sets: a recipe cannot allow the commands that it names.
    """
    kind, _, rest = config.source.partition(":")
    if kind == "scenes" and not rest:
        if not draws_scenes(model):
            raise BadInput(f"scenes are what tiny-sdxl draws, not {model}. --data takes {KINDS}.")
        return Scenes(config.count or ENDLESS, config.seed)
    if kind == "prompts":
        return _prompts(model, Path(rest) if rest else None, config)
    if kind == "hf":
        return _table(rest, config)
    if config.source.endswith(ENDINGS):
        return Tars(
            config.source, config.count, config.caption_column, allow_commands=allow_commands
        )
    folder = Path(config.source)
    if not (exists(folder) and folder.is_dir()):
        raise BadInput(
            f"--data {shown(config.source)[1:-1]}: there is no such folder. It takes {KINDS}."
        )
    if not (folder / "metadata.jsonl").exists() and mistakes.kind_of(folder):
        raise BadInput(f"--data: {mistakes.refusal(folder, 'cache')}")
    return Folder(folder, config.count, config.caption_column)


def _table(text: str, config: DataConfig) -> Table:
    """Open a dataset named as NAME or NAME:SPLIT."""
    name, _, split = text.partition(":")
    return Table(
        name,
        split or None,
        config.count,
        image_column=config.image_column,
        caption_column=config.caption_column,
        streaming=config.streaming,
    )


def _prompts(model: str, file: Path | None, config: DataConfig) -> Prompts:
    """The user's prompts, captions of scenes for tiny-sdxl, or the prompts of this package."""
    count = config.count or ENDLESS
    if file is None and draws_scenes(model):
        stream = scenes(config.seed)
        return Prompts([next(stream).caption for _ in range(count)], count)
    return Prompts(read_prompts(file) if file else training_prompts(), count)


class Scenes(Source):
    """Drawn scenes, as tiny-sdxl was trained on; each part has a seed of its own."""

    is_drawn = False

    def __init__(self, count: int, seed: int):
        self.name, self.seed = "scenes", seed
        self._runs = runs(count)
        self.parts = [f"scenes {run.start + 1}-{run.stop}" for run in self._runs]
        self.identity = {"scenes": str(count)}

    def read(self, part: int) -> Iterator[Example | Broken]:
        """Draw scenes with their captions."""
        drawing, captions = np.random.SeedSequence([self.seed, part]).generate_state(2).tolist()
        rng, stream = np.random.default_rng(drawing), scenes(captions)
        for i in self._runs[part]:
            scene, file = next(stream), io.BytesIO()
            Image.fromarray(draw(scene, rng)).save(file, "PNG", compress_level=1)
            yield Example(f"scene {i + 1}", scene.caption, file.getvalue())
