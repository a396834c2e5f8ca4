"""The time of a whole image, put together from its components' measured medians.

    text encoders, twice with guidance + steps × U-Net + VAE decoder

What a pipeline adds, such as the scheduler's arithmetic, is not in it.
"""

from collections.abc import Mapping, Sequence

from laptop.benchmarks.bench_report import BenchRow, ImageLatency, ImageRow

SHARED = ("text_encoder", "text_encoder_2", "vae_decoder")  # that pruning does not change


def image_rows(results: Sequence[BenchRow], steps: int) -> tuple[ImageRow, ...]:
    """One row for each U-Net, if everything else that a picture needs was timed, too.

    A picture needs a VAE decoder, a text encoder (the second one for SDXL), and each component that
    was timed in any other runtime. A component that was not timed under the U-Net's label is taken
    from another label with the same runtime and target: `parts` says which.
    """
    rows = {(r.component, r.label, r.runtime, r.target): r for r in results}
    timed = {r.component for r in results} & set(SHARED) | {"vae_decoder"}
    images = []
    for unet in (r for r in results if r.component == "unet"):
        setup = (unet.runtime, unet.target)
        parts = {"unet": unet} | {
            name: part
            for name in SHARED
            if (part := rows.get((name, unet.label, *setup)) or _other(results, name, setup))
        }
        is_sdxl = "text_embeds" in unet.conditions.shapes
        needed = timed | ({"text_encoder_2"} if is_sdxl else set())
        if needed <= parts.keys() and len(parts) > 2:
            images.append(_image_row(unet, parts, steps))
    return tuple(images)


def _other(results: Sequence[BenchRow], component: str, setup: tuple[str, str]) -> BenchRow | None:
    """The first row of a component in this runtime and target, under any label."""
    wanted = (component, *setup)
    return next((r for r in results if (r.component, r.runtime, r.target) == wanted), None)


def _image_row(unet: BenchRow, parts: Mapping[str, BenchRow], steps: int) -> ImageRow:
    halves = 2 if unet.conditions.guidance else 1
    calls = {name: halves if name.startswith("text") else 1 for name in parts} | {"unet": steps}
    times = {name: calls[name] * part.latency_ms.p50 for name, part in parts.items()}
    energy = [calls[name] * part.energy_j for name, part in parts.items() if part.energy_j]
    return ImageRow(
        label=unet.label,
        runtime=unet.runtime,
        target=unet.target,
        precision=unet.precision,
        device=unet.device,
        steps=steps,
        guidance=unet.conditions.guidance,
        latency_ms=ImageLatency(p50=sum(times.values())),
        parts_ms=times,
        parts={name: part.label for name, part in parts.items()},
        energy_j=sum(energy) if len(energy) == len(parts) else None,
        valid=all(part.valid for part in parts.values()),
    )
