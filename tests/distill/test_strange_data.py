"""Training data as people's systems leave them, and as somebody who means harm writes them."""

import gzip
import http.server
import importlib
import io
import json
import os
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from laptop.cli import main
from laptop.distill import addresses, sources, tar_shards
from laptop.distill.settings import DataConfig
from laptop.distill.sources import Broken, Example, Folder
from laptop.distill.tar_shards import Tars
from laptop.errors import BadInput
from laptop.prompts import read_prompts
from laptop.training_data import source_of
from support.pictures import png, read, write_pictures, write_tar

SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]
LITTER = ["._0.png", "set/._000.png", ".DS_Store", "set/.DS_Store", "__MACOSX/set/000.png",
          "__MACOSX/._x.jpg", "Thumbs.db", "set/desktop.ini"]  # fmt: skip


def captions(source: Any) -> list[str]:
    return [record.caption for record in read(source)]


def members(path: Path, *infos: tarfile.TarInfo, **options: Any) -> Path:
    """A tar of members without content, and then one good record."""
    with tarfile.open(path, "w", **options) as tar:
        for info in infos:
            tar.addfile(info)
        for name, content in (("1.png", png(1)), ("1.txt", b"good")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def member(name: str, **values: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in values.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize("letter", SEPARATORS)
def test_only_ends_of_lines_end_a_line(tmp_path: Path, letter: str) -> None:
    caption = f"a{letter}b"
    line = json.dumps({"file_name": "0.png", "text": caption}, ensure_ascii=False)
    (tmp_path / "0.png").write_bytes(png(0))
    for end in ("\n", "\r\n"):
        content = end.join([line, line]) if letter >= " " else line.replace(letter, "-")
        (tmp_path / "metadata.jsonl").write_bytes(content.encode())
        assert len(captions(Folder(tmp_path))) == (2 if letter >= " " else 1)
        (tmp_path / "p.txt").write_bytes(f"{caption}{end}second{end}".encode())
        assert read_prompts(tmp_path / "p.txt") == [caption, "second"]
    write_tar(tmp_path / "a.tar", {"0.png": png(0), "0.txt": caption.encode()})
    assert captions(Tars(str(tmp_path / "a.tar"))) == [caption]


def test_text_that_takes_minutes_to_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    line = json.dumps({"file_name": "0.png", "text": "red " * 50_000})
    (tmp_path / "metadata.jsonl").write_text(line)
    (tmp_path / "p.txt").write_text("red " * 50_000)
    for reader, path in ((Folder, tmp_path), (read_prompts, tmp_path / "p.txt")):
        with pytest.raises(BadInput, match="100,000 are the most"):
            reader(path)
    write_tar(tmp_path / "a.tar", {"0.png": png(0), "0.json": line.encode()})
    (record,) = read(Tars(str(tmp_path / "a.tar")))
    assert record == Broken("a.tar/0", "a caption of 200,000 characters; 100,000 are the most")


def test_text_that_is_not_utf_8_is_named_and_never_loses_letters(tmp_path: Path) -> None:
    cafe = "un café"
    for content in (cafe.encode("latin-1"), cafe.encode("utf-16")):
        write_tar(
            tmp_path / "a.tar",
            {
                "0.png": png(0), "0.txt": content,
                "1.png": png(1), "1.json": b'{"text": "' + content + b'"}',
                "2.png": png(2), "2.txt": b"\xef\xbb\xbf" + cafe.encode(),
            },
        )  # fmt: skip
        *broken, good = read(Tars(str(tmp_path / "a.tar")))
        assert all(isinstance(b, Broken) and "is not UTF-8 text" in b.reason for b in broken)
        assert good.caption == cafe, "without a byte order mark"
        for name, reader in (("metadata.jsonl", Folder), ("p.txt", read_prompts)):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(BadInput, match="is not UTF-8 text"):
                reader(tmp_path if reader is Folder else tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "half \\ud83d"}')
    (tmp_path / "0.png").write_bytes(png(0))
    assert read(Folder(tmp_path)) == [Broken("0.png", "no text")]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./", "set/", "v1.0/a b/"])
def test_what_systems_add_to_a_tar_is_no_record(tmp_path: Path, form: int, prefix: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        tar.addfile(member("set", type=tarfile.DIRTYPE))
        for i in range(3):
            long = "x" * 120 if i else ""
            for name, content in (
                (LITTER[i], b"\0\5\x16\7Mac OS X"),
                (f"{prefix}{long}{i}.PNG", png(i)),
                (LITTER[i + 3], b"\0\5\x16\7"),
                (f"{prefix}{long}{i}.txt", f"número {i}".encode()),
                (LITTER[-1 - i % 2], b""),
            ):
                tar.addfile(member(name, size=len(content)), io.BytesIO(content))
    assert captions(Tars(str(tmp_path / "a.tar"))) == [f"número {i}" for i in range(3)]


def test_a_tar_may_be_packed_whatever_it_is_called(tmp_path: Path) -> None:
    plain = members(tmp_path / "a.tar").read_bytes()
    for name in ("b.tar", "b.tgz", "b.tar.gz"):
        (tmp_path / name).write_bytes(gzip.compress(plain))
        assert captions(Tars(str(tmp_path / name))) == ["good"]
        (tmp_path / name).write_bytes(gzip.compress(plain)[:-100])
        with pytest.raises(BadInput, match="cannot be read"):
            read(Tars(str(tmp_path / name)))


def test_members_that_are_no_files_are_left_out_and_nothing_is_written(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
    special = [member("0.txt", type=kind, linkname=str(secret)) for kind in kinds]
    before = sorted(tmp_path.iterdir())
    members(tmp_path / "a.tar", *special)
    assert captions(Tars(str(tmp_path / "a.tar"))) == ["good"]
    for name in ("../../evil", "/evil", "a/../../evil"):
        write_tar(tmp_path / "a.tar", {f"{name}.png": png(0), f"{name}.txt": b"a name, no path"})
        assert captions(Tars(str(tmp_path / "a.tar"))) == ["a name, no path"]
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "a.tar"])


def test_large_members_are_named_and_large_headers_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_shards, "PICTURE_BYTES", 5000)
    monkeypatch.setattr(sources, "PICTURE_BYTES", 5000)
    write_tar(
        tmp_path / "a.tar",
        {
            "0.png": png(0) + bytes(5000), "0.txt": b"large",
            "1.png": png(1), "1.txt": b"good", "1.mp4": bytes(9000),
        },
    )  # fmt: skip
    large, good = read(Tars(str(tmp_path / "a.tar")))
    assert isinstance(large, Broken)
    assert isinstance(good, Example)
    assert large.reason == "its png is too large"
    folder = write_pictures(tmp_path / "f")
    (folder / "p3.png").write_bytes(png(0) + bytes(5000))
    assert [r.id for r in read(Folder(folder)) if isinstance(r, Broken)] == ["p3.png"]
    monkeypatch.setattr(tar_shards, "HEADER_BYTES", 400)
    members(tmp_path / "b.tar", member("x" * 900), format=tarfile.GNU_FORMAT)
    with pytest.raises(BadInput, match="a member's attributes have"):
        Tars(str(tmp_path / "b.tar"))


JSON = {
    "deep": b"[" * 100_000, "list": b"[]", "number": b"5", "cut": b"{", "empty": b"",
    "huge number": b'{"text": ' + b"9" * 9000 + b"}",
}  # fmt: skip


@pytest.mark.parametrize("kind", JSON)
def test_json_that_holds_no_caption_is_named(tmp_path: Path, kind: str) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": png(0), "0.json": JSON[kind]})
    assert isinstance(read(Tars(str(tmp_path / "a.tar")))[0], Broken)
    (tmp_path / "metadata.jsonl").write_bytes(JSON[kind] + b"\n")
    with pytest.raises(BadInput, match="line 1: "):
        Folder(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../0.png", "{}/0.png", "a/../../0.png", "link.png", "loop", "pipe", ".", "", "0.png\0",
     "a" * 5000, "\ud800", 3, None, ["0.png"], "C:/0.png", "a\\b"],
)  # fmt: skip
def test_metadata_name_files_of_their_folder_only(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    (tmp_path / "0.png").write_bytes(png(0))
    (folder / "link.png").symlink_to(tmp_path / "0.png")
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    name = name.replace("{}", str(tmp_path)) if isinstance(name, str) else name
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}))
    with pytest.raises(BadInput, match="line 1: ") as e:
        Folder(folder)
    assert len(str(e.value)) < 1000


def test_the_hubs_cache_keeps_files_apart(tmp_path: Path) -> None:
    """A snapshot's files are links to blobs, of the same repository only."""
    repository = tmp_path / "datasets--me--it"
    snapshot, blobs = repository / "snapshots" / "12ab", repository / "blobs"
    write_pictures(blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    assert len(read(Folder(snapshot))) == 7
    (tmp_path / "outside.png").write_bytes(png(0))
    (blobs / "p3.png").unlink()
    (blobs / "p3.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(BadInput, match=r"line 4: .*leads out of"):
        Folder(snapshot)
    blobs.rename(tmp_path / "blobs")
    blobs.symlink_to(tmp_path / "blobs")
    with pytest.raises(BadInput, match="leads out of"):
        Folder(snapshot)


PLACES = ["a[1]", "{x}", "{0..2}", "a*", "b?", "[!a]", "{a", "x{1,2}y", "a::b", "a b'$(c)"]


@pytest.mark.parametrize("place", PLACES)
def test_a_path_that_exists_is_taken_as_it_is_written(tmp_path: Path, place: str) -> None:
    folder = tmp_path / place
    folder.mkdir()
    for number in range(3):
        write_tar(folder / f"{number}.tar", {"0.png": png(0), "0.txt": f"{number}".encode()})
        write_tar(folder / f"[{number}].tar", {"0.png": png(0), "0.txt": b"in brackets"})
    assert captions(Tars(f"{folder}/[1].tar")) == ["in brackets"]
    if "::" not in place:
        assert captions(Tars(f"{folder}/{{0..2}}.tar")) == ["0", "1", "2"]
        assert captions(Tars(f"{folder}/?.tar")) == ["0", "1", "2"]
        assert captions(Tars(f"{folder}/2.tar::{folder}/[0-1].tar")) == ["2", "0", "1"]
    write_pictures(folder / "f")
    assert len(read(source_of("tiny-sdxl", DataConfig(f"{folder}/f")))) == 7
    (folder / "p.txt").write_text("a prompt")
    config = DataConfig(f"prompts:{folder}/p.txt", count=1)
    assert captions(source_of("tiny-sdxl", config)) == ["a prompt"]


@pytest.mark.parametrize(
    "pattern",
    ["t{0..99999999}.tar", "t" + "{a,b}" * 40 + ".tar", "{" * 2000 + ".tar", "t{0.tar", "a**.tar",
     "t{0..1" + "0" * 5000 + "}.tar", "x" * 5000 + ".tar", "no\0.tar",
     "{a,{b,{c..z}{0..9999}}}.tar", "::.tar", "-::x.tar", "file:///no/such.tar", "d.tar",
     "pipe.tar", ""],
)  # fmt: skip
def test_patterns_that_name_nothing_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.tar").mkdir()
    os.mkfifo("pipe.tar")
    with pytest.raises(BadInput) as e:
        Tars(pattern)
    assert len(str(e.value)) < 1500


SCHEMES = ["pipe:", "pipe://", "PIPE:", "gs://", "ais://", "htgs://", "s3://", "ssh://", "ftp://", "sftp://",
           "scp://", "hf+x://", "weird://", "data:", "javascript:"]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_addresses_that_run_programs_need_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    def forbidden(*_args: object, **_options: object) -> None:
        raise AssertionError

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    monkeypatch.chdir(tmp_path)
    members(tmp_path / "a.tar")
    for source in (f"{scheme}touch PWNED; cat a.tar", f"a.tar::{scheme}touch PWNED; cat a.tar"):
        with pytest.raises(BadInput, match=r"runs a program.*--allow-commands.*a recipe cannot"):
            source_of("tiny-sdxl", DataConfig(source))
    assert not Path("PWNED").exists()


def test_only_the_command_line_allows_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    members(tmp_path / "a.tar")
    source = "pipe:touch RAN; cat a.tar"
    for config, word in (
        (f'[data]\nsource = "{source}"\n', "--allow-commands"),
        ("[data]\nallow_commands = true\n", "unknown"),
        ("allow_commands = true\n", "unknown"),
    ):
        Path("r.toml").write_text(config)
        for arguments in (
            ["cache", "--model", "tiny-sdxl", "-o", "c"],
            ["compress", "--model", "tiny-sdxl", "-o", "run"],
            ["distill", "--teacher", "tiny-sdxl", "--student", "tiny-sdxl", "--dry-run", "-o", "s"],
        ):
            result = CliRunner().invoke(main, [*arguments, "-c", "r.toml"])
            assert result.exit_code == 1, result.output
            assert word in result.output
            assert "Traceback" not in result.output
    assert not Path("RAN").exists()
    records = read(source_of("tiny-sdxl", DataConfig(source), allow_commands=True))
    assert [r.caption for r in records if isinstance(r, Example)] == ["good"]
    assert Path("RAN").exists()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server of `tmp_path`; /to/X redirects to X, /busy is so once."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any):
            super().__init__(*args, directory=str(tmp_path))

        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                self.end_headers()
            elif self.path == "/busy.tar" and asked.count(self.path) == 1:
                self.send_error(503)
            else:
                super().do_GET()

        def log_message(self, *_args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_a_server_leads_to_other_servers_and_to_nothing_else(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    members(tmp_path / "a.tar")
    members(tmp_path / "busy.tar")
    monkeypatch.setattr(addresses, "WAITS_S", (0.01,))
    for name in ("a.tar", f"to/{server}/a.tar", "busy.tar", "to//a.tar"):
        assert captions(Tars(f"{server}/{name}")) == ["good"], name
    with pytest.raises(BadInput, match="cannot be read"):
        Tars(f"{server}/to/file://{tmp_path}/a.tar")
    for name in ("to/ftp://127.0.0.1:9/a.tar", f"to/{server}/to/" * 30 + "a.tar", "a b'\".tar"):
        with pytest.raises(BadInput, match="cannot be read"):
            Tars(f"{server}/{name}")


def test_a_server_that_sends_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    socket = importlib.import_module("socket")
    monkeypatch.setattr(addresses, "PATIENCE_S", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(BadInput, match="timed out"),
    ):
        Tars(f"http://127.0.0.1:{silent.getsockname()[1]}/a.tar")
