"""The report of `laptop verify`: the distance of each artifact from the PyTorch model."""

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from laptop import console, contents, files, run
from laptop.errors import BadInput, CheckFailed
from laptop.fields import Plain
from laptop.machine import machine
from laptop.records import Record

REPORT = "report.json"
FAILED = "failed"  # the state of an artifact below its floor
NOTED = ("artifact", "component", "sha256", "state", "psnr_db", "floor_db")  # in the manifest
Text = Annotated[str, Plain(empty=True)]


@dataclass(frozen=True, kw_only=True)
class ParityRow(Record):
    """The distance of one artifact, or of all pictures of a target, from PyTorch."""

    target: Text
    component: Text
    artifact: Text = ""  # its file, relative to the artifacts' folder
    sha256: Text = ""
    precision: Text
    state: Text
    samples: int = 0
    psnr_db: float | None  # of the worst output of the worst sample; None: none was computed
    floor_db: float | None
    cosine: float | None = None
    max_abs_error: float | None = None
    identical: bool = False  # infinite PSNR
    nonfinite: int = 0  # NaN and Inf among the outputs
    reason: str | None = None  # why it failed


@dataclass(frozen=True, kw_only=True)
class ParityReport(Record):
    """Every artifact of a folder, compared with the PyTorch model."""

    SCHEMA = "laptop.parity/1"
    REMEDY = "Verify again with --overwrite."

    results: tuple[ParityRow, ...]

    @property
    def failed(self) -> list[ParityRow]:
        """The artifacts that do not reach their floor."""
        return [row for row in self.results if row.state == FAILED]


def check(report: ParityReport) -> None:
    """Raise `CheckFailed` that lists the components which did not reach their floor.

    Also where there was nothing to verify, as after an export of which every target failed.
    """
    if not report.results:
        raise CheckFailed("nothing was verified: the artifacts' folder holds none.")
    if report.failed:
        lines = "; ".join(f"{row.target} {row.component}: {row.reason}" for row in report.failed)
        raise CheckFailed(
            f"{len(report.failed)} of {len(report.results)} artifacts differ from PyTorch "
            f"({lines}). Do not ship them; the .npy files next to the report hold inputs and both "
            "outputs."
        )


def note_verified(artifacts: Path, report: ParityReport) -> None:
    """Write what was verified into the artifacts' manifest, with this machine and its versions."""
    path = run.manifest_of(artifacts)
    if not path.exists():
        return  # a bare folder from elsewhere
    manifest = files.read_json(path)
    if not contents.is_intact(manifest):
        raise BadInput(f"{path} was changed since it was made. Export again with --overwrite.")
    rows = [{key: getattr(row, key) for key in NOTED} for row in report.results]
    manifest["verified"] = {"results": rows, **machine()}
    try:
        files.write_json(path, contents.signed(manifest))
    except OSError as e:  # artifacts that are kept from changes; the report has it all
        if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        console.say(f"verify: {path} cannot be written, so it does not say what was verified.")
