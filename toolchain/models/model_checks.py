"""Checks of a model by its small files, before anything is loaded.

A model's folder may come from a stranger: nothing that it names is imported here.
"""

from pathlib import Path

from laptop.errors import BadInput, UnknownModel, Unsupported
from laptop.files import files_in, inside, open_file, read_json, shown
from laptop.models import mistakes
from laptop.models.component_classes import (
    CLASSES,
    Config,
    Configs,
    check_agreement,
    check_index,
    components,
    config_file,
)
from laptop.models.component_fit import check_fit
from laptop.models.config_keys import check_keys
from laptop.models.config_values import check_values
from laptop.models.foreign_code import check_component, check_config
from laptop.models.stored_weights import header


def check_folder(folder: Path) -> None:
    """Raise unless `folder` is a diffusers pipeline that can be scored, whole and of one piece."""
    if not (folder / "model_index.json").is_file() or mistakes.is_graphs(folder):
        raise UnknownModel(mistakes.refusal(folder, "model"))
    index = read_json(folder / "model_index.json")
    check_index(index, str(folder))
    for name in components(index):
        if not (folder / name).is_dir():
            raise BadInput(f"{folder} lacks {name}/, which its model_index.json names.")
        check_component(folder / name)
    mistakes.check_files(folder)
    check_files(folder)
    check_configs(index, configs_in(folder), str(folder))


def configs_in(folder: Path, vae: str = "vae") -> Configs:
    """The JSON files of a model by their path; its VAE is in the folder `vae`."""

    def config(name: str) -> Config | None:
        path = folder / name.replace("vae/", f"{vae}/")
        return read_json(path) if path.is_file() else None

    return config


def check_configs(index: Config, configs: Configs, where: str) -> None:
    """Raise unless the configs of a model's components agree and this version honours them.

    `index` is the model's `model_index.json`, which `check_index` has checked.
    """
    check_agreement(index, configs, where)
    present = components(index)
    for path in filter(None, map(config_file, present)):
        check_config(configs(path) or {}, f"{where}: {path}")
    settings = {key: value for key, value in index.items() if key not in CLASSES}
    check_keys(index["_class_name"], settings, f"{where}: model_index.json")
    for name in ("unet", "vae", "scheduler"):
        if name in present:
            path = str(config_file(name))
            if (config := configs(path)) is None:
                raise BadInput(f"{where} has no {path}. Save the whole pipeline.")
            check_keys(present[name], config, f"{where}: {path}")
    check_values(index, configs, where)
    check_unet(configs("unet/config.json") or {}, where)
    check_fit(index, configs, where)


def check_unet(config: Config, where: str) -> None:
    """Raise `Unsupported` for a U-Net that takes more than pictures, time, text and XL's sizes."""
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        raise Unsupported(f"{where}: the U-Net takes class labels, which calibration has not.")
    if config.get("sample_size") is None:
        raise Unsupported(
            f"{where}: unet/config.json has no sample_size, the height and width of its native "
            "latents. Set it there."
        )


def check_files(folder: Path) -> None:
    """Raise unless links and lists of shards stay in a model's folder, and weights are whole."""
    for path in folder.glob("*/*.safetensors"):
        open_file(path).close()  # refuses what is no ordinary file, such as a fifo
    for file in files_in(folder):
        if file.suffix == ".safetensors":
            header(file)
        elif ".safetensors.index." in file.name and file.suffix == ".json":  # of variants, too
            _check_shards(file)


def _check_shards(path: Path) -> None:
    """Raise `BadInput` unless a list of shards names safetensors files in its own folder."""
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise BadInput(f"{path} has no weight_map of tensors to files. Save the model again.")
    for name in sorted({*map(str, shards.values())}):
        shard = inside(path.parent, name, str(path))
        if shard.suffix != ".safetensors":
            raise BadInput(f"{path} names {shown(name)}; weights are read from safetensors only.")
        if not shard.is_file():
            raise BadInput(f"{path} names {shown(name)}, which is missing. Fetch it again.")
