"""Where training examples come from: each kind is really read; what is broken is named."""

import http.server
import importlib
import io
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from laptop.distill import sources
from laptop.distill.hf_dataset import Table
from laptop.distill.settings import DataConfig
from laptop.distill.sources import Broken, Example, Folder, Prompts, Source
from laptop.distill.tar_shards import Tars
from laptop.errors import BadInput, MissingExtra
from laptop.training_data import Scenes, source_of
from support.pictures import CAPTIONS, png, read, write_pictures, write_tar


def write_tars(folder: Path) -> Path:
    """Seven records in two tars."""
    for number, some in enumerate((range(4), range(4, 7))):
        files = {}
        for i in some:
            files |= {f"{i:03}.png": png(i), f"{i:03}.txt": CAPTIONS[i].encode()}
        write_tar(folder / f"{number:05}.tar", files)
    return folder


def shades(records: list[Example | Broken]) -> list[int]:
    found = []
    for record in records:
        assert isinstance(record, Example)
        assert record.picture is not None
        with Image.open(io.BytesIO(record.picture)) as image:
            found.append(image.getpixel((0, 0))[0])
    return found


def whole(source: Source) -> None:
    """All seven are there, in order, and each part can be read alone, again."""
    records = read(source)
    assert [r.caption for r in records] == CAPTIONS
    assert shades(records) == list(range(7))
    last = len(source.parts) - 1
    again = list(source.read(last))
    assert again == records[-len(again) :]
    assert len({r.id for r in records}) == 7


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PART", 3)


def test_a_folder_is_read_in_parts(tmp_path, short_parts) -> None:
    source = Folder(write_pictures(tmp_path / "f"))
    assert source.parts == ["lines 1-3", "lines 4-6", "lines 7-7"]
    whole(source)
    assert read(source)[3].id == "p3.png"
    assert len(read(Folder(tmp_path / "f", count=5))) == 5
    assert Folder(tmp_path / "f").identity == source.identity
    (tmp_path / "f" / "p3.png").write_bytes(png(3) + b"more")
    assert Folder(tmp_path / "f").identity != source.identity


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dataset that holds the seven pictures; what the library stores goes to a folder of it."""
    datasets = importlib.import_module("datasets")
    folder = tmp_path_factory.mktemp("hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        rows = [
            {"image": {"path": f"p{i}.png", "bytes": png(i)}, "text": caption}
            for i, caption in enumerate(CAPTIONS)
        ]
        features = {"image": datasets.Image(), "text": datasets.Value("string")}
        yield datasets.Dataset.from_list(rows, features=datasets.Features(features))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_read_from_pictures_and_parquet(
    dataset, tmp_path, short_parts, streaming
) -> None:
    write_pictures(tmp_path / "f")
    (tmp_path / "pq").mkdir()
    dataset.select(range(4)).to_parquet(tmp_path / "pq" / "a.parquet")
    dataset.select(range(4, 7)).to_parquet(tmp_path / "pq" / "b.parquet")
    dataset.to_parquet(tmp_path / "one.parquet")
    for name in ("f", "pq", "one.parquet"):
        source = Table(str(tmp_path / name), streaming=streaming)
        whole(source)
        assert source.identity == Table(str(tmp_path / name), streaming=streaming).identity
    stream = Table(str(tmp_path / "pq"), streaming=streaming, count=4)
    assert len(read(stream)) == 4
    assert stream.parts == (["file 1", "file 2"] if streaming else ["rows 1-3", "rows 4-4"])


def test_a_saved_dataset_is_read_by_split_and_column(dataset, tmp_path, short_parts) -> None:
    datasets = importlib.import_module("datasets")
    dataset.save_to_disk(tmp_path / "one")
    whole(Table(str(tmp_path / "one")))
    renamed = dataset.rename_columns({"text": "caption", "image": "jpg"})
    splits = {"train": renamed.select([0]), "test": renamed}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    config = DataConfig(f"hf:{tmp_path / 'two'}:test", image_column="jpg", caption_column="caption")
    source = source_of("tiny-sdxl", config)
    assert source.parts == ["rows 1-3", "rows 4-6", "rows 7-7"]
    whole(source)
    assert read(source)[6].id == "row 7"
    with pytest.raises(BadInput, match=r"no column 'text'; known are jpg, caption.*caption_column"):
        source_of("tiny-sdxl", replace(config, caption_column="text"))
    with pytest.raises(BadInput, match=r"no column 'image'; known are jpg.*Set image_column"):
        source_of("tiny-sdxl", replace(config, image_column="image"))
    with pytest.raises(BadInput, match=r"'caption' holds .*, no pictures"):
        source_of("tiny-sdxl", replace(config, image_column="caption"))
    with pytest.raises(BadInput, match="no split 'val'; it has train, test"):
        source_of("tiny-sdxl", replace(config, source=f"hf:{tmp_path / 'two'}:val"))


def test_rows_without_a_picture_or_a_caption_are_named(dataset, tmp_path) -> None:
    rows = dataset.map(lambda row: {"text": "" if row["text"] == "picture 2" else row["text"]})
    rows.save_to_disk(tmp_path / "d")
    assert read(Table(str(tmp_path / "d")))[2] == Broken("row 3", "no text")


def test_tars_are_read_by_braces_and_wildcards(tmp_path) -> None:
    write_tars(tmp_path)
    for pattern in ("{00000..00001}.tar", "0000?.tar", "*.tar"):
        source = source_of("tiny-sdxl", DataConfig(str(tmp_path / pattern)))
        assert source.parts == ["00000.tar", "00001.tar"]
        whole(source)
    assert read(source)[5].id == "00001.tar/005"
    assert [r.caption for r in read(Tars(str(tmp_path / "*.tar"), count=3))] == [
        CAPTIONS[i] for i in (0, 4, 5)
    ], "each tar gives its share"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a web server of `tmp_path`."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *_args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_tars_are_read_from_an_address(tmp_path, server) -> None:
    write_tars(tmp_path)
    whole(source_of("tiny-sdxl", DataConfig(f"{server}/{{00000..00001}}.tar")))
    with pytest.raises(BadInput, match=r"9\.tar cannot be read"):
        source_of("tiny-sdxl", DataConfig(f"{server}/9.tar"))


def test_captions_in_json_and_what_is_wrong_with_a_record(tmp_path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {
            "0.jpg": png(0), "0.json": b'{"caption": "of json"}',
            "1.webp": png(1), "1.json": b'{"width": 3}',
            "2.txt": b"no picture",
            "3.png": png(3), "3.json": b"{",
            "4.png": png(4), "4.txt": b"of text", "4.json": b'{"text": "of json"}',
        },
    )  # fmt: skip
    records = read(Tars(str(tmp_path / "a.tar")))
    assert [getattr(r, "caption", None) for r in records] == [
        "of json",
        None,
        None,
        None,
        "of text",
    ]
    reasons = [r.reason for r in records if isinstance(r, Broken)]
    assert reasons[:2] == ["no caption", "no picture (jpg, jpeg, png, webp)"]
    assert reasons[2].startswith("its json is not valid (")


def test_tars_that_cannot_be_used_are_refused(tmp_path) -> None:
    with pytest.raises(BadInput, match=r"no file is called .*1\.tar"):
        Tars(str(tmp_path / "{1..2}.tar"))
    write_tar(tmp_path / "other.tar", {"0.mp3": b"la", "0.txt": b"sound"})
    with pytest.raises(BadInput, match="first record has mp3, txt; needed are a picture"):
        Tars(str(tmp_path / "other.tar"))
    write_tar(tmp_path / "column.tar", {"0.png": png(0), "0.json": b'{"prompt": "a", "w": 1}'})
    with pytest.raises(BadInput, match="no column 'text'; known are prompt, w"):
        Tars(str(tmp_path / "column.tar"))
    assert len(read(Tars(str(tmp_path / "column.tar"), caption_column="prompt"))) == 1
    (tmp_path / "text.tar").write_bytes(b"no tar" * 300)
    with pytest.raises(BadInput, match=r"text\.tar cannot be read"):
        Tars(str(tmp_path / "text.tar"))


@pytest.mark.parametrize("length", [1300, 1536, 2048, 2100])
def test_a_tar_that_was_cut_off_is_an_error(tmp_path, length) -> None:
    path = write_tars(tmp_path) / "00000.tar"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BadInput, match=r"00000\.tar (ends in the middle|cannot be read)"):
        read(Tars(str(path)))


def test_prompts_share_out_the_pictures(monkeypatch) -> None:
    monkeypatch.setattr(sources, "DRAWN_PART", 4)
    source = Prompts(["a", "b", "c"], 7)
    assert source.parts == ["pictures 1-4", "pictures 5-7"]
    records = read(source)
    assert "".join(r.caption for r in records) == "aabbccc"
    assert [r.id for r in records][:3] == [
        "prompt 1 picture 1", "prompt 1 picture 2", "prompt 2 picture 1",
    ]  # fmt: skip
    assert all(r.picture is None for r in records)
    assert [r.caption for r in read(Prompts(["a", "b", "c"], 2))] == ["a", "b"]


def test_scenes_are_the_same_in_any_order_of_parts() -> None:
    source = Scenes(300, seed=4)
    assert len(read(source)) == 300
    assert list(source.read(1)) == read(Scenes(300, seed=4))[256:]
    assert read(Scenes(300, seed=5)) != read(source)


def test_bad_folders_are_refused_with_the_line(tmp_path) -> None:
    with pytest.raises(BadInput, match=r"no metadata\.jsonl"):
        Folder(tmp_path)
    metadata = tmp_path / "metadata.jsonl"
    for text, message in [
        ("", "is empty"),
        ('{"file_name": "0.png", "text": "a"}', r"line 1: 0\.png does not exist"),
        ("[1]", "line 1: needs file_name and text"),
        ('{"text": "a"}', "line 1: needs file_name and text"),
        (
            '{"file_name": "metadata.jsonl", "caption": "a"}',
            "no column 'text'; known are .*caption",
        ),
        ('{"file_name": "metadata.jsonl", "text": "a"}\n{', "line 2: needs"),
    ]:
        metadata.write_text(text)
        with pytest.raises(BadInput, match=message):
            Folder(tmp_path)


def test_a_line_without_caption_is_named(tmp_path) -> None:
    records = read(Folder(write_pictures(tmp_path / "f", p2={"text": " "}, p4={"text": None})))
    assert records[2] == Broken("p2.png", "no text")
    assert records[4] == Broken("p4.png", "no text")


@pytest.mark.parametrize("kind", ["hf:x", "x.tar"])
def test_a_missing_library_names_the_extra(kind, monkeypatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingExtra, match=r"pip install 'laptop-diff\[train\]'"):
        source_of("tiny-sdxl", DataConfig(kind))
