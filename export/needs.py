"""What an export needs before it starts: memory of its processes, bytes on the disk."""

import math
from collections.abc import Iterable, Sequence

from laptop.errors import BadInput
from laptop.export.components import PROCESS_BYTES, folder_of
from laptop.export.settings import ExportConfig
from laptop.export.targets import PRECISIONS, Request
from laptop.machine import available_memory_bytes
from laptop.models import locating

PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")  # with weights, of a pipeline


def need_memory(doing: str, weights_bytes: float) -> None:
    """Raise `BadInput` where the process would need more memory than is available."""
    needed, free = weights_bytes + PROCESS_BYTES, available_memory_bytes()
    if needed > free:
        raise BadInput(
            f"{doing} takes about {needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are "
            "available. Close other programs or use a larger machine."
        )


def count_weights(model: str, parts: Iterable[str] = PARTS) -> int:
    """Number of weights in these folders of a model, from the headers of its files."""
    from safetensors import safe_open

    weights = 0
    for path in (file for part in parts for file in locating.weight_files(model, part)):
        with safe_open(path, framework="np") as file:
            weights += sum(math.prod(file.get_slice(k).get_shape()) for k in file.keys())  # noqa: SIM118
    return weights


def artifact_bytes(model: str, wanted: Sequence[Request], config: ExportConfig) -> int:
    """Bytes that the artifacts will take on the disk; the graphs add about a tenth."""
    weight_bytes = sum(PRECISIONS[request.precision].weight_bytes for request in wanted)
    parts = {folder_of(name) for name in config.components}
    return int(1.1 * weight_bytes * count_weights(model, parts))
