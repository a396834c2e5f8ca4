"""Check a built wheel as a user meets it: what it claims, what it carries, that its command runs.

The command runs in a new environment that holds the wheel and, as links into this environment,
the distributions that the wheel declares as needed (no extras, nothing for development).
"""

import subprocess
import sys
import tempfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

CARRIED = (
    "laptop/py.typed",
    "laptop/models/laptop_unet_v1.py",
    "laptop/prompts.txt",
    "laptop/recipes/tiny-sdxl.toml",
    "laptop/tiny/model/model_index.json",
    "laptop/tiny/model/unet/config.json",
)
COMMANDS = (
    ("--help",),
    ("models",),
    ("doctor",),
    ("generate", "tiny-sdxl", "a large red circle on white", "-o", "image.png"),
)


def check_content(wheel: Path) -> None:
    """Exit with a message unless the wheel claims only `laptop` and carries its data."""
    names = zipfile.ZipFile(wheel).namelist()
    claimed = {n.split("/")[0] for n in names if ".dist-info/" not in n}
    if claimed != {"laptop"}:
        sys.exit(f"{wheel} claims {sorted(claimed)}; it must claim only 'laptop'")
    if missing := [n for n in CARRIED if n not in names]:
        sys.exit(f"{wheel} lacks {', '.join(missing)}")
    if not any(n.startswith("laptop/tiny/model/") and n.endswith(".safetensors") for n in names):
        sys.exit(f"{wheel} carries no weights of tiny-sdxl")
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB, all there")


def needed(
    requirements: list[str], extras: frozenset[str], packages: dict[str, frozenset[str]]
) -> None:
    """Add to `packages` each distribution (and its extras) that `requirements` need, and so on."""
    for text in requirements:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": e}) for e in extras or {""}):
            continue
        wanted = frozenset(requirement.extras)
        if requirement.name in packages and wanted <= packages[requirement.name]:
            continue
        packages[requirement.name] = wanted | packages.get(requirement.name, frozenset())
        needed(metadata.requires(requirement.name) or [], wanted | {""}, packages)


def link(name: str, folder: Path) -> None:
    """Make what the installed distribution `name` put into site-packages importable in `folder`."""
    distribution = metadata.distribution(name)
    for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
        source = Path(str(distribution.locate_file(top)))
        if source.exists() and not (folder / top).exists():
            (folder / top).symlink_to(source)


def check_commands(wheel: Path) -> None:
    """Install the wheel beside its declared dependencies only, and run some commands there."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        venv.create(home / "venv", with_pip=True)
        python = home / "venv" / "bin" / "python"
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", wheel.resolve()]
        subprocess.run(install, check=True)
        site = next((home / "venv").glob("lib/python*/site-packages"))
        found: dict[str, frozenset[str]] = {}
        needed(_requires(site), frozenset({""}), found)
        for distribution in found:
            link(distribution, site)
        for command in COMMANDS:
            print("laptop", *command, flush=True)
            subprocess.run([python.with_name("laptop"), *command], check=True, cwd=home)


def _requires(site: Path) -> list[str]:
    distribution = next(iter(metadata.distributions(name="laptop-diff", path=[str(site)])))
    return distribution.requires or []


if __name__ == "__main__":
    check_content(Path(sys.argv[1]))
    check_commands(Path(sys.argv[1]))
