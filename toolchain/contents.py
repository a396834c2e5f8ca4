"""Records of finished work: the manifest of a result with its files, and a run's laptop.json."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from laptop.errors import OutputExists
from laptop.fields import Length, Plain
from laptop.files import MANIFEST, files_in, inside, sha256
from laptop.records import Record

RUN_STATE = "laptop.json"  # in a run folder
HASHED_BYTES = 64 << 20  # larger files are recorded by size: hashing them takes a while
DIGEST = "manifest_sha256"  # of all else that a manifest says


@dataclass(frozen=True, kw_only=True)
class Manifest(Record):
    """manifest.json: what a result was made of and with; a stage adds facts of its own."""

    REMEDY = "It was changed since; pass --overwrite to make the result again."

    stage: Annotated[str, Plain(), Length(100)] | None = None
    key: str | None = None  # hash of stage, config and inputs
    config: Mapping[str, object] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)  # sha256 by role
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    result: Mapping[str, tuple[int, str | None]] = field(default_factory=dict)  # size and sha256
    result_sha256: str | None = None  # of a result that is one file
    files: Mapping[str, object] = field(default_factory=dict)  # by path, in older manifests


@dataclass(frozen=True, kw_only=True)
class FinishedStage(Record):
    """The entry of a finished stage in laptop.json."""

    state: str = "done"
    path: str = ""  # from the run folder
    key: str | None = None
    inputs: Mapping[str, str] | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunState(Record):
    """laptop.json: which stages of a run are finished, and with which settings and versions."""

    SCHEMA = "laptop.run/1"
    REMEDY = "Put back a copy of it, or choose another -o."
    LEFT_OUT = frozenset({"recipe", "versions", "device"})

    stages: Mapping[str, FinishedStage] = field(default_factory=dict)
    recipe: Mapping[str, object] | None = None
    versions: Mapping[str, str] | None = None
    device: str | None = None


def check_run_folder(out: Path) -> None:
    """Raise `OutputExists` unless `out` is a run or can become one, `BadInput` for a bad run."""
    if out.exists() and not out.is_dir():
        raise OutputExists(f"{out} is a file; the result is a folder. Choose another -o.")
    names = {p.name for p in out.iterdir()} if out.exists() else set()
    if RUN_STATE not in names and names - {f"{RUN_STATE}.tmp"}:
        raise OutputExists(
            f"{out} holds something that is no run of `laptop compress` (it has no laptop.json), "
            "so it is left alone. Choose another -o."
        )
    if RUN_STATE in names:
        RunState.read(out / RUN_STATE)


def record(folder: Path, *, without: str) -> dict[str, tuple[int, str | None]]:
    """Size and sha256 (None: too large) of each file but manifests and the folder `without`."""
    paths = (p for p in files_in(folder) if without not in p.parts)
    return {
        str(path.relative_to(folder)): _measured(path)
        for path in paths
        if not path.name.endswith(MANIFEST)
    }


def _measured(path: Path) -> tuple[int, str | None]:
    size = path.stat().st_size
    return size, sha256(path) if size <= HASHED_BYTES else None


def changed(folder: Path, manifest: Manifest, where: str) -> Path | None:
    """Return the first file in `folder` that differs from its manifest, or None.

    An older manifest lists no files, or their names alone. Raises `BadInput` for names that lead
    out of `folder`; `where` names the manifest.
    """
    for name in [*manifest.result, *manifest.files]:
        path, recorded = inside(folder, name, where), manifest.result.get(name)
        if not path.is_file() or (recorded and _measured(path) != recorded):
            return path
    return None


def signed(manifest: Mapping[str, object]) -> dict[str, object]:
    """Return the manifest with the sha256 of its content, so that damage to it is seen."""
    content = {k: v for k, v in manifest.items() if k != DIGEST}
    plain = json.loads(json.dumps(content))  # keys as JSON has them
    text = json.dumps(plain, sort_keys=True)
    return {**content, DIGEST: hashlib.sha256(text.encode()).hexdigest()}


def is_intact(manifest: Mapping[str, object]) -> bool:
    """Return whether a manifest is as it was when signed; an older one has no signature."""
    return DIGEST not in manifest or signed(manifest)[DIGEST] == manifest[DIGEST]
