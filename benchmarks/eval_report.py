"""The report of `laptop eval`: how good the pictures of each model are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from laptop.fields import Plain, Range
from laptop.records import Record

Portion = Annotated[float, Range(0, 1)]
Number = Annotated[float, Range(-1e30, 1e30)]
Text = Annotated[str, Plain(empty=True)]


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel(Record):
    """The pictures of one model, judged; None: not measured."""

    label: Text
    path: Text = ""
    prompt_accuracy: Portion | None
    accuracy: Mapping[str, Portion | None]  # by attribute of the prompts
    frechet: Number | None  # distance to the reference pictures
    psnr_to_teacher_db: Number | None
    black_or_nan: Annotated[int, Range(0)]  # pictures


@dataclass(frozen=True, kw_only=True)
class EvalReport(Record):
    """An eval.json; the first model is the teacher."""

    SCHEMA = "laptop.eval/1"
    REMEDY = "Evaluate again."

    prompts: Annotated[int, Range(0)]
    steps: Annotated[int, Range(0)]
    guidance: float | None
    sampling: Mapping[str, object] = field(default_factory=dict)
    seed: int
    feature_space: Text  # of the Fréchet distance
    reference: Text  # what the Fréchet distance is taken to
    psnr_cap_db: float | None = None
    captions: tuple[Text, ...] = ()  # prompts of the pictures that are kept
    models: tuple[EvaluatedModel, ...]

    def model(self, label: str) -> EvaluatedModel | None:
        """The model with this label."""
        return next((row for row in self.models if row.label == label), None)
