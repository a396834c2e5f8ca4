"""Prefix reuse: bit for bit what plain removal gives, on every family, for the promised FLOPs."""

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode

from laptop.errors import BadInput
from laptop.pruning.criteria import walked
from laptop.pruning.prefix import walk
from laptop.pruning.score import forwards_spent
from laptop.pruning.units import anatomy_of, example_inputs, forward_rows, removed
from support.unets import FAMILIES, SD15, SDXL, model, on_meta, rows_for


@pytest.mark.parametrize(
    ("family", "granularity"),
    [
        *((family, "fine") for family in ("tiny-sdxl", *FAMILIES)),
        *((family, g) for family in ("sd1", "koala-700m") for g in ("coarse", "sublayer")),
        ("unconditional", "coarse"),
    ],
)
def test_a_walk_gives_what_plain_removal_gives(family, granularity) -> None:
    unet = model(family)
    rows, known = rows_for(unet), anatomy_of(unet, 5, granularity)
    output = forward_rows(unet, rows, 2)
    found: dict[str, torch.Tensor] = {}
    walked(unet, known.units, rows, output, lambda n, a, b: found.update({n: b - a}))
    assert set(found) == {u.name for u in known.units}
    for unit in known.units[::2]:
        with removed(unet, unit.needs):
            before = forward_rows(unet, rows, 2)
        with removed(unet, [unit.name, *unit.needs]):
            assert torch.equal(found[unit.name], forward_rows(unet, rows, 2) - before), unit.name
    assert torch.equal(forward_rows(unet, rows, 2), output), "the U-Net is as it was"


def test_sets_of_layers_are_removed_together() -> None:
    unet = model("tiny-sdxl")
    rows, names = rows_for(unet), [u.name for u in anatomy_of(unet, 5).units]
    sets = {frozenset(names[i : i + 9 : 4]) for i in range(0, len(names) - 9, 3)}
    found: dict[frozenset[str], torch.Tensor] = {}
    walk(unet, sets, lambda: forward_rows(unet, rows, 2), found.__setitem__)
    assert set(found) == sets
    for group, output in found.items():
        with removed(unet, group):
            assert torch.equal(forward_rows(unet, rows, 2), output)


@pytest.mark.parametrize(("config", "limit"), [(SD15, 22.3), (SDXL, 47.4)])
def test_a_walk_costs_what_the_suffixes_cost(config, limit) -> None:
    known = anatomy_of(on_meta(config))
    shells = {u.name for u in known.units if u.needs}
    layers = [u for u in known.units if u.name not in shells]
    assert forwards_spent(known, layers) == pytest.approx(limit, abs=0.06)


def test_the_flops_of_a_walk_are_within_3_percent_of_its_suffixes() -> None:
    unet = on_meta(SD15)
    inputs, known = example_inputs(unet.config, 77), anatomy_of(unet, granularity="coarse")
    units = known.units[::3]
    sets = {frozenset([u.name]) for u in units}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        walk(unet, sets, lambda: unet(**inputs).sample, lambda _names, _output: None)
    spent = counter.get_total_flops() / 2 / known.macs
    assert 0 <= spent / forwards_spent(known, units) - 1 < 0.03


def live_bytes() -> int:
    found = (o for o in gc.get_objects() if issubclass(type(o), torch.Tensor))
    tensors = [t for t in found if not isinstance(t, FakeTensor)]  # those of others' traces
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def test_a_paused_walk_holds_what_a_plain_forward_holds_there() -> None:
    """So that the peak is one forward's live activations, and once more those of a branch."""
    unet = model("sd1")
    rows, names = rows_for(unet, 8), [u.name for u in anatomy_of(unet, 5, "coarse").units][::3]
    plain: dict[str, int] = {}
    hooks = [
        unet.get_submodule(n).register_forward_pre_hook(
            lambda _m, _a, n=n: plain.update({n: live_bytes()})
        )
        for n in names
    ]
    forward_rows(unet, rows, 8)
    for hook in hooks:
        hook.remove()
    paused: dict[str, int] = {}

    def visit(gone: frozenset[str], output: torch.Tensor) -> None:
        paused[next(iter(gone))] = live_bytes() - output.untyped_storage().nbytes()

    walk(unet, {frozenset([n]) for n in names}, lambda: forward_rows(unet, rows, 8), visit)
    assert max(plain.values()) > live_bytes(), "the test sees activations"
    for name in names:
        assert paused[name] <= plain[name] * 1.01, name


def test_an_output_that_is_not_finite_is_refused() -> None:
    unet = model("sd1")
    unet.up_blocks[2].resnets[0].conv_shortcut.weight.data.fill_(float("inf"))
    rows = rows_for(unet)
    units = anatomy_of(unet, 5).units[:1]
    with pytest.raises(BadInput, match=r"without down_blocks.0.resnets.0 .* not finite"):
        walked(unet, units, rows, torch.zeros(2, 4, 16, 16), lambda _n, _a, _b: None)
    assert "forward" not in vars(unet.conv_in), "the U-Net is as it was"


def test_a_forward_that_someone_else_put_there_stays() -> None:
    unet = model("sd1")
    rows, calls = rows_for(unet), []
    own, layer = unet.conv_in.forward, unet.conv_in
    layer.forward = lambda x: calls.append(1) or own(x)  # as accelerate's hooks do
    mine = layer.forward
    names = {frozenset(["up_blocks.2.resnets.2"])}
    walk(unet, names, lambda: forward_rows(unet, rows, 2), lambda _names, _output: None)
    assert layer.forward is mine
    assert calls == [1], "once on the main path; the branch takes its output over"
