"""The run folder: finished work is kept, unfinished work never looks finished."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from laptop import console, files, run, unfinished
from laptop.errors import BadInput, OutputExists
from support.stage import Config, Work


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An input file of a stage."""
    path = tmp_path / "source.txt"
    path.write_text("input")
    return path


def test_a_finished_stage_is_skipped_when_nothing_changed(tmp_path: Path, source: Path) -> None:
    work = Work()
    for _ in range(2):
        run.run_stage("toy", tmp_path / "out", Config(), {"source": source}, work)
    assert work.calls == 1


def test_the_manifest_tells_how_the_result_was_made(tmp_path: Path, source: Path) -> None:
    out = run.run_stage("toy", tmp_path / "out", Config(seed=5), {"source": source}, Work())
    manifest = files.read_json(out / "manifest.json", "laptop.manifest/1")
    assert manifest["stage"] == "toy"
    assert manifest["config"] == {"steps": 3, "seed": 5}
    assert manifest["seed"] == 5
    assert manifest["inputs"] == {"source": files.sha256(source)}
    assert manifest["versions"]["torch"]
    assert manifest["seconds"] >= 0
    assert manifest["peak_memory_bytes"] > 1e6
    assert manifest["samples"] == 7, "what the work returns is added"


def test_changed_settings_are_refused_and_named(tmp_path: Path) -> None:
    out = run.run_stage("toy", tmp_path / "out", Config(steps=3), {}, Work())
    with pytest.raises(OutputExists, match=r"steps: 3 there, 9 asked.*--overwrite"):
        run.run_stage("toy", out, Config(steps=9), {}, Work())
    assert (out / "result.txt").read_text() == "whole"


def test_a_changed_input_is_refused_and_named(tmp_path: Path, source: Path) -> None:
    out = run.run_stage("toy", tmp_path / "out", Config(), {"source": source}, Work())
    source.write_text("another")
    with pytest.raises(OutputExists, match="input source changed"):
        run.run_stage("toy", out, Config(), {"source": source}, Work())


@pytest.mark.parametrize("overwrite", [False, True, "stale"])
def test_a_result_of_other_work_is_never_touched(tmp_path: Path, overwrite: run.Overwrite) -> None:
    out = run.run_stage("toy", tmp_path / "out", Config(), {}, Work())
    with pytest.raises(OutputExists, match="holds a finished `toy`, which is left alone"):
        run.run_stage("game", out, Config(), {}, Work(), overwrite=overwrite)
    assert files.read_json(out / "manifest.json")["stage"] == "toy"


def test_a_link_to_a_folder_gets_the_result_in_that_folder(tmp_path: Path) -> None:
    (tmp_path / "disk" / "here").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "here")
    assert run.run_stage("toy", link, Config(), {}, Work()) == link
    assert link.is_symlink()
    assert (tmp_path / "disk" / "here" / "manifest.json").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"disk", "link"}


def test_a_mount_point_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "disk")
    with pytest.raises(BadInput, match="Name a folder in it"):
        run.run_stage("toy", tmp_path / "disk", Config(), {}, work)
    assert work.calls == 0


def test_a_missing_input_is_named_before_any_work(tmp_path: Path) -> None:
    work = Work()
    with pytest.raises(BadInput, match=r"nowhere\.txt does not exist"):
        run.run_stage("toy", tmp_path / "out", Config(), {"a": tmp_path / "nowhere.txt"}, work)
    assert work.calls == 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_not_ours_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(OutputExists, match="no result of `laptop toy`"):
        run.run_stage("toy", tmp_path / "thesis", Config(), {}, Work(), overwrite=overwrite)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_file_that_is_not_ours_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(OutputExists, match="no result of `laptop toy`"):
        run.run_stage("toy", tmp_path / "plan.json", Config(), {}, Work("plan.json"))
    assert (tmp_path / "plan.json").read_text() == "{}"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    out = run.run_stage("toy", tmp_path / "out", Config(), {}, Work())
    assert (out / "result.txt").exists()


def test_a_place_that_cannot_be_written_is_one_message(source: Path) -> None:
    with pytest.raises(BadInput, match="cannot write to"):
        run.run_stage("toy", source / "out", Config(), {}, Work())


def test_overwrite_replaces_the_old_result_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    out = run.run_stage("toy", tmp_path / "out", Config(steps=1), {}, Work("old.txt"))
    with pytest.raises(KeyboardInterrupt):
        run.run_stage(
            "toy", out, Config(steps=2), {}, Work(dies=KeyboardInterrupt()), overwrite=True
        )
    assert (out / "old.txt").read_text() == "whole"
    run.run_stage("toy", out, Config(steps=2), {}, Work("new.txt"), overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["half.txt", "manifest.json", "new.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing is left beside it"


def test_unfinished_work_is_taken_up_by_the_same_command(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run.run_stage("toy", tmp_path / "out", Config(), {}, Work(dies=KeyboardInterrupt()))
    assert not (tmp_path / "out").exists()
    again = Work()
    run.run_stage("toy", tmp_path / "out", Config(), {}, again)
    assert again.leftovers == ["half.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_unfinished_work_of_other_settings_is_refused_until_overwrite(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run.run_stage("toy", tmp_path / "out", Config(1), {}, Work(dies=KeyboardInterrupt()))
    with pytest.raises(OutputExists, match="unfinished work made with other settings"):
        run.run_stage("toy", tmp_path / "out", Config(2), {}, Work())
    fresh = Work()
    run.run_stage("toy", tmp_path / "out", Config(2), {}, fresh, overwrite=True)
    assert fresh.leftovers == []


def test_a_file_result_carries_its_manifest_beside_it(tmp_path: Path) -> None:
    work = Work("plan.json")
    for _ in range(2):
        out = run.run_stage("toy", tmp_path / "plan.json", Config(), {}, work)
    assert work.calls == 1
    assert out.read_text() == "whole"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.manifest.json"]


def test_a_file_and_a_manifest_that_do_not_belong_together_are_not_finished(tmp_path: Path) -> None:
    """A kill between the two renames of an overwritten file result."""
    out = tmp_path / "plan.json"
    run.run_stage("toy", out, Config(1), {}, Work("plan.json"))
    old = out.read_text()
    run.run_stage("toy", out, Config(2), {}, Work("plan.json"), overwrite=True)
    out.write_text(old + " but of the first settings")
    work = Work("plan.json")
    with pytest.raises(OutputExists, match=r"plan\.json"):
        run.run_stage("toy", out, Config(2), {}, work)
    run.run_stage("toy", out, Config(2), {}, work, overwrite=True)
    assert out.read_text() == "whole"


def test_an_old_result_left_by_a_kill_does_not_stop_the_next_overwrite(tmp_path: Path) -> None:
    out = run.run_stage("toy", tmp_path / "out", Config(1), {}, Work())
    shutil.copytree(out, tmp_path / ".out.old")  # killed before the old result was removed
    run.run_stage("toy", out, Config(2), {}, Work("new.txt"), overwrite=True)
    assert (out / "new.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_broken_manifest_can_be_overwritten(tmp_path: Path) -> None:
    out = run.run_stage("toy", tmp_path / "out", Config(), {}, Work())
    manifest = out / "manifest.json"
    manifest.write_text(manifest.read_text()[:40])
    with pytest.raises(BadInput, match="not valid JSON"):
        run.run_stage("toy", out, Config(), {}, Work())
    run.run_stage("toy", out, Config(), {}, Work(), overwrite=True)
    assert files.read_json(manifest)["stage"] == "toy"


def test_work_that_had_done_nothing_yet_is_no_obstacle_to_other_work(tmp_path: Path) -> None:
    def stopped(_: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run_stage("toy", tmp_path / "out", {"a": 1}, {}, stopped)
    assert run.run_stage("toy", tmp_path / "out", {"a": 2}, {}, Work()).is_dir()


KILLED = """
import os, signal, sys
from pathlib import Path
from laptop import run
def work(folder):
    (folder / "half.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
run.run_stage("toy", Path(sys.argv[1]), {"steps": 3, "seed": 0}, {}, work)
"""


@pytest.mark.parametrize("name", ["out", "plan.json"])
def test_a_kill_in_the_middle_leaves_nothing_that_looks_finished(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [f".{name}.partial"]
    again = Work(name)
    run.run_stage("toy", out, Config(), {}, again)
    assert again.leftovers == ["half.txt"], "the same settings take the work up"
    assert out.exists()


def test_two_processes_do_not_work_on_the_same_result(tmp_path: Path) -> None:
    out, inner = tmp_path / "out", Work()

    def work(folder: Path) -> None:
        with pytest.raises(OutputExists, match="another process is at work"):
            run.run_stage("toy", out, Config(), {}, inner)
        (folder / "result.txt").write_text("whole")

    run.run_stage("toy", out, Config(), {}, work)
    assert inner.calls == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "result.txt"]


def test_what_is_needed_to_go_on_outlives_a_kill_before_the_manifest(tmp_path: Path) -> None:
    """A stage that was killed between its last file and its manifest does not start anew."""
    seen: list[bool] = []

    def work(folder: Path) -> None:
        checkpoint = unfinished.resume_folder(folder) / "checkpoint"
        seen.append(checkpoint.exists())
        checkpoint.write_text("state")
        (folder / "result.txt").write_text("whole")
        if len(seen) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run_stage("toy", tmp_path / "out", Config(), {}, work)
    out = run.run_stage("toy", tmp_path / "out", Config(), {}, work)
    assert seen == [False, True]
    assert not (out / ".resume").exists()


def test_a_truncated_json_file_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    files.write_json(path, {"schema": "laptop.scores/1", "units": [1, 2, 3]})
    path.write_text(path.read_text()[:30])
    with pytest.raises(BadInput, match=r"scores\.json is not valid JSON.*cut off"):
        files.read_json(path, "laptop.scores/1")


def test_bytes_that_are_no_text_are_the_same_message(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="not valid JSON"):
        files.read_json(tmp_path / "scores.json")


@pytest.mark.parametrize("value", [{"schema": "laptop.plan/1"}, {}])
def test_json_of_another_kind_is_refused_with_both_schemas(tmp_path: Path, value: object) -> None:
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(BadInput, match=r"needed is 'laptop\.scores/1'"):
        files.read_json(tmp_path / "a.json", "laptop.scores/1")


@pytest.mark.parametrize("value", [[], 3])
def test_json_that_is_no_object_is_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(BadInput, match="is no JSON object but a"):
        files.read_json(tmp_path / "a.json")


def test_a_missing_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"a\.json does not exist"):
        files.read_json(tmp_path / "a.json")


def test_the_hash_of_a_folder_depends_on_names_and_bytes_but_not_on_manifests(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "folder"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text("{}")
    first = files.sha256(folder)
    (folder / "manifest.json").write_text("{}")
    assert files.sha256(folder) == first
    (folder / "unet" / "config.json").write_text("{ }")
    changed = files.sha256(folder)
    assert changed != first
    (folder / "unet" / "config.json").rename(folder / "unet" / "other.json")
    assert files.sha256(folder) not in (first, changed)


def test_what_lies_behind_a_link_counts(tmp_path: Path) -> None:
    (tmp_path / "model" / "store").mkdir(parents=True)
    (tmp_path / "model" / "store" / "weights").write_text("old")
    (tmp_path / "model" / "unet").symlink_to("store")
    before = files.sha256(tmp_path / "model")
    (tmp_path / "model" / "store" / "weights").write_text("new")
    assert files.sha256(tmp_path / "model") != before


@pytest.mark.parametrize("name", ["out", "deep/er/out.json"])
def test_a_result_inside_its_input_is_refused(tmp_path: Path, name: str) -> None:
    work = Work()
    with pytest.raises(BadInput, match="which it is made from"):
        run.run_stage("toy", tmp_path / name, Config(), {"model": tmp_path}, work)
    assert work.calls == 0


@pytest.mark.parametrize("target", ["nowhere/x", "out"])
def test_a_link_that_leads_nowhere_is_no_place_for_a_result(
    tmp_path: Path, source: Path, target: str
) -> None:
    (tmp_path / "out").symlink_to(target)
    with pytest.raises(BadInput, match="is a link that leads nowhere"):
        run.run_stage("stage", tmp_path / "out", Config(), {"source": source}, Work())
    assert not (tmp_path / "nowhere").exists()


def test_a_result_within_another_stages_is_refused(tmp_path: Path, source: Path) -> None:
    first = run.run_stage("stage", tmp_path / "a", Config(), {"source": source}, Work())
    with pytest.raises(BadInput, match=r"is in .*, a finished result"):
        run.run_stage("next", first / "b", Config(), {"made": first / "result.txt"}, Work())


def test_names_that_are_no_utf_8_are_hashed(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))).write_text("x")
    assert len(files.sha256(tmp_path)) == 64


def test_progress_goes_to_stderr_and_stdout_stays_free(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("[not markup] 3 of 5")
    assert list(console.track(range(3), "toy", 5, done=2)) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert out == ""
    assert "[not markup] 3 of 5" in err
    assert "5/5" in err
