"""Lines of metrics.jsonl: the losses of a training step, in full."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from laptop.fields import Range
from laptop.records import Record

TERMS = ("loss", "task", "output", "feature")
BY_MODULE = ("features", "alphas", "norms")
Loss = Annotated[float, Range(-1e30, 1e30)]
ByModule = Mapping[str, Annotated[float, Range(0, 1e30)]]


@dataclass(frozen=True, kw_only=True)
class LogLine(Record):
    """The losses of one step over all processes, before its update; see `losses.Terms`."""

    REMEDY = "Train again."
    LEFT_OUT = frozenset({"gradient_norms"})

    step: Annotated[int, Range(0)]
    loss: Loss | None = None
    task: Loss | None = None
    output: Loss | None = None
    feature: Loss | None = None
    features: ByModule | None = None
    alphas: Mapping[str, float] | None = None
    norms: ByModule | None = None
    # L2 norm of the gradient; not finite where fp16 overflows, and the step is then skipped
    gradient_norm: object = None
    gradient_norms: Mapping[str, object] | None = None  # by term, see `gradient_norms`; rarely
    lr: float | None = None
    seconds: float | None = None  # of training so far, over kills


def log_line(step: int, values: Mapping[str, float]) -> LogLine:
    """The line of a step, from numbers named as `losses.Terms.named` names them."""
    features, alphas, norms = (
        {k.partition("/")[2]: v for k, v in values.items() if k.startswith(f"{group}/")}
        for group in BY_MODULE
    )
    loss, task, output, feature = (values[name] for name in TERMS)
    return LogLine(
        step=step,
        loss=loss,
        task=task,
        output=output,
        feature=feature,
        features=features,
        alphas=alphas,
        norms=norms,
    )
