"""What an export to ONNX costs, beside optimum's: `python -m laptop.studies.export_cost MODEL`.

The U-Net of MODEL alone, in fp32, by our exporter and by that of `optimum-cli export onnx`, in
turns, each in a process of its own from the reading of the weights on: seconds, and the largest
resident size of the process. A round's ratios compare exports that follow each other. For Stable
Diffusion 1.x and 2.x, in a stock config, because optimum loads no other; the U-Net of XL is given
to optimum by way of its pipeline only.
"""

import argparse
import json
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

from laptop.benchmarks.latency.unet_graph import examples, export_unet
from laptop.console import say
from laptop.export import job
from laptop.machine import machine
from laptop.models import locating

ROUNDS = 3


def ours(model: str, precision: str, given: Path, out: Path) -> None:
    """`laptop export`, without the sampling that gives the example inputs."""
    export_unet(model, given, out / "model.onnx", precision)


def optimums(model: str, _precision: str, _given: Path, out: Path) -> None:
    """What `optimum-cli export onnx` does with the U-Net, without its check of the outputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import UNet2DConditionModel
        from optimum.exporters.onnx import export
        from optimum.exporters.onnx.model_configs import UNetOnnxConfig

        unet = UNet2DConditionModel.from_pretrained(locating.folder(model), subfolder="unet")
        config = UNetOnnxConfig(unet.config, task="semantic-segmentation")
        export(unet.eval(), config, out / "model.onnx", opset=18)


WAYS = {"ours": ours, "optimum": optimums}


def measure(model: str, precision: str, rounds: int) -> dict[str, Any]:
    """Seconds and bytes of every export by way, and the medians of their ratios.

    Optimum's exporter takes part in fp32 only.
    """
    ways = WAYS if precision == "fp32" else {"ours": ours}
    took: dict[str, list[job.ProcessCost]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "unet.safetensors"
        examples(model, given)
        for number in range(rounds):
            for name, way in ways.items():
                out = Path(folder) / f"{name}-{number}"
                out.mkdir()
                took[name].append(
                    job.run_apart(f"export by {name}", way, model, precision, given, out)
                )
                say(f"{name}: {took[name][-1]}")
                for path in out.iterdir():
                    path.unlink()
    ratios = {
        fact: statistics.median(
            getattr(a, fact) / getattr(b, fact)
            for a, b in zip(took["ours"], took["optimum"], strict=True)
        )
        for fact in ("seconds", "peak_memory_bytes")
        if "optimum" in took
    }
    return {
        "model": model,
        "precision": precision,
        "took": {name: [cost.as_json() for cost in costs] for name, costs in took.items()},
        "ours_to_optimum": ratios,
        **machine(),
    }


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description="Our ONNX export beside optimum's.")
    parser.add_argument("model")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    print(json.dumps(measure(given.model, given.precision, given.rounds), indent=1))


if __name__ == "__main__":
    main()
