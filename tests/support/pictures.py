"""Captioned pictures as folders and tars."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from laptop.distill.sources import Broken, Example, Source

CAPTIONS = [f"picture {i}" for i in range(7)]


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_pictures(folder: Path, **changes: dict[str, Any]) -> Path:
    """A folder with seven captioned pictures; `changes` by file name, e.g. `p3={"text": ""}`."""
    folder.mkdir(parents=True)
    lines = []
    for i, caption in enumerate(CAPTIONS):
        (folder / f"p{i}.png").write_bytes(png(i))
        lines.append({"file_name": f"p{i}.png", "text": caption} | changes.get(f"p{i}", {}))
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(source: Source) -> list[Example | Broken]:
    return [record for part in range(len(source.parts)) for record in source.read(part)]
