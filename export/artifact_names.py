"""Names of files in a list of artifacts, which may come from a stranger."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laptop.errors import BadInput
from laptop.export.targets import TARGETS
from laptop.files import inside, plain_name, shown


def check_names(artifacts: Path, row: Mapping[str, Any], listed_in: str) -> None:
    """Raise `BadInput` unless a row names files as `laptop export` does, in the folder."""
    where = str(artifacts / listed_in)
    folder, _, file = row["file"].partition("/")
    wanted = TARGETS[row["target"]].file.format(component=row["component"])
    if folder.partition("-")[0] != row["target"] or file != wanted:
        raise BadInput(
            f"{where} names {shown(row['file'])} as {row['target']} of {row['component']}; "
            f"`laptop export` names it {row['target']}/{wanted}, or {row['target']}-PRECISION/…. "
            "Export again with --overwrite."
        )
    plain_name(folder, where)
    for name in (row["file"], *row.get("chunks", ())):
        path = inside(artifacts, name, where)
        plain_name(path.name, where)
