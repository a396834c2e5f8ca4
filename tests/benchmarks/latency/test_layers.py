"""The latency table of a model's layers: complete, never more than the whole, by the protocol."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from laptop.benchmarks.devices.computer import Computer
from laptop.benchmarks.devices.device import Round
from laptop.benchmarks.latency import graph_layers
from laptop.benchmarks.latency.layer_table import layer_table, timed_modules
from laptop.benchmarks.latency.layers import bench_layers, running, shares_of
from laptop.benchmarks.settings import BenchConfig
from laptop.errors import BadInput
from laptop.hosts.host import Local
from laptop.models import loading
from laptop.pruning.units import anatomy_of
from support.onnx_files import onnx_folder
from support.unets import model

HERE = Computer(Local())
QUICK = BenchConfig(rounds=2, iterations=4, seconds=0, warmup_s=0, guidance=False, threads=1)


def check_table(table: dict, folder: Path) -> None:
    known = anatomy_of(loading.empty_unet(str(folder)), granularity=table["granularity"])
    assert [u["name"] for u in table["units"]] == [u.name for u in known.units]
    assert table["params"] == known.params
    times = [u["latency_ms"] for u in table["units"]]
    assert min(times) >= 0
    assert 0 < sum(times) <= table["unet_ms"]["p50"]


@pytest.mark.parametrize("granularity", ["fine", "sublayer"])
def test_all_layers_are_there_and_take_no_more_than_the_whole(
    tiny_folder, tmp_path, granularity
) -> None:
    threads = torch.get_num_threads()
    out = bench_layers(str(tiny_folder), tmp_path / "table.json", QUICK, HERE, granularity)
    table = json.loads(out.read_text())
    check_table(table, tiny_folder)
    assert table["schema"] == "laptop.latency-table/1"
    assert table["runtime"] == "pytorch"
    assert table["conditions"]["threads"] == 1
    assert table["n"] == len(table["samples_ms"]) == 4
    assert not table["valid"]
    assert "4 samples; 20 are needed" in table["invalid_reasons"]
    assert torch.get_num_threads() == threads
    before = out.stat().st_mtime_ns
    bench_layers(str(tiny_folder), out, QUICK, HERE, granularity)
    assert out.stat().st_mtime_ns == before, "a finished table is not made again"


def test_a_pruned_model_has_a_table_of_what_is_left(pruned_folder, tmp_path) -> None:
    out = bench_layers(str(pruned_folder), tmp_path / "table.json", QUICK, HERE)
    check_table(json.loads(out.read_text()), pruned_folder)


def test_a_resolution_is_in_pixels_and_must_fit(tiny_folder, tmp_path) -> None:
    out = tmp_path / "table.json"
    with pytest.raises(BadInput, match="multiple of 32 pixels"):
        bench_layers(str(tiny_folder), out, QUICK, HERE, resolution=100)
    bench_layers(str(tiny_folder), out, QUICK, HERE, resolution=128)
    assert json.loads(out.read_text())["conditions"]["shapes"]["sample"] == [1, 4, 16, 16]


def test_an_unconditional_model_has_a_table_too(tmp_path) -> None:
    folder = tmp_path / "ddpm"
    DDPMPipeline(unet=model("unconditional"), scheduler=DDPMScheduler()).save_pretrained(folder)
    out = bench_layers(str(folder), tmp_path / "table.json", QUICK, HERE, "coarse")
    check_table(json.loads(out.read_text()), folder)
    with pytest.raises(BadInput, match="one size only"):
        bench_layers(str(folder), tmp_path / "other.json", QUICK, HERE, resolution=64)


def test_artifacts_are_refused(tiny_folder, tmp_path) -> None:
    folder = onnx_folder(tmp_path / "artifacts", tiny_folder / "unet" / "config.json")
    with pytest.raises(BadInput, match="made from"):
        bench_layers(str(folder), tmp_path / "table.json", QUICK, HERE)


def test_what_stays_of_a_layer_is_not_counted(tiny_pipe) -> None:
    block = "up_blocks.1.attentions.0.transformer_blocks.0"
    assert timed_modules(tiny_pipe.unet, "up_blocks.1.resnets.0") == {
        "up_blocks.1.resnets.0": 1,
        "up_blocks.1.resnets.0.conv_shortcut": -1,
    }
    assert timed_modules(tiny_pipe.unet, f"{block}.ff") == {f"{block}.ff": 1, f"{block}.norm3": 1}
    shell, inside = "up_blocks.1.attentions.0", [f"{block}.attn1", f"{block}.attn2"]
    assert timed_modules(tiny_pipe.unet, shell, inside) == {
        shell: 1,
        f"{block}.attn1": -1,
        f"{block}.norm1": -1,
        f"{block}.attn2": -1,
        f"{block}.norm2": -1,
    }


def test_shares_are_of_medians_and_leave_room_for_the_rest() -> None:
    signs = {"a": {"a": 1, "a.inside": -1}, "b": {"b": 1}}
    clocks = {"a": [5.0, 5.0, 95.0], "a.inside": [2.0, 2.0, 2.0], "b": [1.0, 50.0, 1.0]}
    assert shares_of(signs, clocks, [10.0, 60.0, 100.0]) == pytest.approx(
        {"a": 3 / 10, "b": 1 / 10}  # and the rest: 6, 7 and 6 of each forward
    )


class Sleep(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return x


def test_clocks_see_what_a_module_takes_and_are_gone_afterwards() -> None:
    net = torch.nn.Sequential(Sleep(), torch.nn.Sequential(Sleep(), Sleep()))
    clocks: dict[str, list[float]] = {"0": [], "1": [], "1.0": []}
    with running(net, clocks):
        for _ in range(2):
            net(torch.zeros(1))
    net(torch.zeros(1))
    assert [len(ms) for ms in clocks.values()] == [2, 2, 2]
    assert min(clocks["0"]) >= 10
    for outer, inner in zip(clocks["1"], clocks["1.0"], strict=True):
        assert outer - inner >= 10
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_layers_are_timed_in_onnx_runtime_too(tiny_folder, tmp_path) -> None:
    config = replace(QUICK, runtimes=("onnxruntime",))
    out = bench_layers(str(tiny_folder), tmp_path / "table.json", config, HERE)
    table = json.loads(out.read_text())
    check_table(table, tiny_folder)
    assert table["runtime"] == "onnxruntime"
    times = [u["latency_ms"] for u in table["units"]]
    assert min(times) > 0
    assert sum(times) > 0.4 * table["unet_ms"]["p50"], "most of a U-Net can be removed"
    with pytest.raises(BadInput, match="in pytorch or onnxruntime, not in executorch"):
        bench_layers(str(tiny_folder), out, replace(QUICK, runtimes=("executorch",)), HERE)


def test_an_operator_of_the_runtime_itself_goes_with_the_one_before_it() -> None:
    signs = {"a.1": {"a.1": 1, "a.1.inside": -1}, "a.10": {"a.10": 1}}
    operators = [
        ("/unet/conv_in/Conv", 4.0),
        ("/unet/a.1/Add", 1.0),
        ("Reorder_7", 2.0),
        ("fused /unet/a.1/inside/Conv", 5.0),
        ("Reorder_8", 1.0),
        ("/unet/a.10/mul/Mul/QuickGeluFusion/", 7.0),
    ]
    found = graph_layers.shares_of(signs, operators)
    assert found == pytest.approx({"a.1": 3 / 20, "a.10": 7 / 20})


def test_layers_share_the_difference_that_they_make() -> None:
    whole, bare = [Round((100.0, 104.0)), Round((200.0, 208.0))], [Round((25.5,)), Round((51.0,))]
    table = layer_table(whole, bare, {"a": 0.3, "b": 0.1}, QUICK)
    assert table.unet_ms.p50 == 152
    assert table.without_layers == pytest.approx(0.25), "the second round was slower as a whole"
    assert table.times_ms == pytest.approx({"a": 0.75 * 0.75 * 152, "b": 0.75 * 0.25 * 152})
