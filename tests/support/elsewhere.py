"""A model folder as a process reads it that has stock diffusers and not this package."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from laptop.models import loading

PROMPT = "a large red circle above a small green cross on black"


def draw(pipe: object, seed: int = 0) -> np.ndarray:
    """The picture of `PROMPT` after two steps: (64, 64, 3), 0..1."""
    images = pipe(  # type: ignore[operator]
        PROMPT,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return np.asarray(images[0])


ELSEWHERE = """
import sys

class Blocker:  # this environment has the package; the user's has not
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "laptop":
            raise ModuleNotFoundError("No module named 'laptop'", name="laptop")

sys.meta_path.insert(0, Blocker())
try:
    import laptop
except ModuleNotFoundError:
    print("no laptop here")

import numpy, torch
from diffusers import DiffusionPipeline

def draw(folder, name):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(sys.argv[3], num_inference_steps=2, output_type="np",
                 generator=torch.Generator().manual_seed(0)).images[0]
    numpy.save(f"{sys.argv[2]}/{name}.npy", image)
    return pipe

pipe = draw(sys.argv[1], "first")
pipe.save_pretrained(f"{sys.argv[2]}/again")
draw(f"{sys.argv[2]}/again", "again")
print(type(pipe.unet).__module__.rpartition(".")[2], "laptop" in sys.modules)
"""


def check_elsewhere(folder: Path, tmp_path: Path) -> None:
    """Stock diffusers, in a process without this package, draws what we draw; re-saved too."""
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder), str(tmp_path), PROMPT],
        env={
            "HF_HOME": str(tmp_path / "hf"),
            "OMP_NUM_THREADS": "1",
            "ORT_DISABLE_TELEMETRY": "1",  # diffusers may import it
            "PATH": "",
        },
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["no laptop here", "laptop_unet_v1 False"]
    here = draw(loading.load_pipeline(str(folder)))
    for name in ("first", "again"):
        assert np.abs(np.load(tmp_path / f"{name}.npy") - here).max() < 1e-5, name
