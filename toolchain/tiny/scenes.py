"""Captioned scenes, drawn without end: the training data of the embedded model `tiny-sdxl`.

A scene is one or two coloured shapes on a plain background, with a caption such as
"a large red circle left of a small blue square on white". Shapes are drawn from their signed
distance, which anti-aliases them exactly enough at 64 x 64 pixels.

Held out from training (`held_out`): number the shapes 0-3, colours 0-5 and backgrounds 0-2 in the
order of the tables below; a scene is held out when sum(colour - shape over its objects) +
background is divisible by 7. Every shape, colour, shape-colour pair, relation and background is
still seen, but these combinations, about one in seven, never are.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from laptop.errors import BadInput

IMAGE_SIZE = 64  # pixels, both ways
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (226, 38, 38),
    "green": (30, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 210, 30),
    "purple": (150, 50, 190),
    "cyan": (40, 205, 225),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128)}
SIZES = {"small": (6.0, 7.0), "large": (10.5, 12.0)}  # range of half the extent, pixels
RELATIONS = ("left of", "right of", "above", "below")  # of the first object to the second

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
HELD_OUT_CAPTIONS = 3844  # how many different ones there are
CROSS_BAR = 0.36  # half the width of a cross's bar, of half its extent
SQUARE_SIDE = 0.88  # half a square's side, of half the extent: its area is near a circle's


@dataclass(frozen=True)
class Thing:
    """A coloured shape of a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One or two things on a plain background."""

    things: tuple[Thing, ...]  # one or two
    relation: str | None  # of the first to the second; None with one thing
    background: str

    @property
    def caption(self) -> str:
        return f"{f' {self.relation} '.join(map(str, self.things))} on {self.background}"


def held_out(scene: Scene) -> bool:
    """Whether training never sees this combination (the rule is in the module's docstring)."""
    colours = list(COLOURS)
    total = sum(colours.index(t.colour) - SHAPES.index(t.shape) for t in scene.things)
    return (total + list(BACKGROUNDS).index(scene.background)) % 7 == 0


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene of one (a quarter of the time) or two unlike things."""

    def thing() -> Thing:
        size, colour, shape = (rng.choice(list(t)) for t in (SIZES, COLOURS, SHAPES))
        return Thing(str(size), str(colour), str(shape))

    things = [thing()]
    if rng.random() < 0.75:
        while len(things) < 2:
            if (other := thing()) != things[0]:
                things.append(other)
    relation = str(rng.choice(RELATIONS)) if len(things) == 2 else None
    return Scene(tuple(things), relation, str(rng.choice(list(BACKGROUNDS))))


def scenes(seed: int, *, unseen: bool = False) -> Iterator[Scene]:
    """Endless random scenes of training, or with `unseen` held-out ones."""
    rng = np.random.default_rng(seed)
    while True:
        scene = random_scene(rng)
        if held_out(scene) == unseen:
            yield scene


def held_out_prompts(count: int, seed: int = 0) -> list[str]:
    """The captions of `count` different held-out scenes."""
    if count > HELD_OUT_CAPTIONS:
        raise BadInput(f"{count} prompts asked; there are {HELD_OUT_CAPTIONS} held-out captions.")
    prompts: dict[str, None] = {}
    for scene in scenes(seed, unseen=True):
        prompts[scene.caption] = None
        if len(prompts) == count:
            return list(prompts)
    raise AssertionError("scenes() never ends")


def parse(caption: str) -> Scene:
    """The scene that a caption describes; `BadInput` for words that no scene has."""
    text, _, background = caption.strip().rpartition(" on ")
    relation = next((r for r in RELATIONS if f" {r} " in text), None)
    things = []
    for part in text.split(f" {relation} ") if relation else [text]:
        match part.split():
            case ["a", size, colour, shape] if (
                size in SIZES and colour in COLOURS and shape in SHAPES
            ):
                things.append(Thing(size, colour, shape))
    if background not in BACKGROUNDS or len(things) != 1 + (relation is not None):
        raise BadInput(
            f"{caption!r} does not describe a scene. It must read like "
            "'a large red circle left of a small blue square on white'; "
            f"shapes {', '.join(SHAPES)}; colours {', '.join(COLOURS)}; sizes {', '.join(SIZES)}; "
            f"backgrounds {', '.join(BACKGROUNDS)}; relations {', '.join(RELATIONS)}."
        )
    return Scene(tuple(things), relation, background)


def _centres(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float]]:
    """The things' centres in pixels: near the middle, or apart along the relation's axis."""
    middle = IMAGE_SIZE / 2
    if scene.relation is None:
        x, y = rng.uniform(-5, 5, size=2)
        return [(middle + x, middle + y)]
    centres = []
    for sign in (-1, 1) if scene.relation in ("left of", "above") else (1, -1):
        along = middle + sign * IMAGE_SIZE / 4 + rng.uniform(-3, 3)
        across = middle + rng.uniform(-6, 6)
        horizontal = scene.relation in ("left of", "right of")
        centres.append((along, across) if horizontal else (across, along))
    return centres


def _signed_distance(
    shape: str, x: NDArray[np.float32], y: NDArray[np.float32], half: float
) -> NDArray[np.float32]:
    """Distance to the outline in pixels, negative inside; `x`, `y` from the centre, y downwards."""
    ax, ay = np.abs(x), np.abs(y)
    distance: NDArray[np.float32]
    match shape:
        case "circle":
            distance = np.hypot(x, y) - np.float32(half)
        case "square":
            distance = np.maximum(ax, ay) - np.float32(SQUARE_SIDE * half)
        case "triangle":  # apex above, base below
            distance = np.maximum(y - half, (2 * ax - y - half) / math.sqrt(5))
        case "cross":
            bar = CROSS_BAR * half
            distance = np.minimum(np.maximum(ax - bar, ay - half), np.maximum(ax - half, ay - bar))
        case _:
            raise AssertionError(shape)
    return distance


def draw(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw the scene: (64, 64, 3), RGB; positions and exact sizes come from `rng`."""
    grid = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for thing, (cx, cy) in zip(scene.things, _centres(scene, rng), strict=True):
        half = rng.uniform(*SIZES[thing.size])
        distance = _signed_distance(thing.shape, grid[None, :] - cx, grid[:, None] - cy, half)
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        image += cover * (np.array(COLOURS[thing.colour], np.float32) - image)
    return np.rint(image).astype(np.uint8)
