"""The cost of a training step: all variants do the same work, and the numbers are of that work."""

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch

from laptop.pruning.surgery import prune_unet
from laptop.records import built
from laptop.studies import step_cost
from laptop.studies.step_cost import Case, StepCosts, half_of, make_pair, peak_alone
from laptop.studies.step_variants import VARIANTS, Pair

CASE = Case("sd15", width=0.05, latents=8, batch=1, precision="no")


def saved_bytes(variant: str, pair: Pair) -> int:
    """What autograd keeps for the backward pass of a first step, weights not counted."""
    weights = {p.data_ptr() for unet in (pair.teacher, pair.student) for p in unet.parameters()}
    step, kept = VARIANTS[variant](pair), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(0)
    return sum(size for pointer, (size, _) in kept.items() if pointer not in weights)


def test_the_student_lacks_half_of_the_parameters_and_the_channels_fit_their_groups() -> None:
    unet = make_pair(replace(CASE, width=0.25)).teacher
    whole, half = (
        sum(p.numel() for p in u.parameters()) for u in (unet, prune_unet(unet, half_of(unet)))
    )
    assert unet.config.block_out_channels == (80, 160, 320, 320)
    assert 0.40 < half / whole <= 0.5


def test_our_step_and_the_plain_loop_compute_the_same_losses() -> None:
    lines = {
        name: json.loads(make_step(make_pair(CASE))(0))
        for name, make_step in VARIANTS.items()
        if name != "floor"
    }
    our = lines.pop("ours")
    maps = {k: v / our["alphas"][k] for k, v in our["features"].items() if k != "mid_block"}
    expected = [our["task"], our["output"], sum(maps.values())]
    for name, losses in lines.items():
        assert losses[1:] == pytest.approx(expected, rel=1e-4), name
        assert losses[0] == pytest.approx(sum(expected), rel=1e-4), name


def test_only_a_teacher_that_is_not_frozen_is_recorded() -> None:
    saved = {name: saved_bytes(name, make_pair(CASE)) for name in VARIANTS}
    assert saved["floor"] < saved["ours"] <= saved["plain"]
    assert saved["plain"] < 1.1 * saved["floor"]
    assert saved["plain-autograd"] > 1.5 * saved["plain"]


def test_variants_share_weights_but_neither_gradients_nor_hooks() -> None:
    pair = make_pair(CASE)
    teacher, student = pair.twins()
    for mine, theirs in ((pair.teacher, teacher), (pair.student, student)):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert a is not b
            assert a.data_ptr() == b.data_ptr()
    VARIANTS["plain-autograd"](pair)(0)
    assert not any(p.grad is not None for p in pair.teacher.parameters())
    assert not pair.student.down_blocks[0]._forward_hooks


@pytest.mark.long
def test_the_command_prints_each_variant_with_its_ratios_and_names_what_it_leaves_out(
    monkeypatch, capsys
) -> None:
    monkeypatch.setattr(step_cost, "peaks", lambda case: dict.fromkeys(case.variants, 1000))
    arguments = [
        "--width",
        "0.05",
        "--latents",
        "8",
        "--batch",
        "1",
        "2",
        "--rounds",
        "2",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", ["step_cost", *arguments, "--seconds", "1e-9"])
    step_cost.main()
    assert all("left_out" in case for case in json.loads(capsys.readouterr().out)["cases"])
    monkeypatch.setattr(sys, "argv", ["step_cost", *arguments, "--seconds", "0.01"])
    step_cost.main()
    document = json.loads(capsys.readouterr().out)
    first, second = document["cases"]
    assert "left_out" in second
    assert set(first["ways"]) == set(VARIANTS)
    for cost in first["ways"].values():
        assert len(cost["seconds"]) == len(cost["cpu_seconds"]) == 2
        assert cost["images_per_second"] == pytest.approx(1 / cost["median_s"], rel=0.01)
    assert set(first["ratios"]) == {"ours / floor"} | {
        f"{name} / ours" for name in VARIANTS if name.startswith("plain")
    }
    assert first["forecast"]["memory_bytes"] > 0
    assert "plain-autograd / ours" in built(document, StepCosts, "costs").text()


def test_a_compiled_step_is_compared_with_the_floor_only() -> None:
    assert replace(CASE, kind="both").variants == ["ours", "floor"]
    assert replace(CASE, kind="both").train_config.gradient_checkpointing


@pytest.mark.long
def test_memory_alone_is_at_least_that_of_weights_gradients_moments_and_average() -> None:
    case = replace(CASE, width=0.1)
    pair = make_pair(case)
    teacher, student = (
        sum(p.nbytes for p in unet.parameters()) for unet in (pair.teacher, pair.student)
    )
    del pair
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        peak = pool.submit(peak_alone, case, "ours").result()
    assert teacher + 5 * student < peak < 5 * (teacher + 5 * student)
