"""Datasets of the Hugging Face layout that somebody who means harm wrote: nothing runs or leaks."""

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from laptop.distill.hf_dataset import Table
from laptop.distill.settings import DataConfig
from laptop.distill.sources import Broken, Example
from laptop.errors import BadInput
from laptop.training_data import source_of
from support.pictures import png, read, write_pictures


def table(folder: Path, picture: dict[str, Any]) -> Table:
    """A dataset of one row, as parquet."""
    datasets, arrow = (importlib.import_module(name) for name in ("datasets", "pyarrow.parquet"))
    features = {"image": datasets.Image(), "text": datasets.Value("string")}
    schema = datasets.Features(features).arrow_schema
    folder.mkdir(exist_ok=True)
    rows = importlib.import_module("pyarrow").Table.from_pylist(
        [{"image": picture, "text": "a"}], schema=schema
    )
    arrow.write_table(rows, folder / "a.parquet")
    return Table(str(folder))


def test_a_table_names_pictures_of_its_own_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = importlib.import_module("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "secret.png").write_bytes(png(0))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "link").symlink_to(tmp_path / "secret.png")
    for number, path in enumerate(
        [str(tmp_path / "secret.png"), "file://" + str(tmp_path / "secret.png"),
         str(tmp_path / "d" / "link"), f"zip://x.png::{tmp_path}/secret.png", "ssh://host/x.png",
         "/etc/passwd", f"simplecache::{tmp_path}/secret.png", None]
    ):  # fmt: skip
        source = table(tmp_path / f"t{number}", {"bytes": None, "path": path})
        (record,) = read(source)
        assert isinstance(record, Broken), path
        assert "neither a file" in record.reason or "outside" in record.reason or path is None
    own = tmp_path / "own"
    own.mkdir()
    (own / "0.bin").write_bytes(png(0))
    source = table(own, {"bytes": None, "path": str(own / "0.bin")})
    assert isinstance(read(source)[0], Example)


def script(folder: Path) -> str:
    (folder / "d").mkdir()
    (folder / "d" / "d.py").write_text("open('PWNED', 'w')")
    return "d"


def one_script(folder: Path) -> str:
    (folder / "d.py").write_text("open('PWNED', 'w')")
    return "d.py"


def a_pickle(folder: Path) -> str:
    (folder / "d.pkl").write_bytes(b"cos\nsystem\n(S'touch PWNED'\ntR.")
    return "d.pkl"


def a_pipe(folder: Path) -> str:
    (folder / "d").mkdir()
    os.mkfifo(folder / "d" / "0.parquet")
    return "d"


def saved_outside(folder: Path) -> str:
    (folder / "d").mkdir()
    state = {"_data_files": [{"filename": "../x.arrow"}]}
    (folder / "d" / "state.json").write_text(json.dumps(state))
    return "d"


def split_outside(folder: Path) -> str:
    (folder / "d").mkdir()
    (folder / "d" / "dataset_dict.json").write_text('{"splits": ["../x"]}')
    return "d"


def brackets(folder: Path) -> str:
    write_pictures(folder / "a[1]")
    return "a[1]"


def no_parquet(folder: Path) -> str:
    (folder / "d.parquet").write_bytes(b"PAR1 no")
    return "d.parquet"


@pytest.mark.parametrize(
    "make",
    [script, one_script, a_pickle, a_pipe, saved_outside, split_outside, brackets, no_parquet],
)
def test_a_dataset_folder_runs_nothing_and_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], str]
) -> None:
    datasets = importlib.import_module("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"hf:|state\.json|dataset_dict\.json"):
        source_of("tiny-sdxl", DataConfig(f"hf:{make(tmp_path)}"))
    assert not Path("PWNED").exists()
