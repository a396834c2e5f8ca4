"""A run folder with the real file formats and invented numbers."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from laptop.tiny.scenes import draw, held_out_prompts, parse

UNITS = [
    f"{block}.{layer}"
    for block in ("down_blocks.0", "up_blocks.0", "mid_block")  # as a state dict lists them
    for layer in ("attentions.0.transformer_blocks.0", "resnets.0", "resnets.1")
]


REMOVED = ["up_blocks.0.resnets.1", "down_blocks.0.resnets.1"]


PROMPTS = held_out_prompts(3)


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def bench_row(label: str, runtime: str, ms: float, valid: bool) -> dict:
    ms_row = {"p50": ms, "p90": ms, "p95": ms, "p99": ms, "mean": ms, "stdev": 0, "cv": 0}
    return {
        "label": label, "component": "unet", "artifact": "x", "sha256": "0",
        "size_bytes": 7_050_000, "params": 3_524_900, "runtime": runtime, "precision": "fp32",
        "device": "Xeon, 2 cores",
        "conditions": {"batch": 2, "shapes": {"sample": [2, 4, 8, 8]}, "threads": 2},
        "n": 40, "latency_ms": ms_row | {"first": 2 * ms}, "load_s": {"cold": 1, "warm": 0.5},
        "peak_memory_bytes": 4e8, "valid": valid, "samples_ms": [ms],
        "invalid_reasons": [] if valid else ["cv 0.20 is above 0.10: the machine was busy or hot"],
    }  # fmt: skip


def write_plan(run: Path) -> None:
    plan = {
        "schema": "laptop.plan/1", "model": "tiny-sdxl", "budget": {"ratio": 0.5}, "solver": "milp",
        "remove": REMOVED, "params": {"before": 3_524_900, "after": 1_750_000},
        "macs": {"before": 61_000_000, "after": 30_500_000},
        "predicted_loss": 0.021, "measured_loss": None,
    }  # fmt: skip
    write(run / "plan.json", plan)


def write_run(run: Path) -> None:
    write_plan(run)
    units = [
        {"name": n, "kind": "resnet", "params": 1, "macs": 1, "score": 10.0**-i}
        for i, n in enumerate(UNITS)
    ]
    write(
        run / "score" / "scores.json",
        {
            "schema": "laptop.scores/1",
            "model": "tiny-sdxl",
            "units": units,
            "base": {"params": 3_524_900, "macs": 61_000_000},
        },
    )
    losses = [
        {"step": i, "loss": 3 / i, "task": 1 / i, "output": 0.5 / i, "feature": 2 / i}
        for i in [*range(1, 60), *range(50, 100)]  # killed at 60, taken up at 50
    ]
    write(run / "distill" / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in losses))
    rows = [
        bench_row(label, runtime, ms, valid)
        for label, ms, valid in (("teacher", 12.5, True), ("student", 7.25, False))
        for runtime in ("pytorch", "onnxruntime")
    ]
    pair = {
        "component": "unet",
        "a": "teacher",
        "b": "student",
        "median": 0.58,
        "low": 0.57,
        "high": 0.6,
    }
    ratios = [pair | {"runtime": r} for r in ("pytorch", "onnxruntime")]
    write(
        run / "bench" / "local.json",
        {"schema": "laptop.bench/1", "results": rows, "ratios": ratios},
    )
    write_evaluation(run)
    results = [
        {"target": t, "component": "unet", "precision": p, "state": s, "samples": 4, "psnr_db": d,
         "floor_db": 60.0, "identical": False, "reason": None}
        for t, p, s, d in (("onnx", "fp32", "verified", 118.2),
                           ("coreml", "fp16", "converted, not run here", None))
    ]  # fmt: skip
    write(run / "parity" / "report.json", {"schema": "laptop.parity/1", "results": results})
    index = {"_class_name": "StableDiffusionXLPipeline", "unet": ["laptop_unet_v1", "X"]}
    write(run / "model" / "model_index.json", index)
    (run / "model" / "unet").mkdir()
    (run / "model" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(bytes(3_600_000))
    write(run / "artifacts" / "onnx" / "model_index.json", index)
    (run / "artifacts" / "coreml" / "unet.mlpackage").mkdir(parents=True)
    stage = {"state": "done", "key": "0", "seconds": 61.2, "peak_memory_bytes": 900_000_000}
    recipe = {"model": "tiny-sdxl", "ratio": 0.5, "seed": 0, "distill": {"steps": 900, "lr": 1e-3}}
    log = {"schema": "laptop.run/1", "recipe": recipe, "versions": {"torch": "2.13.0"}}
    write(run / "laptop.json", log | {"stages": {"score": stage, "distill": stage}})


def write_evaluation(run: Path) -> None:
    models = [
        {"label": label, "path": "x", "prompt_accuracy": a,
         "accuracy": {"shape": a, "colour": 0.99}, "frechet": f, "psnr_to_teacher_db": p,
         "black_or_nan": 0}
        for label, a, f, p in (("teacher", 0.93, 0.4, None), ("pruned", 0.12, 30.5, 11.2),
                               ("student", 0.88, 0.9, 22.75))
    ]  # fmt: skip
    head = {
        "schema": "laptop.eval/1", "prompts": 500, "steps": 25, "guidance": 5.0, "seed": 0,
        "feature_space": "latents of the teacher's VAE", "reference": "the teacher's pictures",
    }  # fmt: skip
    write(run / "eval" / "eval.json", head | {"captions": PROMPTS, "models": models})
    for label, blur in (("teacher", 0), ("pruned", 90), ("student", 15)):
        folder = run / "eval" / "images" / label
        folder.mkdir(parents=True)
        for i, prompt in enumerate(PROMPTS):
            rng = np.random.default_rng(i)
            picture = draw(parse(prompt), rng) + rng.normal(0, blur, (64, 64, 3))
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
