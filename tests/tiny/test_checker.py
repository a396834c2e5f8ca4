"""The judge of pictures, tested on drawn scenes and on planted mistakes."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from laptop.tiny.checker import judge
from laptop.tiny.scenes import OPPOSITE, RELATIONS, draw, held_out, parse, scenes


def drawn(count: int, seed: int, unseen: bool = False):
    rng = np.random.default_rng(seed)
    chosen = list(itertools.islice(scenes(seed, unseen=unseen), count))
    return [draw(s, rng) for s in chosen], chosen


@pytest.mark.parametrize("unseen", [False, True])
def test_drawn_scenes_are_judged_right(unseen: bool) -> None:
    images, chosen = drawn(1000, 1, unseen)
    shares = judge(images, [s.caption for s in chosen])
    assert shares["prompt_accuracy"] >= 0.99, shares
    assert shares["size"] >= 0.99, shares


def test_blur_and_noise_of_a_good_decoder_do_not_matter() -> None:
    images, chosen = drawn(300, 2)
    rng = np.random.default_rng(0)
    noisy = [np.clip(i + rng.normal(0, 8, i.shape), 0, 255).astype(np.uint8) for i in images]
    assert judge(noisy, [s.caption for s in chosen])["prompt_accuracy"] >= 0.98


@pytest.mark.parametrize("attribute", ["shape", "colour", "place", "background"])
def test_a_planted_mistake_is_found(attribute: str) -> None:
    images, chosen = drawn(300, 3)
    wrong = []
    for scene in chosen:
        first = scene.things[0]
        match attribute:
            case "shape":
                other = "cross" if first.shape != "cross" else "circle"
                scene = replace(scene, things=(replace(first, shape=other), *scene.things[1:]))
            case "colour":
                other = "red" if first.colour != "red" else "cyan"
                scene = replace(scene, things=(replace(first, colour=other), *scene.things[1:]))
            case "place" if scene.relation:
                turned = {"left of": "above", "right of": "below", "above": "left of"}
                scene = replace(scene, relation=turned.get(scene.relation, "right of"))
            case "place":  # one thing where two are asked
                scene = replace(scene, things=scene.things * 2, relation=RELATIONS[0])
            case "background":
                other = "white" if scene.background != "white" else "black"
                scene = replace(scene, background=other)
        wrong.append(scene.caption)
    assert judge(images, wrong)["prompt_accuracy"] <= 0.01


def test_the_same_scene_told_the_other_way_round_is_right() -> None:
    images, chosen = drawn(200, 4)
    pairs = [(i, s) for i, s in zip(images, chosen, strict=True) if s.relation]
    told = [
        replace(s, things=s.things[::-1], relation=OPPOSITE[s.relation]).caption for _, s in pairs
    ]
    assert judge([i for i, _ in pairs], told)["prompt_accuracy"] >= 0.99


def test_empty_and_grey_pictures_are_wrong() -> None:
    blank = np.full((64, 64, 3), 128, np.uint8)
    assert judge([blank], ["a large red circle on grey"])["prompt_accuracy"] == 0


def test_training_scenes_are_never_held_out_and_held_out_ones_always() -> None:
    assert not any(held_out(s) for s in itertools.islice(scenes(0), 500))
    assert all(held_out(s) for s in itertools.islice(scenes(0, unseen=True), 500))
    swapped = [replace(s, things=s.things[::-1]) for s in itertools.islice(scenes(0), 500)]
    assert not any(held_out(s) for s in swapped), "the rule must not depend on the order told"


def test_captions_parse_back() -> None:
    for scene in itertools.islice(scenes(5), 300):
        assert parse(scene.caption) == scene
