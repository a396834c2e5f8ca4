"""A table of layers' latencies, made from rounds of the U-Net with and without them.

What all removable layers take together is the difference between the U-Net with and without them.
It is divided by the layers' shares of a forward in which every layer was timed in its place. Shares
alone would miss what a clock or a profile does not see, such as the time between operators.
"""

from collections.abc import Mapping, Sequence
from statistics import median

from torch import nn

from laptop.benchmarks.devices.device import Round
from laptop.benchmarks.latency.validity import invalid_reasons, summary, unsteady
from laptop.benchmarks.settings import BenchConfig
from laptop.errors import LaptopError
from laptop.pruning.latency_table import ForwardTime, LatencyTable, TimedUnit
from laptop.pruning.units import SUBLAYERS


def layer_table(
    whole: Sequence[Round], bare: Sequence[Round], shares: Mapping[str, float], config: BenchConfig
) -> LatencyTable:
    """The measured part of a table, from rounds of the U-Net, rounds without layers, and shares.

    Raises `LaptopError` when the U-Net took no less without its layers.
    """
    samples = [sample for turn in whole for sample in turn.samples_ms]
    spread, reasons = summary(samples), invalid_reasons(whole, config.cv_bound)
    reasons += [f"without layers: {reason}" for reason in unsteady(bare, config.cv_bound)]
    left = median(
        median(without.samples_ms) / median(turn.samples_ms)
        for turn, without in zip(whole, bare, strict=True)
    )
    if left >= 1:
        raise LaptopError(
            f"the U-Net without its layers took {left:.2f} × the time of the whole one: other work "
            "ran at the same time. Measure again on a quiet machine."
        )
    layers_ms = spread.p50 * (1 - left) / sum(shares.values())
    return LatencyTable(
        n=len(samples),
        unet_ms=ForwardTime(**vars(spread)),
        without_layers=left,
        units=tuple(
            TimedUnit(name=name, latency_ms=round(layers_ms * part, 6))
            for name, part in shares.items()
        ),
        valid=not reasons,
        invalid_reasons=tuple(reasons),
        samples_ms=tuple(round(s, 4) for s in samples),
    )


def timed_modules(unet: nn.Module, name: str, needs: Sequence[str] = ()) -> dict[str, int]:
    """Modules whose time goes with a layer (1), and modules inside of it whose time stays (-1).

    A resnet's shortcut stays, the norm before a sublayer goes with it, and the layers in `needs`
    have a time of their own.
    """
    signs = {name: 1}
    if getattr(unet.get_submodule(name), "conv_shortcut", None) is not None:
        signs[f"{name}.conv_shortcut"] = -1
    block, _, part = name.rpartition(".")
    if part in SUBLAYERS:
        signs[f"{block}.{SUBLAYERS[part]}"] = 1
    for inner in needs:
        signs |= {module: -sign for module, sign in timed_modules(unet, inner).items()}
    return signs
