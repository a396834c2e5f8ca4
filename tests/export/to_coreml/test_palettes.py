"""Palettes and the neural engine's attention in small Core ML packages of a U-Net."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from laptop.errors import Unsupported
from laptop.export import closeness, components
from laptop.export.job import Job
from laptop.export.settings import CoremlConfig
from laptop.export.targets import PRECISIONS
from laptop.export.to_coreml import palettes
from laptop.export.to_coreml import target as to_coreml
from laptop.export.to_coreml.mil_program import read, read_spec
from laptop.export.to_coreml.split_einsum import use_split_einsum_
from laptop.models import loading
from support.packages import exact_output, output_of, weights_of


def wrong_palette(package: Path) -> None:
    """Turn one palette around."""
    unfolded = [o for o in read(package).operations if o.kind == "constexpr_lut_to_dense"]
    palette = unfolded[1].inputs["lut"].read().numpy()
    (weights,) = package.rglob("weight.bin")
    data = weights.read_bytes()
    assert data.count(palette.tobytes()) == 1
    weights.write_bytes(data.replace(palette.tobytes(), palette[::-1].tobytes()))


@pytest.fixture(scope="module")
def palettized(job: Callable[..., Job]) -> dict[str, Path]:
    made = {}
    for precision in ("palette8", "palette4"):
        one = job(precision, precision=precision)
        to_coreml.export(one)
        made[precision] = one.path
    return made


def test_fewer_bits_are_a_smaller_package_and_a_larger_error(
    palettized: dict[str, Path], job: Callable[..., Job]
) -> None:
    one = job("compare")
    exact = exact_output(one)
    db = {k: closeness.psnr(exact, output_of(p, one.examples()[0])) for k, p in palettized.items()}
    size = {k: next(p.rglob("weight.bin")).stat().st_size for k, p in palettized.items()}
    assert db["palette8"] > db["palette4"]
    for precision, value in db.items():
        assert value >= PRECISIONS[precision].floor_db, (precision, value)
    assert size["palette8"] > size["palette4"]


def test_a_saved_palette_gives_back_the_values_that_were_chosen(
    palettized: dict[str, Path], small_folder: Path
) -> None:
    found = weights_of(read(palettized["palette4"]))
    layers = palettes.layers(loading.load_unet(str(small_folder)))
    assert len(layers) > 20
    for name, layer in layers.items():
        value = found[f"{name}.weight".replace(".", "_")].float()
        assert len(value.unique()) <= 16
        torch.testing.assert_close(value, palettes.palettize(layer.weight, 4), rtol=0, atol=0)


def test_a_wrong_palette_is_found(
    palettized: dict[str, Path], job: Callable[..., Job], tmp_path: Path
) -> None:
    one = job("palette-fault")
    damaged = tmp_path / "unet.mlpackage"
    shutil.copytree(palettized["palette8"], damaged)
    wrong_palette(damaged)
    found = closeness.psnr(exact_output(one), output_of(damaged, one.examples()[0]))
    assert found < PRECISIONS["palette8"].floor_db


def test_mixed_bits_keep_their_floor_with_less_than_8_bits(job: Callable[..., Job]) -> None:
    one = job("mixed", CoremlConfig(mixed_floor_db=35), precision="mixed")
    to_coreml.export(one)
    exact = exact_output(one)
    assert closeness.psnr(exact, output_of(one.path, one.examples()[0])) >= 34.9
    words = read_spec(one.path).description.metadata.userDefined
    bits = json.loads(words["laptop.palette_bits"])
    layers = palettes.layers(components.load(one.model, "unet").module)
    assert set(bits) == set(layers)
    assert len(set(bits.values())) > 1
    graph = components.load(one.model, "unet")
    assert stored_bits(graph.module, bits) < 8.5


def test_mixed_bits_leave_the_model_as_it_was_and_refuse_what_cannot_be(
    job: Callable[..., Job],
) -> None:
    one = job("impossible")
    graph = components.load(one.model, "unet")
    before = copy.deepcopy(graph.module.state_dict())

    def forward() -> list[torch.Tensor]:
        return list(components.run(graph, one.examples()[0]).values())

    with pytest.raises(Unsupported, match=r"dB after 12 choices, 150 dB wanted"):
        palettes.choose(graph.module, forward, 150)
    after = graph.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_palette_is_no_worse_than_a_slow_k_means(small_folder: Path) -> None:
    """Lloyd's iterations on all weights from many random starts."""
    weight = loading.load_unet(str(small_folder)).conv_in.weight.detach().half().float().reshape(-1)
    generator = torch.Generator().manual_seed(0)
    best = float("inf")
    for _ in range(20):
        centres = weight[torch.randperm(len(weight), generator=generator)[:16]].clone()
        for _ in range(50):
            nearest = (weight[:, None] - centres).abs().argmin(1)
            for i in range(16):
                if (nearest == i).any():
                    centres[i] = weight[nearest == i].mean()
        best = min(best, float((weight - centres[nearest]).square().sum()))
    ours = float((weight - palettes.palettize(weight, 4)).square().sum())
    assert ours <= 1.1 * best


def test_split_einsum_is_the_same_attention(job: Callable[..., Job]) -> None:
    one = job("split-einsum-torch")
    graph = components.load(one.model, "unet")
    exact = components.run(graph, one.examples()[0])["out_sample"]
    use_split_einsum_(graph.module.unet)
    split = components.run(graph, one.examples()[0])["out_sample"]
    assert closeness.psnr(exact.numpy(), split.numpy()) > 110


def test_a_split_einsum_package_holds_einsums_by_head_and_no_matmul(
    job: Callable[..., Job],
) -> None:
    one = job("split-einsum", CoremlConfig(attention="split-einsum"))
    to_coreml.export(one)
    kinds = [op.kind for op in read(one.path).operations]
    unet = loading.load_unet(one.model)
    heads = sum(m.heads for m in unet.modules() if hasattr(m, "heads"))
    assert kinds.count("einsum") == 2 * heads
    assert "matmul" not in kinds
    assert closeness.psnr(exact_output(one), output_of(one.path, one.examples()[0])) > 50


def test_attention_that_split_einsum_does_not_cover_is_refused(small_folder: Path) -> None:
    unet = loading.load_unet(str(small_folder))
    attention = next(m for m in unet.modules() if hasattr(m, "set_processor"))
    attention.group_norm = torch.nn.GroupNorm(1, 16)
    with pytest.raises(Unsupported, match="has group_norm, which the split-einsum form"):
        use_split_einsum_(unet)


def stored_bits(module: torch.nn.Module, bits: dict[str, int]) -> float:
    """Mean bits of a weight of the layers in `bits`, palettes included."""
    sizes = {
        name: palettes.weight_of(layer).numel() for name, layer in palettes.layers(module).items()
    }
    stored = sum(sizes[n] * b + (16 * 2**b if b < 16 else 0) for n, b in bits.items())
    return stored / sum(sizes[name] for name in bits)
