"""The command `laptop cache`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from laptop.cli import options
from laptop.cli.options import Common, example

if TYPE_CHECKING:
    from laptop.recipe import Recipe


@click.command(
    epilog=example(
        "laptop cache --model tiny-sdxl --data scenes -o cached",
        "laptop cache --model sdxl --data 'shards/{00000..00099}.tar' -o cached",
    ),
)
@options.model
@options.data
@click.option("--count", type=click.IntRange(min=1), help="Most examples.")
@click.option("--resolution", type=options.PIXELS, help="Pixels a side. [default: the model's own]")
@click.option("--buckets", is_flag=True, default=None, help="Keep aspect ratios, in buckets.")
@options.out("The cache's folder, for --data of `laptop distill` and `compress`.")
@options.sampling
@options.common
@options.dry_run
def cache(
    model: str,
    data: str | None,
    allow_commands: bool,
    count: int | None,
    resolution: int | None,
    buckets: bool | None,
    sampling: dict[str, object],
    out: Path,
    common: Common,
) -> "Iterator[Recipe]":
    """Encode training data once: latents and text embeddings, for a model and its students."""
    options.need_folder(out)
    flags = {"source": data, "count": count, "resolution": resolution, "buckets": buckets}
    flags["seed"] = common.seed
    recipe = common.recipe(model, data=flags, sampling=sampling)
    yield recipe
    from laptop.distill.cache import INFO
    from laptop.files import read_json
    from laptop.training_data import make

    made = make(
        model,
        recipe.data,
        out,
        sampling=recipe.sampling,
        overwrite=common.overwrite,
        allow_commands=allow_commands,
    )
    info = read_json(made / INFO)
    sizes = ", ".join(f"{b['height']} x {b['width']}: {b['count']}" for b in info["buckets"])
    skipped = f", {len(info['skipped'])} skipped" if info["skipped"] else ""
    common.print(info, f"Cache: {out}\n{info['count']} samples{skipped}; latents {sizes}")
