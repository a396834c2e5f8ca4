"""Make a stage's result in a partial folder, rename it when whole, and prove it by a manifest.

A finished result carries a manifest (`DIR/manifest.json`, or `X.manifest.json` next to a file
`X.json`) with the resolved config, the sha256 of each input, versions, seed, device, seconds and
peak memory. Its `key` is the hash of stage, config and inputs: the same key means that the work
need not be done again. Unfinished work is in `.NAME.partial` and is continued by the same key; a
second process that wants the same is refused.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Literal

from laptop import contents
from laptop.console import say
from laptop.errors import BadInput, OutputExists
from laptop.files import KEY, MANIFEST, has_schema, read_json, sha256, shown, write_json
from laptop.hosts import scratch
from laptop.machine import machine, peak_memory_bytes, reset_peak_memory
from laptop.unfinished import RESUME, claimed, full_disk_reported, prepare, resume_folder

Overwrite = bool | Literal["stale"]  # True: make again in any case; "stale": if anything changed
Work = Callable[[Path], Mapping[str, object] | None]
SCHEMA = "laptop.manifest/1"


def run_stage(
    name: str,
    out: Path,
    config: object,
    inputs: Mapping[str, Path],
    work: Work,
    *,
    overwrite: Overwrite = False,
    go_on: bool = False,
) -> Path:
    """Make `out` by `work(folder)` unless it is finished already; returns `out`.

    With `go_on`, `work` gets what is finished, to try again what failed in it.

    `work` writes its whole result into the folder it is given (for a file result: a file named
    `out.name`), may find there what an earlier, killed call left, and may return facts for the
    manifest. `config` is a dataclass or a mapping that JSON can hold; `inputs` are files and
    folders. Raises `OutputExists` where `out` holds something else, `BadInput` where nothing can
    be made.
    """
    scratch.remove_orphans()
    _check_output(out, name, inputs)
    asked, out = out, out.resolve() if out.is_symlink() else out
    settings = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config
    identity = {
        "stage": name,
        "config": json.loads(json.dumps(settings, default=str)),
        "inputs": {role: sha256(path) for role, path in inputs.items()},
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    wanted = contents.Manifest(**identity, key=key)
    partial = out.parent / f".{out.name}.partial"
    _need_own(partial, RESUME)
    _need_own(_old(out), MANIFEST)
    if _is_finished(out, wanted, overwrite):
        if not go_on:
            say(f"{name}: {out} is up to date")
            return asked
        _reopen(out, partial, key)
    with claimed(partial):
        prepare(partial, key, bool(overwrite))
        if not (partial / MANIFEST).exists():  # else whole, but killed before it was in its place
            _make(partial, out, wanted, work)
        _replace(partial, out)
    return asked


def _check_output(out: Path, name: str, inputs: Mapping[str, Path]) -> None:
    """Raise `BadInput` for a place in what the result is made from, and for a mount point."""
    if out.is_symlink() and not out.exists():
        raise BadInput(f"{out} is a link that leads nowhere. Remove it, or choose another -o.")
    for path in inputs.values():
        if path.resolve() in out.resolve().parents:  # then it would change what it is made from
            raise BadInput(f"{out} is in {path}, which it is made from. Choose another -o.")
        if path.parent.resolve() in out.resolve().parents and has_schema(
            path.parent / MANIFEST, SCHEMA
        ):
            raise BadInput(f"{out} is in {path.parent}, a finished result. Choose another -o.")
    if out.is_mount():  # nothing can be renamed to it
        raise BadInput(f"{out} is a mount point. Name a folder in it, such as -o {out / name}.")


def _old(out: Path) -> Path:
    """Return the path where an old result waits while a new one takes its place."""
    return out.parent / f".{out.name}.old"


def _need_own(folder: Path, mark: str) -> None:
    """Raise `OutputExists` for a folder of such a name that is not from here: it has no `mark`.

    It may be a user's own; one with links in it would let work write elsewhere.
    """
    if not os.path.lexists(folder):
        return
    links = [folder] if folder.is_symlink() else _links(folder)
    is_own = folder.is_dir() and ((folder / mark).exists() or not any(folder.iterdir()))
    if links or not is_own:
        why = f"{links[0]} is a link" if links else f"it has no {mark}"
        raise OutputExists(
            f"{folder} is in the way and was not made by laptop ({why}), so it is left alone. "
            "Move it away, or choose another -o."
        )


def _links(folder: Path) -> list[Path]:
    walk = os.walk(folder)
    paths = (Path(place, name) for place, folders, names in walk for name in (*folders, *names))
    return [path for path in paths if path.is_symlink()]


def _remove(folder: Path, mark: str) -> None:
    """Remove a folder, its `mark` last: what a kill leaves of it is still known as our own."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name != mark:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _make(partial: Path, out: Path, wanted: contents.Manifest, work: Work) -> None:
    """Do the work in `partial`, and write its manifest last of all."""
    start = time.perf_counter()
    reset_peak_memory()
    with full_disk_reported(partial):
        facts = work(partial) or {}
        manifest = {
            "schema": SCHEMA,
            "stage": wanted.stage,
            "config": wanted.config,
            "inputs": wanted.inputs,
            "key": wanted.key,
            "seed": wanted.config.get("seed"),
            "seconds": round(time.perf_counter() - start, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            **machine(),
            **facts,
        }
        if out.suffix == ".json":
            manifest["result_sha256"] = sha256(partial / out.name)
        else:
            manifest["result"] = contents.record(partial, without=RESUME)
        write_json(partial / MANIFEST, contents.signed(manifest))


def _reopen(out: Path, partial: Path, key: str) -> None:
    """Make a finished folder unfinished work again; `OutputExists` if there is other such work."""
    if partial.exists():
        raise OutputExists(
            f"{partial} holds unfinished work, so what failed in {out} cannot be tried again. "
            "Remove it, or choose another -o."
        )
    if links := _links(out):
        raise OutputExists(f"{out} has a link in it ({links[0]}), so no work goes on in it.")
    (resume_folder(out) / KEY).write_text(key)
    out.replace(partial)
    manifest_of(partial).unlink()


def manifest_of(out: Path) -> Path:
    """Return the path of a result's manifest: in a folder, or next to a file."""
    return out.with_suffix(f".{MANIFEST}") if out.suffix == ".json" else out / MANIFEST


def _is_finished(out: Path, wanted: contents.Manifest, overwrite: Overwrite) -> bool:
    """Whether `out` is the wanted result; raises for something that must not be lost."""
    if not need_ours(out, str(wanted.stage)):
        return False
    if overwrite is True:
        return False
    try:
        old = read_manifest(out)
    except BadInput:
        if overwrite == "stale":
            return False
        raise
    changed = _changed(out, old)
    if old.key == wanted.key and not changed:
        return True
    if overwrite == "stale":
        return False
    if changed:  # by hand, by a bad disk, or a kill between the two renames of a file result
        raise OutputExists(
            f"{changed} is not as it was when {out.name} was made; it was changed since. "
            "Pass --overwrite to make it again, or choose another -o."
        )
    changes = "; ".join(_differences(old, wanted)) or "another version of the format"
    raise OutputExists(
        f"{out} holds a finished `{wanted.stage}` made from something else ({changes}). "
        "Pass --overwrite to make it again, or choose another -o."
    )


def read_manifest(out: Path) -> contents.Manifest:
    """The manifest of the result `out`; `BadInput` for one that is missing or broken."""
    return contents.Manifest.read(manifest_of(out))


def _changed(out: Path, manifest: contents.Manifest) -> Path | None:
    """Return the first file of a result that was changed since it was made, or None."""
    if not contents.is_intact(read_json(manifest_of(out))):
        return manifest_of(out)
    if out.is_dir():
        return contents.changed(out, manifest, str(manifest_of(out)))
    return None if manifest.result_sha256 == sha256(out) else out


def need_ours(out: Path, stage: str) -> bool:
    """Return whether `out` is a result of `stage`; `OutputExists` for anything else but nothing."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not manifest_of(out).exists():
        raise OutputExists(
            f"{out} exists and is no result of `laptop {stage}` (it has no manifest), so it is "
            "left alone. Choose another -o."
        )
    try:
        made_by = read_manifest(out).stage
    except BadInput:  # cut off: it is made again in any case
        return True
    if made_by != stage:  # what was made by other work, or is even an input of this
        raise OutputExists(
            f"{out} holds a finished `{made_by}`, which is left alone. Choose another -o."
        )
    return True


def _differences(old: contents.Manifest, wanted: contents.Manifest) -> Iterator[str]:
    """Each setting and each input that differs from those of an older result."""
    for k in sorted({*old.config, *wanted.config}):
        before, after = old.config.get(k), wanted.config.get(k)
        if before != after:
            yield f"{k}: {shown(before)} there, {shown(after)} asked"
    for k in sorted({*old.inputs, *wanted.inputs}):
        if old.inputs.get(k) != wanted.inputs.get(k):
            yield f"input {k} changed"


def _replace(partial: Path, out: Path) -> None:
    """Put a whole result in its place; an old one is removed only after the new one stands."""
    if out.suffix == ".json":
        (partial / MANIFEST).replace(manifest_of(out))
        (partial / out.name).replace(out)
        _remove(partial, RESUME)
        return
    old = _old(out)
    if out.exists():
        _remove(old, MANIFEST)
        out.replace(old)
    partial.replace(out)
    shutil.rmtree(out / RESUME, ignore_errors=True)
    _remove(old, MANIFEST)
