"""The files of a finished folder as its manifest records them, to see what is gone or changed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

from laptop.fields import Length, Plain
from laptop.files import MANIFEST, files_in, inside, sha256

HASHED_BYTES = 64 << 20  # larger files are recorded by size: hashing them takes a while
DIGEST = "manifest_sha256"  # of all else that a manifest says


class Manifest(TypedDict, total=False):
    """What is read of a manifest.json; a stage adds facts of its own."""

    stage: Annotated[str, Plain(), Length(100)]
    key: str
    config: Mapping[str, Any]
    inputs: dict[str, str]
    result: dict[str, tuple[int, str | None]]  # size and sha256 by path
    result_sha256: str  # of a result that is one file
    files: Mapping[str, Any]  # by path, in older manifests
    manifest_sha256: str


def record(folder: Path, *, without: str) -> dict[str, list[Any]]:
    """Size and sha256 (None: too large) of each file but manifests and the folder `without`."""
    paths = (p for p in files_in(folder) if without not in p.parts)
    return {
        str(path.relative_to(folder)): _measured(path)
        for path in paths
        if not path.name.endswith(MANIFEST)
    }


def _measured(path: Path) -> list[Any]:
    size = path.stat().st_size
    return [size, sha256(path) if size <= HASHED_BYTES else None]


def changed(folder: Path, manifest: Manifest, where: str) -> Path | None:
    """The first file in `folder` that is not what its manifest says; None where all are.

    An older manifest lists no files, or their names alone. Raises `BadInput` for names that lead
    out of `folder`; `where` names the manifest.
    """
    recorded, names = manifest.get("result", {}), manifest.get("files", {})
    for name in [*recorded, *names]:
        path = inside(folder, name, where)
        if not path.is_file() or (name in recorded and _measured(path) != [*recorded[name]]):
            return path
    return None


def signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the sha256 of what it says, so that a damage to it is seen."""
    content = {k: v for k, v in manifest.items() if k != DIGEST}
    plain = json.loads(json.dumps(content))  # keys as JSON has them
    text = json.dumps(plain, sort_keys=True)
    return {**content, DIGEST: hashlib.sha256(text.encode()).hexdigest()}


def is_intact(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest says what it said when it was signed; an older one has no signature."""
    return DIGEST not in manifest or signed(manifest)[DIGEST] == manifest[DIGEST]
