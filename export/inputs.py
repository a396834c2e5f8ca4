"""Real example inputs: what a pipeline passes to its networks while it samples.

Parity and quantization on random inputs mean nothing, so the pipeline's own `__call__` runs and
hooks note what it passes to its networks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laptop.export.components import present
from laptop.models.description import of_pipeline
from laptop.pruning.sampling_config import Sampling

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Recorded = dict[str, list[dict[str, Tensor]]]
Arguments = tuple[Any, ...]  # of a call of a U-Net, as pipelines make it
Keywords = Mapping[str, Any]


def record(
    pipe: "DiffusionPipeline", prompts: Sequence[str], sampling: Sampling, *, seed: int
) -> Recorded:
    """The inputs of each component while every prompt was sampled, by component and input name.

    One call of the pipeline a prompt: the U-Net's inputs have batch 2 with classifier-free
    guidance, else 1, and there are as many of them a prompt as steps. `vae_encoder` gets the
    decoded picture. The timestep is a float32 scalar, as in the exported graphs. `pipe` is left as
    it was.
    """
    recorded: Recorded = {name: [] for name in present(pipe)}
    with _listening(pipe, recorded):
        sample(pipe, prompts, sampling, seed=seed)
    return recorded


def sample(
    pipe: "DiffusionPipeline", prompts: Sequence[str], sampling: Sampling, *, seed: int
) -> list[Tensor]:
    """One picture a prompt, (1, 3, H, W) in [0, 1]; prompt i has noise seed + i."""
    native = of_pipeline(pipe).latents.picture_size
    return [
        pipe(
            prompt,
            height=sampling.height or native[0],
            width=sampling.width or native[1],
            **sampling.arguments,
            generator=torch.Generator().manual_seed(seed + i),
            output_type="pt",
        ).images
        for i, prompt in enumerate(prompts)
    ]


@contextmanager
def _listening(pipe: "DiffusionPipeline", recorded: Recorded) -> Iterator[None]:
    def on_text(component: str) -> Callable[..., None]:
        return lambda _, args: _note(recorded, component, {"input_ids": args[0]})

    def on_unet(_: nn.Module, args: Arguments, kwargs: Keywords) -> None:
        _note(recorded, "unet", unet_inputs(args, kwargs))

    handles = [pipe.unet.register_forward_pre_hook(on_unet, with_kwargs=True)]
    for name in ("text_encoder", "text_encoder_2"):
        if name in recorded:
            encoder = getattr(pipe, name)
            handles.append(encoder.register_forward_pre_hook(on_text(name)))
    decode = pipe.vae.decode

    def on_decode(latents: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        _note(recorded, "vae_decoder", {"latent_sample": latents})
        result: tuple[Tensor, ...] = decode(latents, *args, **kwargs)
        _note(recorded, "vae_encoder", {"sample": result[0].clamp(-1, 1)})
        return result

    pipe.vae.decode = on_decode  # on the instance, because hooks see only `forward`
    try:
        yield
    finally:
        del pipe.vae.decode
        for handle in handles:
            handle.remove()


def unet_inputs(args: Arguments, kwargs: Keywords) -> dict[str, Tensor]:
    """The arguments of a call of a U-Net, under the graph's names."""
    sample, timestep = args
    guidance = kwargs.get("timestep_cond")  # embedded, (B, width)
    return {
        "sample": sample,
        "timestep": torch.as_tensor(timestep, dtype=torch.float32).reshape(()),
        "encoder_hidden_states": kwargs["encoder_hidden_states"],
        **({} if guidance is None else {"timestep_cond": guidance}),
        **(kwargs.get("added_cond_kwargs") or {}),
    }


def _note(recorded: Recorded, component: str, inputs: dict[str, Tensor]) -> None:
    recorded[component].append({k: v.detach().cpu().clone() for k, v in inputs.items()})
