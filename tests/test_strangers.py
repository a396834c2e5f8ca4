"""Folders, graphs and runs of strangers: their code never runs, their names never lead outside."""

import io
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from laptop import files, run
from laptop.benchmarks.report import page, text
from laptop.distill.checkpoint_metadata import PlainUnpickler, Planner
from laptop.errors import BadInput, LaptopError, OutputExists, Unsupported
from laptop.models import foreign_code, model_checks

OUTSIDE = ("../x", "/x", "a/../../x", "..", "C:/x", "a\\..\\x", "", "x\0y", None, ["x"])


class Bomb:
    """Its pickle makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_links_that_stay_in_a_folder_are_files_of_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x").write_text("x")
    (tmp_path / "y").symlink_to("a/x")
    (tmp_path / "b").symlink_to("a")
    assert files.files_in(tmp_path) == [tmp_path / name for name in ("a/x", "b/x", "y")]
    files.copy_folder(tmp_path, tmp_path.with_name("copy"))
    copies = [p for p in tmp_path.with_name("copy").rglob("*") if p.is_file()]
    assert [p.is_symlink() for p in copies] == [False] * 3


def test_a_snapshot_of_the_hub_s_cache_links_to_its_blobs(tmp_path: Path) -> None:
    blobs = tmp_path / "models--owner--name/blobs"
    snapshot = tmp_path / "models--owner--name/snapshots/c0ffee/unet"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "1234").write_text("weights")
    (snapshot / "w").symlink_to("../../../blobs/1234")
    assert files.files_in(snapshot.parent) == [snapshot / "w"]
    (tmp_path / "secret").write_text("s")
    (snapshot / "v").symlink_to(tmp_path / "secret")
    with pytest.raises(BadInput, match="leads out of"):
        files.files_in(snapshot.parent)


@pytest.mark.parametrize("target", ["../secret", "{}/secret", "/etc", "../folder", "gone/../../x"])
def test_a_link_that_leaves_a_folder_is_refused_by_name(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret").write_text("s")
    (folder / "extra").symlink_to(target.format(tmp_path))
    for call in (files.files_in, files.sha256, model_checks.check_files):
        with pytest.raises(BadInput, match=r"extra.*is a link to"):
            call(folder)
    with pytest.raises(BadInput, match="is a link to"):
        files.copy_folder(folder, tmp_path / "copy")


@pytest.mark.parametrize("links", [{"a": ".", "b": ".", "c": "."}, {"a/x": "../b", "b/x": "../a"}])
def test_links_in_circles_end(tmp_path: Path, links: dict[str, str]) -> None:
    for name, target in links.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(target)
    with pytest.raises(BadInput, match="circles"):
        files.files_in(tmp_path)


def test_a_write_replaces_a_link_and_never_follows_it(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in ("x.json", "x.json.tmp"):
        (tmp_path / name).symlink_to(mine)
    files.write_json(tmp_path / "x.json", {"a": 1})
    assert mine.read_text() == "mine"
    assert files.read_json(tmp_path / "x.json") == {"a": 1}
    assert not (tmp_path / "x.json").is_symlink()


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    def fail() -> None:
        with files.whole(tmp_path / "x.json") as unfinished:
            unfinished.write_text("half")
            raise OSError("disk")

    (tmp_path / "x.json").write_text("before")
    with pytest.raises(OSError, match="disk"):
        fail()
    assert (tmp_path / "x.json").read_text() == "before"
    files.write_text(tmp_path / "x.json", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert (tmp_path / "x.json").read_text() == "after"


# ------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("name", [*OUTSIDE, "evil.bin", "gone.safetensors"])
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_list_of_shards_names_safetensors_in_its_folder(
    tmp_path: Path, name: Any, variant: str
) -> None:
    (tmp_path / "evil.bin").write_bytes(b"")
    shards = tmp_path / f"unet/diffusion_pytorch_model.safetensors.index{variant}.json"
    shards.parent.mkdir()
    (shards.parent / "evil.bin").write_bytes(b"")
    shards.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(BadInput, match=r"index.*json"):
        model_checks.check_files(tmp_path)


def component(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("library", ["diffusers", "transformers", "stable_diffusion"])
def test_a_module_named_as_a_component_s_library_is_refused(tmp_path: Path, library: str) -> None:
    folder = component(tmp_path / "vae")
    (folder / f"{library}.py").write_text("")
    with pytest.raises(Unsupported, match="runs no code"):
        foreign_code.check_component(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": {"AutoModel": "code.Model"}},
        {"_attn_implementation": "owner/kernel"},
        {"attn_implementation": {"text_config": "owner/kernel"}},
        {"text_config": {"_attn_implementation": "flash_attention_2"}},
        {"quantization_config": {"quant_method": "gptq"}},
        {"vocab_file": "/etc/passwd"},
        {"merges_file": "merges.txt"},
        {"tokenizer_file": ["x"]},
    ],
)
@pytest.mark.parametrize("name", foreign_code.CONFIGS)
def test_a_config_names_no_code_and_no_files(tmp_path: Path, name: str, config: Any) -> None:
    folder = component(tmp_path / "text_encoder", _attn_implementation="sdpa", auto_map=None)
    foreign_code.check_component(folder)
    (folder / name).write_text(json.dumps(config))
    with pytest.raises(Unsupported, match=r"(auto_map|implementation|_config|_file) is"):
        foreign_code.check_component(folder)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = component(tmp_path / "text_encoder")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "../other"}')
    with pytest.raises(Unsupported, match="Fuse the adapter"):
        foreign_code.check_component(folder)


# ------------------------------------------------------------------------------------ runs


def write_nothing(folder: Path) -> None:
    (folder / "result").write_text("x")


@pytest.mark.parametrize("name", [".out.partial", ".out.old"])
@pytest.mark.parametrize("kind", ["folder", "link", "file", "link within"])
def test_folders_in_the_way_that_are_not_ours_are_left_alone(
    tmp_path: Path, name: str, kind: str
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious").write_text("mine")
    place = tmp_path / name
    if kind == "folder":
        mine.rename(place)
        mine = place
    elif kind == "link":
        place.symlink_to("mine")
    elif kind == "file":
        place.write_text("mine")
    else:
        (place / ".resume").mkdir(parents=True)
        (place / "manifest.json").write_text("{}")
        (place / ".resume/key").symlink_to("../../mine/precious")
    with pytest.raises(OutputExists, match="left alone"):
        run.run_stage("x", tmp_path / "out", {}, {}, write_nothing, overwrite=True)
    assert (mine / "precious").read_text() == "mine"


@pytest.mark.parametrize("left", [(), (".resume/lock",), (".resume/lock", ".resume/key")])
def test_what_a_kill_leaves_of_our_own_is_no_obstacle(
    tmp_path: Path, left: tuple[str, ...]
) -> None:
    (tmp_path / ".out.partial/.resume").mkdir(parents=True)
    for name in left:
        (tmp_path / ".out.partial" / name).touch()
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old/manifest.json").write_text("{}")
    run.run_stage("x", tmp_path / "out", {}, {}, write_nothing)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_metadata_of_checkpoints_calls_nothing(tmp_path: Path) -> None:
    hostile = pickle.dumps(Bomb(tmp_path / "ran"), protocol=2)
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        PlainUnpickler(io.BytesIO(hostile)).load()
    planner = Planner()
    for content in (hostile, zipped(Bomb(tmp_path / "ran"))):
        with pytest.raises((pickle.UnpicklingError, RuntimeError)):
            planner.load_bytes(SimpleNamespace(), io.BytesIO(content))  # type: ignore[arg-type]
    assert not (tmp_path / "ran").exists()


def zipped(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


# ---------------------------------------------------------------------------------- report

HOSTILE = (
    "![x](../secret.txt)",
    "x\n\n![x](../secret.txt)\n\n",
    "`![x](../secret.txt)`",
    "```\n\n![x](../secret.txt)\n\n```",
    "````\n\n![x](images/../../secret.txt)\n",
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "<javascript:alert(1)>",
    "| ![x](../secret.txt) |\n|---|\n",
    "\r\r![x](../secret.txt)\r\r",
    "\u2028![x](../secret.txt)",
    "\x1b[2J\u202e",
    "![x](images/evil.png)",
)


@pytest.mark.parametrize("foreign", HOSTILE)
def test_foreign_text_in_a_report_is_text(tmp_path: Path, foreign: str) -> None:
    secret = "c2VjcmV0c2VjcmV0"  # base64 of what secret.txt holds
    (tmp_path / "secret.txt").write_text("secretsecret")
    (tmp_path / "run/images").mkdir(parents=True)
    (tmp_path / "run/images/evil.png").symlink_to("../../secret.txt")
    shown = (
        text.words(foreign),
        text.code(foreign),
        text.block(foreign, "toml"),
        text.table([text.words(foreign)], [[text.code(foreign)]]),
    )
    for markdown in shown:
        html = page.render(f"# x\n\n{markdown}\n", tmp_path / "run")
        assert secret not in html
        for tag in ("<script", "<img", 'href="javascript', "\x1b", "\u202e"):
            assert tag not in html.partition("</nav>")[2]


@pytest.mark.parametrize("source", ["../secret.txt", "images/x.png", "/etc/passwd", "plan.json"])
def test_a_page_shows_only_images_of_the_run(tmp_path: Path, source: str) -> None:
    (tmp_path / "secret.txt").write_text("secretsecret")
    (tmp_path / "run/images").mkdir(parents=True)
    (tmp_path / "run/images/x.png").symlink_to("../../secret.txt")
    (tmp_path / "run/plan.json").write_text("secretsecret")
    try:
        html = page.render(f"# x\n\n![alt]({source})\n", tmp_path / "run")
    except LaptopError:
        return
    assert "c2VjcmV0" not in html
