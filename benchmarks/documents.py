"""What the results of a run folder hold, as types that `records` checks before a value is used."""

from typing import Annotated, Any, NotRequired, TypedDict

from laptop.fields import Length, Plain, Range

Amount = Annotated[float, Range(0, 1e18)]  # of parameters, bytes, operations
Ms = Annotated[float, Range(0, 1e9)]  # eleven days
Portion = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(above=0, most=1e9)]
Loss = Annotated[float, Range(-1e30, 1e30)]
Text = Annotated[str, Plain(empty=True)]
Layer = Annotated[str, Plain()]
Side = Annotated[int, Range(1, 1 << 20)]
Levels = Annotated[list[Side], Length(10)]


class LoggedStage(TypedDict):
    """A stage in laptop.json."""

    state: NotRequired[Text]
    path: NotRequired[Text]
    seconds: NotRequired[Amount | None]
    peak_memory_bytes: NotRequired[Amount | None]


class RunLog(TypedDict):
    """laptop.json."""

    stages: NotRequired[dict[str, LoggedStage]]
    recipe: NotRequired[dict[str, Any]]
    versions: NotRequired[dict[str, Text | None]]


class LossRow(TypedDict):
    """A line of metrics.jsonl."""

    step: Annotated[int, Range(0)]
    loss: NotRequired[Loss | None]
    task: NotRequired[Loss | None]
    output: NotRequired[Loss | None]
    feature: NotRequired[Loss | None]
    features: NotRequired[dict[str, Annotated[float, Range(0, 1e30)]]]
    norms: NotRequired[dict[str, Annotated[float, Range(0, 1e30)]]]


class LatencyMs(TypedDict):
    """Percentiles of a row, and its first inference."""

    p50: Ms
    p90: Ms
    p95: NotRequired[Ms]
    p99: Ms
    cv: Annotated[float, Range(0)]
    first: Ms | None


class LoadSeconds(TypedDict):
    """How long loading took."""

    cold: Amount | None
    warm: Amount | None


class Placed(TypedDict):
    """How much of a program runs on one kind of processor."""

    operations: Portion
    cost: Portion


class BenchRow(TypedDict):
    """What was timed of one component."""

    label: Text
    component: Text
    runtime: Text
    target: NotRequired[Text]
    precision: Text
    device: Text
    conditions: dict[str, Any]
    n: Annotated[int, Range(0)]
    latency_ms: LatencyMs
    load_s: LoadSeconds
    size_bytes: NotRequired[Amount | None]
    peak_memory_bytes: Amount | None
    valid: bool
    invalid_reasons: list[Text]
    samples_ms: NotRequired[list[Ms]]
    placement: NotRequired[dict[str, Placed]]


class Median(TypedDict):
    """The time of a whole image."""

    p50: Ms


class ImageRow(TypedDict):
    """The time of a whole image."""

    label: Text
    runtime: Text
    target: NotRequired[Text]
    steps: Annotated[int, Range(1)]
    latency_ms: Median
    energy_j: NotRequired[Amount | None]
    valid: bool


class RatioRow(TypedDict):
    """How the times of two models compare."""

    component: Text
    runtime: Text
    target: NotRequired[Text]
    a: Text
    b: Text
    median: Positive
    low: Positive
    high: Positive
    valid: NotRequired[bool]


class ProbedDevice(TypedDict):
    """What a report says of its device."""

    address: NotRequired[Text]
    state: NotRequired[Text | None]
    power_mode: NotRequired[Text | None]


class Group(TypedDict):
    """What was timed in turns."""

    results: list[BenchRow]
    ratios: list[RatioRow]


class Bench(Group):
    """A report of `laptop bench`."""

    device: NotRequired[ProbedDevice]
    images: NotRequired[list[ImageRow]]


class ModelIndex(TypedDict):
    """model_index.json, as far as a report says how to load the model."""

    _class_name: NotRequired[Layer]
    unet: NotRequired[tuple[Text | None, Text | None]]


class UnetConfig(TypedDict):
    """config.json of a U-Net, as far as the shapes of its inputs follow from it."""

    in_channels: Side
    sample_size: Side | tuple[Side, Side]
    cross_attention_dim: NotRequired[Side | list[Side] | None]
    encoder_hid_dim: NotRequired[Side | None]
    down_block_types: NotRequired[list[Layer]]
    mid_block_type: NotRequired[Text | None]
    time_cond_proj_dim: NotRequired[Side | None]
    addition_embed_type: NotRequired[Text | None]
    addition_time_embed_dim: NotRequired[Side | None]
    projection_class_embeddings_input_dim: NotRequired[Side | None]


class VaeConfig(TypedDict):
    """config.json of a VAE, as far as the shapes of its inputs follow from it."""

    in_channels: Side
    latent_channels: Side
    block_out_channels: NotRequired[Levels | None]
    decoder_block_out_channels: NotRequired[Levels | None]


class TextConfig(TypedDict):
    """config.json of a text encoder."""

    max_position_embeddings: NotRequired[Annotated[int, Range(1, 100_000)] | None]


class TokenizerConfig(TypedDict):
    """tokenizer_config.json."""

    model_max_length: NotRequired[Annotated[int, Range(1, 100_000)] | None]


class EvaluatedModel(TypedDict):
    """A model in eval.json."""

    label: Text
    path: NotRequired[Text]
    prompt_accuracy: Portion | None
    accuracy: dict[str, Portion | None]
    frechet: Loss | None
    psnr_to_teacher_db: Loss | None
    black_or_nan: Annotated[int, Range(0)]


class Evaluation(TypedDict):
    """eval.json."""

    prompts: Annotated[int, Range(0)]
    steps: Annotated[int, Range(0)]
    guidance: float | None
    seed: int
    feature_space: Text
    reference: Text
    captions: NotRequired[list[Text]]
    models: list[EvaluatedModel]
