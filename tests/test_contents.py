"""A finished result whose files or manifest have changed is not taken for whole."""

import json
import re
from pathlib import Path

import pytest

from laptop import run
from laptop.errors import LaptopError, OutputExists


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
@pytest.mark.parametrize("name", ["a.bin", "below/b.png"])
def test_a_finished_folder_that_lost_or_changed_a_file_is_not_taken_for_whole(
    tmp_path, name, damage
) -> None:
    def work(folder: Path) -> None:
        (folder / "below").mkdir(exist_ok=True)
        (folder / "a.bin").write_bytes(b"0123456789")
        (folder / "below" / "b.png").write_bytes(b"picture")

    out = run.run_stage("work", tmp_path / "out", {}, {}, work)
    path = out / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:3] if damage == "cut" else b"x" + content[1:])
    with pytest.raises(OutputExists, match=path.name):
        run.run_stage("work", out, {}, {}, work)
    run.run_stage("work", out, {}, {}, work, overwrite="stale")
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["out", "out.json"])
def test_a_manifest_that_changed_in_any_field_is_noticed(tmp_path, name) -> None:
    def work(folder: Path) -> dict[str, object]:
        if name.endswith(".json"):
            (folder / name).write_text("{}")
        return {"loss": 0.125, "by_step": {1: "a"}}

    out = run.run_stage("work", tmp_path / name, {"seed": 3}, {}, work)
    path = run.manifest_of(out)
    manifest = json.loads(path.read_text())
    for key in manifest.keys() - {"schema", "stage"}:
        for wrong in (None, [], {"a": 1}, "x"):
            if manifest[key] != wrong:
                path.write_text(json.dumps(manifest | {key: wrong}))
                with pytest.raises(LaptopError, match=re.escape(path.name)):
                    run.run_stage("work", out, {"seed": 3}, {}, work)
    run.run_stage("work", out, {"seed": 3}, {}, work, overwrite="stale")
    assert json.loads(path.read_text())["loss"] == 0.125


def test_an_older_manifest_without_a_list_of_files_still_counts(tmp_path) -> None:
    out = run.run_stage("work", tmp_path / "out", {}, {}, lambda _: None)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["result"], manifest["manifest_sha256"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    run.run_stage("work", out, {}, {}, lambda _: pytest.fail("the work was done again"))
