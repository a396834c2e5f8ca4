"""Train `tiny-sdxl` from nothing: `python -m laptop.tiny.train WORK`, four phases, each resumable.

1. `vae`   reconstruct drawn scenes (squared and absolute error, a weak KL term): at first only the
           surroundings of a thing, since most of a scene is plain, at last whole scenes.
2. `details`  whole scenes, their things weighing more, from latents with noise.
3. `text`  both encoders learn which thing is at which position from the caption (as CLIP's
           contrastive training does for SDXL), and are frozen from then on, as SDXL's are.
4. `unet`  v-prediction on scenes encoded once; an exponential moving average is kept and shipped.

Training sees no held-out scene (`scenes.held_out`). Each phase keeps `WORK/<phase>.pt`, renamed
when it is whole, so that the same command continues after a kill (the drawn scenes then start over,
so only an unbroken run is repeatable bit for bit). `--export` writes the diffusers folder in fp16.
Time and loss curve: docs/explanation/log.md.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from numpy.typing import NDArray
from torch import Tensor, nn

from laptop.tiny import architecture
from laptop.tiny.scenes import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    draw,
    parse,
    scenes,
)

SEED = 0
KL_WEIGHT = 1e-4  # per latent element; keeps latents smooth without blurring edges
LATENT_NOISE = 0.2  # largest deviation, in units of the latents' own: sampled ones are never exact
BATCH = 64  # of the U-Net
THING_WEIGHT = 10.0  # of a pixel in or near a thing; elsewhere 1
CROP = 32  # pixels; a quarter of the work of a whole scene, and most of its edges
DROP_CAPTION = 0.1  # share of samples that learn the unconditional score, for guidance
TIME_IDS = (IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE)  # original size, crop, target
POSITIONS = ("middle", *RELATIONS)


def _to_tensor(images: list[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _batches(size: int, seed: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Endless batches: images (B, 3, H, W) in -1..1, and captions."""
    rng, source = np.random.default_rng(seed), scenes(seed)
    while True:
        batch = list(itertools.islice(source, size))
        yield _to_tensor([draw(s, rng) for s in batch]), [s.caption for s in batch]


def _fit(
    work: Path,
    phase: str,
    module: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    peak_lr: float,
    decay_steps: int,
    ema_decay: float | None = None,
) -> nn.Module:
    """Minimize `loss(step)` by AdamW: warm-up, a plateau, a linear end; returns what to ship.

    The checkpoint holds weights, optimizer, average and step; torch is seeded again in each step.
    """
    path, log = work / f"{phase}.pt", work / f"{phase}.jsonl"
    optimizer = torch.optim.AdamW(module.parameters(), lr=peak_lr, betas=(0.9, 0.99), fused=True)
    average_of = torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay or 0.0)  # type: ignore[no-untyped-call]
    average = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=average_of)
    first, seconds_before = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        average.load_state_dict(saved["average"])
        first, seconds_before = saved["step"], saved["seconds"]
    start, total = time.perf_counter(), 0.0
    for step in range(first, steps):
        torch.manual_seed(SEED + step)
        scale = min((step + 1) / 200, 1.0, (steps - step) / decay_steps)
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * scale
        value = loss(step)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(module)
        total += float(value.detach())
        done = step + 1
        if done % 100 == 0 or done == steps:
            seconds = seconds_before + time.perf_counter() - start
            row = {"step": done, "loss": total / ((done - 1) % 100 + 1), "seconds": round(seconds)}
            total = 0.0
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(phase, row, flush=True)
        if done % 500 == 0 or done == steps:
            state = {
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.state_dict(),
                "step": done,
                "seconds": seconds_before + time.perf_counter() - start,
            }
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
    return average.module.eval() if ema_decay else module.eval()


def _around_things(images: Tensor, rng: np.random.Generator) -> Tensor:
    """A window (B, 3, CROP, CROP) of each image near its foreground."""
    windows = []
    for image in images:
        foreground = (image != image[:, :1, :1]).any(0).nonzero()
        corner = foreground[rng.integers(len(foreground))].numpy() - rng.integers(8, CROP - 8, 2)
        y, x = np.clip(corner, 0, IMAGE_SIZE - CROP)
        windows.append(image[:, y : y + CROP, x : x + CROP])
    return torch.stack(windows)


@torch.no_grad()
def _scale_latents(pipe: StableDiffusionXLPipeline) -> None:
    """Set the VAE's `scaling_factor` so that latents have unit deviation."""
    latents = pipe.vae.encode(next(_batches(512, SEED + 2))[0]).latent_dist.mean
    pipe.vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))


def train_vae(work: Path, pipe: StableDiffusionXLPipeline, steps: int) -> None:
    """Fit the autoencoder; whole scenes at the end, since its norms see the whole picture."""
    vae = pipe.vae.to(memory_format=torch.channels_last)
    rng = np.random.default_rng(SEED)
    small, whole = _batches(32, SEED + 1), _batches(8, SEED + 1)

    def loss(step: int) -> Tensor:
        crops = step < 0.7 * steps
        images = _around_things(next(small)[0], rng) if crops else next(whole)[0]
        posterior = vae.encode(images.to(memory_format=torch.channels_last)).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        error = F.mse_loss(decoded, images) + 0.1 * F.l1_loss(decoded, images)
        total: Tensor = error + KL_WEIGHT * kl
        return total

    pipe.vae = _fit(work, "vae", vae.train(), loss, steps, 1.5e-3, steps // 2, ema_decay=0.998)
    _scale_latents(pipe)


def train_details(work: Path, pipe: StableDiffusionXLPipeline, steps: int) -> None:
    """Fit the autoencoder on whole scenes, things and their edges above all, latents noisy."""
    vae = pipe.vae
    data = _batches(8, SEED + 5)

    def loss(_step: int) -> Tensor:
        images, _ = next(data)
        posterior = vae.encode(images.to(memory_format=torch.channels_last)).latent_dist
        latents = posterior.sample()
        level = LATENT_NOISE / vae.config.scaling_factor * torch.rand(len(images), 1, 1, 1)
        decoded = vae.decode(latents + level * torch.randn_like(latents)).sample
        foreground = (images != images[:, :, :1, :1]).any(1, keepdim=True).float()
        weight = 1 + THING_WEIGHT * F.max_pool2d(foreground, 5, stride=1, padding=2)
        error = (decoded - images).square() + 0.1 * (decoded - images).abs()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        total: Tensor = (weight * error).sum() / (weight.sum() * 3) + KL_WEIGHT * kl
        return total

    pipe.vae = _fit(work, "details", vae.train(), loss, steps, 1e-3, steps, ema_decay=0.998)
    _scale_latents(pipe)


def _targets(scene: Scene) -> list[int]:
    """Class numbers: size, colour, shape (0 for nothing) at each position; the background."""
    relation = scene.relation or "middle"
    things = dict(zip((relation, OPPOSITE.get(relation, "")), scene.things, strict=False))
    classes = []
    for position in POSITIONS:
        thing = things.get(position)
        if thing is None:
            classes += [0, 0, 0]
        else:
            classes.append(1 + list(SIZES).index(thing.size))
            classes.append(1 + list(COLOURS).index(thing.colour))
            classes.append(1 + SHAPES.index(thing.shape))
    return [*classes, list(BACKGROUNDS).index(scene.background)]


def encode_text(pipe: StableDiffusionXLPipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """SDXL's conditioning: joined penultimate states (B, 16, 128) and the projection (B, 64)."""
    ids = pipe.tokenizer(
        captions, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    ).input_ids
    first = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    second = pipe.text_encoder_2(ids, output_hidden_states=True)
    return torch.cat([first, second.hidden_states[-2]], dim=-1), second.text_embeds


def train_text(work: Path, pipe: StableDiffusionXLPipeline, steps: int) -> None:
    """Fit both encoders and linear readers of the scene.

    The last token's penultimate states hold the whole scene, the projection only the number of
    things and the background: so the U-Net needs its cross-attention, as SDXL's does.
    """
    counts = [1 + len(t) for _ in POSITIONS for t in (SIZES, COLOURS, SHAPES)] + [len(BACKGROUNDS)]
    width = architecture.TEXT_WIDTH
    readers = nn.ModuleList(nn.Linear(width, sum(counts)) for _ in range(2))
    readers.append(nn.Linear(width, 2 + len(BACKGROUNDS)))
    parts = nn.ModuleDict({"one": pipe.text_encoder, "two": pipe.text_encoder_2, "read": readers})
    source = scenes(SEED + 3)

    def loss(_step: int) -> Tensor:
        batch = list(itertools.islice(source, 64))
        states, pooled = encode_text(pipe, [s.caption for s in batch])
        targets = torch.tensor([_targets(s) for s in batch])
        last = states[:, -1]  # sees the whole caption
        terms = []
        for reader, x in zip(readers[:2], torch.split(last, width, dim=1), strict=True):
            for logits, target in zip(reader(x).split(counts, dim=1), targets.T, strict=True):
                terms.append(F.cross_entropy(logits, target))
        number, background = readers[2](pooled).split([2, len(BACKGROUNDS)], dim=1)
        things = torch.tensor([len(s.things) - 1 for s in batch])
        terms += [F.cross_entropy(number, things), F.cross_entropy(background, targets[:, -1])]
        return torch.stack(terms).mean()

    _fit(work, "text", parts.train(), loss, steps, 1e-3, steps // 2)


@torch.no_grad()
def encode_scenes(
    pipe: StableDiffusionXLPipeline, work: Path, count: int
) -> tuple[Tensor, list[str]]:
    """Moments of the VAE's posterior (N, 8, 8, 8) in fp16, and captions; kept in WORK."""
    path = work / f"latents-{count}.pt"
    scale = pipe.vae.config.scaling_factor  # another one means another VAE
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved.get("scale") == scale:
            return saved["moments"], saved["captions"]
    moments, captions = [], []
    data = _batches(100, SEED + 4)
    for _ in range(count // 100):
        images, texts = next(data)
        moments.append(pipe.vae.encode(images).latent_dist.parameters.half())
        captions += texts
    encoded = {"moments": torch.cat(moments), "captions": captions, "scale": scale}
    torch.save(encoded, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    return torch.cat(moments), captions


def _swapped(caption: str) -> str:
    """Describe the scene from its second thing: "A left of B" becomes "B right of A"."""
    scene = parse(caption)
    if scene.relation is None:
        return caption
    return Scene(scene.things[::-1], OPPOSITE[scene.relation], scene.background).caption


@torch.no_grad()
def _encode_captions(
    pipe: StableDiffusionXLPipeline, captions: list[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """The row of each caption (N), and `encode_text` of the M different captions."""
    rows = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    texts = list(rows)
    encoded = [encode_text(pipe, texts[i : i + 500]) for i in range(0, len(texts), 500)]
    states, pooled = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    return torch.tensor([rows[c] for c in captions]), states, pooled


def train_unet(
    work: Path,
    pipe: StableDiffusionXLPipeline,
    steps: int,
    decay_steps: int,
    count: int,
    compiled: bool,
) -> None:
    """Fit the U-Net on `count` encoded scenes, batch 64."""
    moments, captions = encode_scenes(pipe, work, count)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.eval().requires_grad_(False)
    row, states, pooled = _encode_captions(pipe, captions + [_swapped(c) for c in captions])
    rows = row.view(2, -1)  # as drawn, and swapped
    scale, schedule = pipe.vae.config.scaling_factor, pipe.scheduler
    unet = torch.compile(pipe.unet) if compiled else pipe.unet
    time_ids = torch.tensor([TIME_IDS], dtype=torch.float32).expand(BATCH, -1)

    def loss(_step: int) -> Tensor:
        picked = torch.randint(len(captions), (BATCH,))
        mean, log_variance = moments[picked].float().chunk(2, dim=1)
        latents = scale * (mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean))
        text = rows[torch.randint(2, (BATCH,)), picked]
        keep = (torch.rand(BATCH) >= DROP_CAPTION).float()
        noise = torch.randn_like(latents)
        t = torch.randint(schedule.config.num_train_timesteps, (BATCH,))
        predicted = unet(
            schedule.add_noise(latents, noise, t),
            t,
            states[text] * keep[:, None, None],
            added_cond_kwargs={"text_embeds": pooled[text] * keep[:, None], "time_ids": time_ids},
        ).sample
        return F.mse_loss(predicted, schedule.get_velocity(latents, noise, t))

    fitted = _fit(work, "unet", pipe.unet.train(), loss, steps, 1e-3, decay_steps, ema_decay=0.998)
    pipe.unet = fitted


def main() -> None:
    """The command line: all phases, then the export if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path, help="folder for checkpoints, latents and logs")
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--detail-steps", type=int, default=2500)
    parser.add_argument("--text-steps", type=int, default=1500)
    parser.add_argument("--unet-steps", type=int, default=16500)
    parser.add_argument("--unet-decay-steps", type=int, default=9500)
    parser.add_argument("--scenes", type=int, default=60000, help="scenes that the U-Net sees")
    parser.add_argument("--compile", action="store_true", help="a faster U-Net after minutes")
    parser.add_argument("--export", type=Path, help="where to write the diffusers folder")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    pipe = architecture.pipeline(SEED)
    train_vae(args.work, pipe, args.vae_steps)
    train_details(args.work, pipe, args.detail_steps)
    train_text(args.work, pipe, args.text_steps)
    train_unet(args.work, pipe, args.unet_steps, args.unet_decay_steps, args.scenes, args.compile)
    if args.export:
        pipe.to(torch.float16).save_pretrained(args.export, safe_serialization=True)


if __name__ == "__main__":
    main()
