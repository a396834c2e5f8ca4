"""A line of metrics.jsonl, as a report reads it."""

from typing import Annotated, NotRequired, TypedDict

from laptop.fields import Range

Loss = Annotated[float, Range(-1e30, 1e30)]
Norm = Annotated[float, Range(0, 1e30)]


class LossRow(TypedDict):
    """A line of metrics.jsonl."""

    step: Annotated[int, Range(0)]
    loss: NotRequired[Loss | None]
    task: NotRequired[Loss | None]
    output: NotRequired[Loss | None]
    feature: NotRequired[Loss | None]
    features: NotRequired[dict[str, Norm]]
    norms: NotRequired[dict[str, Norm]]
