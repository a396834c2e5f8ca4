"""Processor time (user + system) of commands that ought to answer at once, in one or two versions.

python .ci/command_times.py laptop=PATH/TO/laptop [before=PATH/TO/OTHER/laptop] [--rounds 5]

The versions take turns, so that both see the same machine. Prints the median of each command.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = ROOT / "toolchain" / "tiny" / "model"
RECIPE = "[score]\nsamples = 2\nsteps = 2\n[prompts]\ncalibration = 1\n"
COMMANDS = {
    "a refused model": "score --model flux -o x",
    "a refused model, generate": "generate flux red -o x.png",
    "a refused model, bench": "bench flux -o x.json",
    "a refused setting": "compress --model tiny --ratio 2 -o x",
    "a refused target": "export tiny --to onxx -o x",
    "a refused ratio, plan": "plan scores --ratio 0.99 -o x.json",
    "compare": "compare plan.json plan.json",
    "models": "models",
    "report": "report run",
    "plan": "plan scores --ratio 0.4 --overwrite -o plan.json",
    "devices local": "devices local",
}


def prepare(folder: Path, laptop: str) -> None:
    """Make the models, scores and results that the commands read."""
    shutil.copytree(TINY, folder / "tiny")
    shutil.copytree(TINY, folder / "flux")
    index = json.loads((TINY / "model_index.json").read_text(encoding="utf-8"))
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    del index["unet"]
    (folder / "flux" / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "r.toml").write_text(RECIPE, encoding="utf-8")
    for command in ("score --model tiny -c r.toml -o scores", COMMANDS["plan"]):
        subprocess.run([laptop, *command.split()], cwd=folder, check=True, capture_output=True)
    (folder / "run").mkdir()
    shutil.copy(folder / "plan.json", folder / "run")
    shutil.copytree(folder / "scores", folder / "run" / "score")


def seconds(laptop: str, command: str, folder: Path) -> float:
    """Processor seconds of one call, those of its own processes included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    call = [laptop, *command.split()]
    subprocess.run(call, cwd=folder, env=environment, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure every version in turn and print a table."""
    versions = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    rounds = int(sys.argv[sys.argv.index("--rounds") + 1]) if "--rounds" in sys.argv else 5
    with tempfile.TemporaryDirectory() as name:
        folders = {version: Path(name) / version for version in versions}
        for version, folder in folders.items():
            folder.mkdir()
            prepare(folder, versions[version])
        print("command".ljust(28), *(version.rjust(9) for version in versions))
        for title, command in COMMANDS.items():
            times: dict[str, list[float]] = {version: [] for version in versions}
            for _ in range(rounds):
                for version, laptop in versions.items():
                    times[version].append(seconds(laptop, command, folders[version]))
            medians = (f"{statistics.median(values):7.2f} s" for values in times.values())
            print(title.ljust(28), *medians, flush=True)


if __name__ == "__main__":
    main()
