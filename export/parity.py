"""The stage `verify`: does every artifact compute what the PyTorch model computes?

Real inputs are recorded from the model, each artifact runs on them in its own runtime, and the
outputs are compared by PSNR = 10 log10(max|reference|² / mean squared error). The report is always
written; `check` then raises for what is below its floor. What cannot run on this system is reported
as "converted, not run here", never as verified.

    OUT/<target>/<component>/000.<input>.npy, 000.<output>.npy, 000.<output>.reference.npy
    OUT/report.json    {"schema": "laptop.parity/1", "results": [{"target", "component", "artifact",
                       "sha256", "precision", "state", "samples", "psnr_db", "floor_db",
                       "max_abs_error", "identical", "nonfinite", "reason"}]}

`psnr_db` is that of the worst output of the worst sample. It is null where there is none: nothing
was run, outputs are `identical` (infinite PSNR), or NaN or Inf was found, counted in `nonfinite`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laptop import models, run
from laptop.errors import BadInput, CheckFailed, Unsupported
from laptop.export import artifacts as listing
from laptop.export import components, runtimes
from laptop.export.inputs import Recorded, record
from laptop.export.targets import module_of, need_packages

SCHEMA = "laptop.parity/1"
REPORT = "report.json"
FLOORS = {
    **{"fp32": 60.0, "fp16": 40.0, "int8": 30.0, "int6": 30.0},
    **{"palette8": 30.0, "palette6": 30.0, "palette4": 20.0, "mixed": 30.0},
}  # dB by precision
VERIFIED, FAILED, NOT_RUN = "verified", "failed", "converted, not run here"

Array = NDArray[Any]


@dataclass(frozen=True)
class VerifyConfig:
    """The sampling that gives the inputs, and what counts as equal."""

    seed: int = 0  # of the noise
    steps: int = 4  # sampling steps a prompt, so as many U-Net inputs
    floor_db: float | None = None  # PSNR; None: by precision (FLOORS)


@dataclass(frozen=True)
class Comparison:
    """One output against its reference, or the worst of several."""

    psnr_db: float  # inf where identical, nan where not comparable
    max_abs_error: float
    nonfinite: int  # NaN and Inf values, in either


def psnr(reference: Array, value: Array) -> float:
    """Peak signal-to-noise ratio in dB, the peak being max|reference|, computed in float64.

    Infinite for equal arrays, -inf where the reference is all zero and the value is not, NaN where
    either holds NaN or Inf. Raises ValueError for arrays of unlike shape.
    """
    if reference.shape != value.shape:
        raise ValueError(f"shapes differ: {reference.shape} and {value.shape}")
    exact, given = reference.astype(np.float64), value.astype(np.float64)
    if not (np.isfinite(exact).all() and np.isfinite(given).all()):
        return math.nan
    error = float(np.mean((exact - given) ** 2))
    peak = float(np.max(np.abs(exact)))
    if error == 0:
        return math.inf
    return 10 * math.log10(peak**2 / error) if peak > 0 else -math.inf


def compare(reference: Array, value: Array) -> Comparison:
    """All that the report says of one output; ValueError for unlike shapes."""
    ratio = psnr(reference, value)
    bad = int(np.sum(~np.isfinite(reference)) + np.sum(~np.isfinite(value)))
    if bad:
        return Comparison(math.nan, math.nan, bad)
    error = np.abs(reference.astype(np.float64) - value.astype(np.float64))
    return Comparison(ratio, float(error.max()), 0)


def worst(comparisons: Sequence[Comparison]) -> Comparison:
    """The lowest PSNR, the largest error, all bad values together."""
    bad = sum(c.nonfinite for c in comparisons)
    if bad:
        return Comparison(math.nan, math.nan, bad)
    return Comparison(
        min(c.psnr_db for c in comparisons), max(c.max_abs_error for c in comparisons), 0
    )


def verify(
    artifacts: Path,
    against: str,
    out: Path,
    config: VerifyConfig,
    prompts: Sequence[str],
    *,
    overwrite: run.Overwrite = False,
) -> Path:
    """Compare every artifact in the folder with the model `against`; returns `out`.

    Does not raise for an artifact that differs: pass the report to `check`. Raises `BadInput` for
    missing or broken artifacts, before the model is loaded, and for artifacts of another model.
    """
    if not prompts or config.steps < 1:
        raise BadInput(f"verify needs a prompt and a step; got {len(prompts)} and {config.steps}.")
    rows = listing.read_list(artifacts)
    for row in rows:
        _check_artifact(artifacts / row["file"], row)
    models.need_whole_chain(against, "verify")
    source = models.locate(against)
    is_folder = Path(source).is_dir()

    def work(folder: Path) -> dict[str, Any]:
        results = _verify_rows(rows, artifacts, against, folder, config, prompts)
        run.write_json(folder / REPORT, {"schema": SCHEMA, "results": results})
        return {"verified": sum(r["state"] == VERIFIED for r in results)}

    identity = {**asdict(config), "prompts": list(prompts)}
    sources = {"artifacts": artifacts}
    if is_folder:
        sources["against"] = Path(source)
    else:
        identity["against"] = source
    return run.run_stage("verify", out, identity, sources, work, overwrite=overwrite)


def check(report: Mapping[str, Any]) -> None:
    """Raise `CheckFailed` that lists the components which did not reach their floor."""
    failed = [r for r in report["results"] if r["state"] == FAILED]
    if failed:
        lines = "; ".join(f"{r['target']} {r['component']}: {r['reason']}" for r in failed)
        raise CheckFailed(
            f"{len(failed)} of {len(report['results'])} artifacts differ from PyTorch ({lines}). "
            "Do not ship them; the .npy files beside the report hold inputs and both outputs."
        )


def _verify_rows(
    rows: Sequence[Mapping[str, Any]],
    artifacts: Path,
    against: str,
    folder: Path,
    config: VerifyConfig,
    prompts: Sequence[str],
) -> list[dict[str, Any]]:
    pipe = models.load_pipeline(against)
    recorded = record(pipe, prompts, seed=config.seed, steps=config.steps)
    results = []
    for row in run.track(rows, "verify", len(rows)):
        if row["component"] not in recorded:
            raise BadInput(
                f"{artifacts} holds {row['component']}, which {against} has not: it was exported "
                "from another model. Pass the model that it was exported from."
            )
        floor = config.floor_db if config.floor_db is not None else FLOORS[row["precision"]]
        beside = folder / Path(row["file"]).parts[0] / row["component"]
        beside.mkdir(parents=True, exist_ok=True)
        graph = components.graph(pipe, row["component"])
        module = module_of(row["target"])
        runner = module.load(artifacts / row["file"]) if module.checked() else None
        found = runner and _run_and_compare(runner, graph, recorded, row["component"], beside)
        samples = len(recorded[row["component"]]) if found else 0
        digest = listing.measure(artifacts / row["file"])[1]
        results.append(result(row, digest, found, floor, samples))
    return results


def _run_and_compare(
    runner: runtimes.Runner,
    graph: components.Graph,
    recorded: Recorded,
    component: str,
    folder: Path,
) -> Comparison:
    found = []
    for i, tensors in enumerate(recorded[component]):
        given = {name: tensors[name].numpy() for name in graph.inputs}
        expected = {k: v.numpy() for k, v in components.run(graph, tensors).items()}
        got = runner(given)
        for name, value in given.items():
            np.save(folder / f"{i:03d}.{name}.npy", value)
        for name, reference in expected.items():
            if name not in got or got[name].shape != reference.shape:
                shapes = {k: v.shape for k, v in got.items()}
                raise BadInput(
                    f"{component}: the artifact gives {shapes}, the model {name} of shape "
                    f"{reference.shape}. Pass the model that it was exported from."
                )
            np.save(folder / f"{i:03d}.{name}.npy", got[name])
            np.save(folder / f"{i:03d}.{name}.reference.npy", reference)
            found.append(compare(reference, got[name]))
    return worst(found)


def result(
    row: Mapping[str, Any], sha256: str, found: Comparison | None, floor: float, samples: int
) -> dict[str, Any]:
    """One row of the report; `found` is None where nothing was run.

    JSON has no NaN and no Infinity, so they become null.
    """
    reason = _reason(found, floor)
    return {
        "target": row["target"],
        "component": row["component"],
        "artifact": row["file"],
        "sha256": sha256,
        "precision": row["precision"],
        "state": NOT_RUN if found is None else FAILED if reason else VERIFIED,
        "samples": samples,
        "psnr_db": _finite(found.psnr_db) if found else None,
        "floor_db": floor,
        "max_abs_error": _finite(found.max_abs_error) if found else None,
        "identical": found is not None and found.psnr_db == math.inf,
        "nonfinite": found.nonfinite if found else 0,
        "reason": reason,
    }


def _reason(found: Comparison | None, floor: float) -> str | None:
    """Why an artifact fails; None where it does not."""
    if found is None or found.psnr_db >= floor:
        return None
    if found.nonfinite:
        return f"{found.nonfinite} values are NaN or Inf"
    return f"PSNR {found.psnr_db:.1f} dB, at least {floor:g} needed"


def _finite(value: float) -> float | None:
    return round(value, 9) if math.isfinite(value) else None


def _check_artifact(path: Path, row: Mapping[str, Any]) -> None:
    if row["precision"] not in FLOORS:
        raise Unsupported(
            f"{path}: no parity floor is known for precision {row['precision']!r}; known: "
            f"{', '.join(FLOORS)}."
        )
    need_packages(row["target"])
    runtimes.check_file(path, row["target"])
