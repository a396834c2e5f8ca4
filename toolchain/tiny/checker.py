"""Check whether a picture shows what its prompt says, from the picture alone.

Colour segmentation finds the background and the things on it; moments of each thing's outline give
its shape. No network is involved, so a network cannot learn to please the checker.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from laptop.errors import BadInput
from laptop.tiny.scenes import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    draw,
    parse,
)

FOREGROUND_DISTANCE = 48  # RGB distance from the background; half the nearest colour's is 51
SMALLEST_AREA = 24  # pixels; the smallest drawn thing, a small cross, covers 85
LARGE_HALF = 8.1  # half the extent that parts small (at most 7.5) from large (at least 9)
MIDDLE = 12  # pixels off the centre that a single thing may lie


@dataclass(frozen=True)
class Seen:
    """A thing found in a picture, with its centroid in pixels."""

    thing: Thing
    x: float
    y: float


def _nearest(colour: NDArray[np.float64], palette: dict[str, tuple[int, int, int]]) -> str:
    distances = np.linalg.norm(np.array(list(palette.values())) - colour, axis=1)
    return list(palette)[int(distances.argmin())]


def _moments(cover: NDArray[np.float64]) -> NDArray[np.float64]:
    """Moments of a coverage map, free of position and size: spread, three- and fourfold symmetry.

    With z = x + iy from the centroid, in units of sqrt(area): E|z|^2, Im E z^3 (a triangle that
    points up) and Re E z^4 (0 for a circle, negative for a square's diagonals, positive for a
    cross's arms).
    """
    y, x = np.nonzero(cover)
    weight = cover[y, x] / cover.sum()
    z = (x - weight @ x + 1j * (y - weight @ y)) / cover.sum() ** 0.5
    return np.array([weight @ abs(z) ** 2, (weight @ z**3).imag, (weight @ z**4).real])


@cache
def _shape_references() -> tuple[NDArray[np.float64], NDArray[np.float64], list[tuple[str, str]]]:
    """Mean moments of drawn things by size and shape (8, 3), and each moment's scale (3,)."""
    rng = np.random.default_rng(0)
    kinds = [(size, shape) for size in SIZES for shape in SHAPES]
    rows = []
    for size, shape in kinds:
        scene = Scene((Thing(size, "red", shape),), None, "black")
        covers = (draw(scene, rng)[..., 0] / COLOURS["red"][0] for _ in range(40))
        rows.append(np.mean([_moments(cover) for cover in covers], axis=0))
    means = np.array(rows)
    return means, means.std(axis=0), kinds


def _shape(cover: NDArray[np.float64], size: str) -> str:
    means, scale, kinds = _shape_references()
    distances = np.linalg.norm((means - _moments(cover)) / scale, axis=1)
    distances[[kind[0] != size for kind in kinds]] = np.inf
    return kinds[int(distances.argmin())][1]


def look(image: NDArray[np.uint8]) -> tuple[list[Seen], str]:
    """The things in a picture (64, 64, 3) and its background."""
    pixels = image.astype(np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    difference = pixels - background
    regions, count = ndimage.label(np.linalg.norm(difference, axis=-1) > FOREGROUND_DISTANCE)
    seen = [_thing(regions == i, pixels, background) for i in range(1, count + 1)]
    return [s for s in seen if s is not None], _nearest(background, BACKGROUNDS)


def _thing(
    region: NDArray[np.bool_], pixels: NDArray[np.float64], background: NDArray[np.float64]
) -> Seen | None:
    """The thing that fills a connected region; None for a speck."""
    if region.sum() < SMALLEST_AREA:
        return None
    inner = ndimage.binary_erosion(region)
    colour = np.median(pixels[inner if inner.any() else region], axis=0)
    step = colour - background
    # How far each pixel, the anti-aliased rim included, has gone from background to colour.
    cover = np.clip((pixels - background) @ step / (step @ step), 0, 1)
    cover[~ndimage.binary_dilation(region)] = 0
    cover[cover < 0.1] = 0
    y, x = np.nonzero(cover > 0.5)
    half = max(np.ptp(x) + 1, np.ptp(y) + 1) / 2
    size = "large" if half > LARGE_HALF else "small"
    return Seen(Thing(size, _nearest(colour, COLOURS), _shape(cover, size)), x.mean(), y.mean())


def _in_order(seen: list[Seen], relation: str | None) -> list[Seen] | None:
    """The things in the order of a caption with `relation`; None unless they stand so."""
    if relation is None:
        centre = IMAGE_SIZE / 2
        off = max(abs(seen[0].x - centre), abs(seen[0].y - centre))
        return seen if off <= MIDDLE else None
    horizontal = relation in ("left of", "right of")
    a, b = sorted(seen, key=lambda s: s.x if horizontal else s.y)
    dx, dy = abs(a.x - b.x), abs(a.y - b.y)
    if (dx > dy) != horizontal:
        return None
    return [a, b] if relation in ("left of", "above") else [b, a]


def check(image: NDArray[np.uint8], prompt: str) -> dict[str, bool]:
    """Check which attributes of the prompt a picture shows, from count to background.

    Attributes of things count as wrong unless there are as many things as asked. `prompt` is true
    when every attribute but the size is right.
    """
    scene = parse(prompt)
    seen, background = look(image)
    result = dict.fromkeys(("count", "place", "shape", "colour", "size"), False)
    result["background"] = background == scene.background
    if len(seen) == len(scene.things):
        ordered = _in_order(seen, scene.relation)
        pairs = list(zip(ordered or seen, scene.things, strict=True))
        result |= {
            "count": True,
            "place": ordered is not None,
            "shape": all(s.thing.shape == t.shape for s, t in pairs),
            "colour": all(s.thing.colour == t.colour for s, t in pairs),
            "size": all(s.thing.size == t.size for s, t in pairs),
        }
    needed = ("count", "place", "shape", "colour", "background")
    return result | {"prompt": all(result[k] for k in needed)}


def judge(images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> dict[str, float]:
    """The share of pictures that show each attribute; `prompt_accuracy`: all but size at once."""
    rows = [check(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    shares = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    return {"prompt_accuracy": shares.pop("prompt"), **shares}


def scene_metrics(
    prompts: Sequence[str],
) -> tuple[Callable[..., dict[str, float]], NDArray[np.uint8]] | tuple[None, None]:
    """Return the judge and drawn reference pictures if all prompts describe scenes."""
    try:
        scenes = [parse(prompt) for prompt in prompts]
    except BadInput:
        return None, None
    rng = np.random.default_rng(0)
    return judge, np.stack([draw(scene, rng) for scene in scenes])
