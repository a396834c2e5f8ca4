"""Compare the cost of an ONNX export with optimum's: `python -m laptop.studies.export_cost MODEL`.

The U-Net of MODEL alone, in fp32, by our exporter and by that of `optimum-cli export onnx`, in
turns, each in a process of its own from the reading of the weights on: seconds, and the largest
resident size of the process. A round's ratios compare exports that follow each other. For Stable
Diffusion 1.x and 2.x, in a stock config, because optimum loads no other; optimum takes the U-Net of
XL by way of its pipeline only.
"""

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from laptop.benchmarks.latency.unet_graph import examples, export_unet
from laptop.console import say
from laptop.export import job
from laptop.machine import machine
from laptop.models import locating

ROUNDS = 3


def export_ours(model: str, precision: str, inputs: Path, out: Path) -> None:
    """Export the U-Net as `laptop export` does, without sampling its example inputs."""
    export_unet(model, inputs, out / "model.onnx", precision)


def export_optimum(model: str, _precision: str, _inputs: Path, out: Path) -> None:
    """Export the U-Net as `optimum-cli export onnx` does, without its check of the outputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import UNet2DConditionModel
        from optimum.exporters.onnx import export
        from optimum.exporters.onnx.model_configs import UNetOnnxConfig

        unet = UNet2DConditionModel.from_pretrained(locating.folder(model), subfolder="unet")
        config = UNetOnnxConfig(unet.config, task="semantic-segmentation")
        export(unet.eval(), config, out / "model.onnx", opset=18)


EXPORTERS: dict[str, Callable[[str, str, Path, Path], None]] = {
    "ours": export_ours,
    "optimum": export_optimum,
}


def measure(model: str, precision: str, rounds: int) -> dict[str, object]:
    """Seconds and bytes of every export by exporter, and the medians of their ratios.

    Optimum's exporter takes part in fp32 only.
    """
    names = list(EXPORTERS) if precision == "fp32" else ["ours"]
    costs: dict[str, list[job.ProcessCost]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "unet.safetensors"
        examples(model, inputs)
        for number in range(rounds):
            for name in names:
                out = Path(folder) / f"{name}-{number}"
                out.mkdir()
                title, export = f"export by {name}", EXPORTERS[name]
                costs[name].append(job.run_apart(title, export, model, precision, inputs, out))
                say(f"{name}: {costs[name][-1]}")
                for path in out.iterdir():
                    path.unlink()
    ratios = {
        fact: statistics.median(
            getattr(a, fact) / getattr(b, fact)
            for a, b in zip(costs["ours"], costs["optimum"], strict=True)
        )
        for fact in ("seconds", "peak_memory_bytes")
        if "optimum" in costs
    }
    return {
        "model": model,
        "precision": precision,
        "took": {name: [cost.as_json() for cost in own] for name, own in costs.items()},
        "ours_to_optimum": ratios,
        **machine(),
    }


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description="Compare our ONNX export with optimum's.")
    parser.add_argument("model")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    document = measure(arguments.model, arguments.precision, arguments.rounds)
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
