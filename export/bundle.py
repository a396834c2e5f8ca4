"""One file of all artifacts, for CI to keep: a zip with `SHA256SUMS`.

The same folder makes the same bytes every time. Two exports of one model differ in the JSON files,
which hold the seconds and the memory that each component took.
"""

import zipfile
from pathlib import Path

from laptop import files, machine
from laptop.errors import OutputExists

SUMS = "SHA256SUMS"
MOMENT = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can hold, for all files


def bundle(artifacts: Path) -> Path:
    """Write ARTIFACTS.zip next to the folder; returns its path. Files are stored, not compressed.

    `SHA256SUMS` in it is checked by `sha256sum -c` where the zip was unpacked.
    """
    out = zip_path(artifacts)
    paths = files.files_in(artifacts)
    machine.need_space(out.parent, sum(p.stat().st_size for p in paths))
    partial = out.with_name(f".{out.name}.partial")
    partial.unlink(missing_ok=True)  # it may be a link
    with zipfile.ZipFile(partial, "x") as archive:
        sums = ""
        for path in paths:
            name = path.relative_to(artifacts).as_posix()
            sums += f"{files.sha256(path)}  {name}\n"
            with path.open("rb") as source, archive.open(_entry(name), "w", force_zip64=True) as to:
                while block := source.read(1 << 20):
                    to.write(block)
        archive.writestr(_entry(SUMS), sums)
    partial.replace(out)
    return out


def zip_path(artifacts: Path) -> Path:
    """The path of the zip; `OutputExists` where another file is, which is left alone."""
    out = artifacts.with_name(f"{artifacts.name}.zip")
    if out.exists():
        try:
            with zipfile.ZipFile(out) as archive:
                is_own = SUMS in archive.namelist()
        except (OSError, zipfile.BadZipFile):
            is_own = False
        if not is_own:
            raise OutputExists(
                f"{out} exists and is no bundle of `laptop export`, so it is left alone. Move it "
                "away, or choose another -o."
            )
    return out


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, MOMENT)
    entry.external_attr = 0o644 << 16
    return entry
