"""Settings of the recipe's tables [data], [distill] and [train]."""

from dataclasses import dataclass
from typing import Annotated

from laptop.errors import BadInput
from laptop.fields import (
    Count,
    Name,
    OneOf,
    Pixels,
    Range,
    Samples,
    Seed,
    Share,
    Steps,
    Weight,
    check_fields,
)

FEATURES = ("blocks", "attentions", "layers")  # whose outputs a student imitates
WEIGHTINGS = ("none", "relative", "relative-scaled", "norm-ratio", "unit-norm")  # of `losses`
OPTIMIZERS = ("adamw", "adamw-8bit")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class DataConfig:
    """Training data, and how it is cached."""

    source: Name = "prompts"  # a folder, hf:NAME, tar shards, prompts[:FILE], scenes, or a cache
    count: Count | None = None  # examples, at most; None: all, or 8000 where they are drawn
    seed: Seed = 1  # seed of the pictures that are drawn, and of the latents that the VAE samples
    resolution: Pixels | None = None  # pixels a side; None: as [sampling] says
    # keep aspect ratios, in sizes of about resolution² pixels; else crop to one size
    buckets: bool = False
    image_column: Name = "image"  # column of a Hugging Face dataset that holds the picture
    # column of a Hugging Face dataset, or key in metadata.jsonl, that holds the caption
    caption_column: Name = "text"
    streaming: bool = False  # read a Hugging Face dataset as it arrives and do not store it
    # records without a readable picture or a caption that may be skipped
    corrupt_allowed: Annotated[int, Range(0, 10**9)] = 100
    # denoising steps of the pictures that are drawn; None: as [sampling] says, or 25
    steps: Steps | None = None

    def __post_init__(self) -> None:
        check_fields(self, "data")


@dataclass(frozen=True)
class DistillConfig:
    """What the student learns: each setting changes the result."""

    steps: Count = 1000  # optimizer steps
    batch_size: Samples = 64  # samples of a step, of all processes and micro-batches together
    learning_rate: Annotated[float, Range(above=0, most=1000)] = 5e-4  # peak, after the warm-up
    # course of the learning rate after the warm-up; cosine: down to 0
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "cosine"
    # steps in which the learning rate rises from 0
    warmup_steps: Annotated[int, Range(0, 10**9)] = 50
    # outputs that the student imitates: of blocks, self-attentions, or single layers
    features: Annotated[str, OneOf(*FEATURES)] = "blocks"
    # factors of the feature terms, from norms of the teacher's features; none: 1
    weighting: Annotated[str, OneOf(*WEIGHTINGS)] = "relative"
    # samples that the norms are taken of: each batch, or the first 8 steps
    norms: Annotated[str, OneOf("batch", "calibration")] = "batch"
    task_weight: Weight = 1.0  # factor of the denoising loss
    output_weight: Weight = 1.0  # factor of the loss against the teacher's output
    feature_weight: Weight = 1.0  # factor of the sum of all feature terms
    # min-SNR gamma of the task and output terms, usually 5; None: no weighting
    snr_gamma: Annotated[float, Range(above=0, most=1_000_000)] | None = None
    # share of samples that lose their caption, so that guidance still works
    drop_caption: Annotated[float, Range(0, 1)] = 0.1
    # L2 norm to which gradients are clipped
    max_grad_norm: Annotated[float, Range(above=0, most=10**9)] = 1.0
    # decay of the average of the student's weights, which is what is written; 0: no average
    ema_decay: Share = 0.995
    seed: Seed = 0  # seed of noise, timesteps and the order of the samples

    def __post_init__(self) -> None:
        check_fields(self, "distill")
        if not self.task_weight + self.output_weight + self.feature_weight:
            raise BadInput(
                "[distill] task_weight, output_weight and feature_weight are all 0: one must be "
                "above 0."
            )


@dataclass(frozen=True)
class TrainConfig:
    """How training is computed: speed and memory."""

    # samples of one forward of a process; None: all of its samples of the step
    micro_batch: Samples | None = None
    # precision of forward passes; None: as accelerate's launcher says
    mixed_precision: Annotated[str, OneOf("no", "bf16", "fp16")] | None = None
    optimizer: Annotated[str, OneOf(*OPTIMIZERS)] = "adamw"  # adamw-8bit needs the extra [adam8bit]
    # compute the student's activations again in the backward pass: less memory, more time
    gradient_checkpointing: bool = False
    compile: bool = False  # run torch.compile on the repeated transformer blocks
    checkpoint_every: Count = 100  # steps between checkpoints
    log_every: Count = 10  # steps between lines of metrics.jsonl
    # steps between measurements of each term's gradient norm; 0: never
    shares_every: Annotated[int, Range(0, 10**9)] = 200
    # the loss has diverged when its running mean is this many times its least running mean
    runaway: Annotated[float, Range(above=1, most=10**9)] = 10.0
    # how often a diverged run returns to its checkpoint and continues at half the learning rate
    back_offs: Annotated[int, Range(0, 1000)] = 0

    def __post_init__(self) -> None:
        check_fields(self, "train")
