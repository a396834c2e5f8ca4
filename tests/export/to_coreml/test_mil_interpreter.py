"""The reference interpreter of Core ML programs, operator by operator.

Each operator is saved in a package, read back from the disk and compared with the value that
coremltools itself infers for it on constants, or with the formula of its documentation in float64.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laptop.errors import BadInput, Unsupported
from laptop.export.to_coreml.mil_interpreter import load
from laptop.export.to_coreml.mil_operators import OPERATORS
from laptop.export.to_coreml.mil_program import read, read_spec, spec_path
from laptop.export.to_coreml.target import library
from support.packages import GIVEN, random, save

library()
from coremltools.converters.mil import Builder as mb  # noqa: E402

KERNEL, BIAS, WEIGHT = random(6, 2, 3, 2), random(6), random(5, 4)
SCALE, SHIFT, MEAN, VARIANCE = random(4), random(4), random(4), np.abs(random(4)) + 0.1


def conv_reference(g: dict[str, Any]) -> Any:
    """Two groups, stride (2, 1), dilation (1, 2), padding (1, 0, 2, 1), summed one by one."""
    x = np.pad(g["image"].astype(np.float64), ((0, 0), (0, 0), (1, 0), (2, 1)))
    high, wide = (x.shape[2] - 3) // 2 + 1, x.shape[3] - 2
    out = np.zeros((2, 6, high, wide))
    for b, o, i, j in np.ndindex(*out.shape):
        part = x[b, 2 * (o // 3) : 2 * (o // 3) + 2, 2 * i : 2 * i + 3, j : j + 3 : 2]
        out[b, o, i, j] = (part * KERNEL[o]).sum() + BIAS[o]
    return out


def layer_norm_reference(g: dict[str, Any]) -> Any:
    x = g["x"].astype(np.float64)
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-3) * SCALE + SHIFT


def batch_norm_reference(g: dict[str, Any]) -> Any:
    mean, variance, scale, shift = (
        v.reshape(1, 4, 1, 1).astype(np.float64) for v in (MEAN, VARIANCE, SCALE, SHIFT)
    )
    return (g["image"] - mean) / np.sqrt(variance + 1e-3) * scale + shift


def instance_norm_reference(g: dict[str, Any]) -> Any:
    x = g["image"].astype(np.float64)
    mean, variance = x.mean((2, 3), keepdims=True), x.var((2, 3), keepdims=True)
    scale, shift = (v.reshape(1, 4, 1, 1) for v in (SCALE, SHIFT))
    return (x - mean) / np.sqrt(variance + 1e-3) * scale + shift


def attention_reference(g: dict[str, Any]) -> Any:
    scores = g["query"].astype(np.float64) @ g["key"].swapaxes(-1, -2) / math.sqrt(5)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    return weights @ g["value"]


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def tanh_gelu(x: Any) -> Any:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.astype(float) ** 3)))


def einsum_of(g: dict[str, Any]) -> Any:
    pair = (mb.transpose(x=g["query"], perm=[0, 1, 3, 2]), g["key"])  # (B, C, H, W), (B, W, H, V)
    first = mb.slice_by_size(x=pair[0], begin=[0, 0, 0, 0], size=[2, 3, 3, 4])
    second = mb.slice_by_size(x=pair[1], begin=[0, 0, 0, 0], size=[2, 3, 4, 5])
    second = mb.transpose(x=second, perm=[0, 2, 1, 3])
    second = mb.slice_by_size(x=second, begin=[0, 0, 0, 0], size=[2, 4, 3, 5])
    return mb.einsum(values=(first, second), equation="nchw,nwhu->nchu")


def einsum_reference(g: dict[str, Any]) -> Any:
    first = g["query"].astype(np.float64).swapaxes(2, 3)[:, :, :3]
    second = g["key"][:, :, :4].swapaxes(1, 2)
    return np.einsum("nchw,nwhu->nchu", first, second)


Case = tuple[Callable[[dict[str, Any]], Any], Callable[[dict[str, Any]], Any] | None]
CASES: dict[str, Case] = {
    "add": (lambda g: mb.add(x=g["x"], y=g["y"]), None),
    "batch_norm": (
        lambda g: mb.batch_norm(
            x=g["image"], mean=MEAN, variance=VARIANCE, gamma=SCALE, beta=SHIFT, epsilon=1e-3
        ),
        batch_norm_reference,
    ),
    "cast": (lambda g: mb.cast(x=mb.mul(x=g["x"], y=3.0), dtype="int32"), None),
    "cast.float": (lambda g: mb.cast(x=g["numbers"], dtype="fp32"), None),
    "cast.half": (lambda g: mb.cast(x=g["x"], dtype="fp16"), None),
    "clip": (lambda g: mb.clip(x=g["x"], alpha=-0.5, beta=0.25), None),
    "concat": (lambda g: mb.concat(values=(g["x"], g["y"]), axis=1), None),
    "conv": (
        lambda g: mb.conv(
            x=g["image"],
            weight=KERNEL,
            bias=BIAS,
            strides=[2, 1],
            dilations=[1, 2],
            pad_type="custom",
            pad=[1, 0, 2, 1],
            groups=2,
        ),
        conv_reference,
    ),
    "cos": (lambda g: mb.cos(x=g["x"]), None),
    "cumsum": (lambda g: mb.cumsum(x=g["x"], axis=1), None),
    "einsum": (einsum_of, einsum_reference),
    "equal": (lambda g: mb.equal(x=g["numbers"], y=1), None),
    "erf": (lambda g: mb.erf(x=g["x"]), None),
    "exp": (lambda g: mb.exp(x=g["x"]), None),
    "expand_dims": (lambda g: mb.expand_dims(x=g["x"], axes=[0, -1]), None),
    "fill": (lambda g: mb.fill(shape=[2, 3], value=1.5), None),
    "floor_div": (lambda g: mb.floor_div(x=g["x"], y=g["y"]), None),
    "gather": (lambda g: mb.gather(x=g["x"], indices=g["numbers"], axis=1), None),
    "gather.negative": (lambda g: mb.gather(x=g["x"], indices=[-1, 0], axis=2), None),
    "gather_nd": (
        lambda g: mb.gather_nd(x=g["x"], indices=[[0, 2], [1, 0]]),
        lambda g: g["x"][[0, 1], [2, 0]],
    ),
    "gather_along_axis": (
        lambda g: mb.gather_along_axis(x=g["x"], indices=np.array([[[2, 1, 0, 1]]] * 2), axis=1),
        lambda g: np.take_along_axis(g["x"], np.array([[[2, 1, 0, 1]]] * 2), 1),
    ),
    "gelu": (lambda g: mb.gelu(x=g["x"], mode="EXACT"), None),
    "gelu.tanh": (
        lambda g: mb.gelu(x=g["x"], mode="TANH_APPROXIMATION"),
        lambda g: tanh_gelu(g["x"]),
    ),
    "gelu.sigmoid": (
        lambda g: mb.gelu(x=g["x"], mode="SIGMOID_APPROXIMATION"),
        lambda g: g["x"] * sigmoid(1.702 * g["x"]),
    ),
    "greater": (lambda g: mb.greater(x=g["x"], y=g["y"]), None),
    "greater_equal": (lambda g: mb.greater_equal(x=g["numbers"], y=1), None),
    "identity": (lambda g: mb.identity(x=g["x"]), None),
    "instance_norm": (
        lambda g: mb.instance_norm(x=g["image"], gamma=SCALE, beta=SHIFT, epsilon=1e-3),
        instance_norm_reference,
    ),
    "layer_norm": (
        lambda g: mb.layer_norm(x=g["x"], axes=[-1], gamma=SCALE, beta=SHIFT, epsilon=1e-3),
        layer_norm_reference,
    ),
    "less": (lambda g: mb.less(x=g["x"], y=g["y"]), None),
    "less_equal": (lambda g: mb.less_equal(x=g["numbers"], y=1), None),
    "linear": (lambda g: mb.linear(x=g["x"], weight=WEIGHT, bias=BIAS[:5]), None),
    "logical_and": (
        lambda g: mb.logical_and(x=mb.less(x=g["x"], y=0.3), y=mb.less(x=g["y"], y=0.3)),
        None,
    ),
    "logical_not": (lambda g: mb.logical_not(x=mb.less(x=g["x"], y=0.3)), None),
    "logical_or": (
        lambda g: mb.logical_or(x=mb.less(x=g["x"], y=0.3), y=mb.less(x=g["y"], y=0.3)),
        None,
    ),
    "matmul": (
        lambda g: mb.matmul(x=g["query"], y=g["key"], transpose_x=False, transpose_y=True),
        None,
    ),
    "matmul.transposed": (
        lambda g: mb.matmul(x=g["key"], y=g["value"], transpose_x=True, transpose_y=False),
        None,
    ),
    "maximum": (lambda g: mb.maximum(x=g["x"], y=g["y"]), None),
    "minimum": (lambda g: mb.minimum(x=g["x"], y=g["y"]), None),
    "mul": (lambda g: mb.mul(x=g["x"], y=g["y"]), None),
    "not_equal": (lambda g: mb.not_equal(x=g["numbers"], y=1), None),
    "pad": (
        lambda g: mb.pad(x=g["image"], pad=[0, 0, 0, 0, 1, 2, 0, 3], constant_val=0.5),
        lambda g: np.pad(g["image"], ((0, 0), (0, 0), (1, 2), (0, 3)), constant_values=0.5),
    ),
    "pad.reflect": (
        lambda g: mb.pad(x=g["image"], pad=[1, 2, 0, 3], mode="reflect"),
        lambda g: np.pad(g["image"], ((0, 0), (0, 0), (1, 2), (0, 3)), "reflect"),
    ),
    "pow": (lambda g: mb.pow(x=g["positive"], y=1.5), None),
    "range_1d": (lambda g: mb.range_1d(start=1, end=9, step=3), None),
    "real_div": (lambda g: mb.real_div(x=g["x"], y=g["y"]), None),
    "reduce_argmax": (lambda g: mb.reduce_argmax(x=g["x"], axis=1, keep_dims=False), None),
    "reduce_max": (lambda g: mb.reduce_max(x=g["x"], axes=[-1], keep_dims=True), None),
    "reduce_mean": (lambda g: mb.reduce_mean(x=g["x"], axes=[0, 2], keep_dims=False), None),
    "reduce_sum": (lambda g: mb.reduce_sum(x=g["x"], keep_dims=True), None),
    "relu": (lambda g: mb.relu(x=g["x"]), None),
    "reshape": (lambda g: mb.reshape(x=g["x"], shape=[3, -1, 2]), None),
    "rsqrt": (lambda g: mb.rsqrt(x=g["positive"], epsilon=1e-3), None),
    "scaled_dot_product_attention": (
        lambda g: mb.scaled_dot_product_attention(query=g["query"], key=g["key"], value=g["value"]),
        attention_reference,
    ),
    "select": (
        lambda g: mb.select(cond=mb.less(x=g["x"], y=0.1), a=g["x"], b=g["y"]),
        None,
    ),
    "shape": (lambda g: mb.shape(x=g["x"]), None),
    "sigmoid": (lambda g: mb.sigmoid(x=g["x"]), None),
    "silu": (lambda g: mb.silu(x=g["x"]), lambda g: g["x"] * sigmoid(g["x"])),
    "sin": (lambda g: mb.sin(x=g["x"]), None),
    "slice_by_index": (
        lambda g: mb.slice_by_index(
            x=g["image"],
            begin=[1, -1, 4, 0],
            end=[2, 0, 0, -1],
            stride=[1, 1, -2, 2],
            begin_mask=[False, False, False, True],
            end_mask=[False, False, True, False],
            squeeze_mask=[False, True, False, False],
        ),
        lambda g: g["image"][1:2, -1, 4::-2, :-1:2],
    ),
    "slice_by_size": (
        lambda g: mb.slice_by_size(x=g["x"], begin=[0, 1, 2], size=[1, -1, 2]),
        None,
    ),
    "softmax": (lambda g: mb.softmax(x=g["x"], axis=1), None),
    "split": (lambda g: mb.split(x=g["x"], axis=2, num_splits=2)[1], None),
    "split.sizes": (lambda g: mb.split(x=g["x"], axis=2, split_sizes=[1, 3])[1], None),
    "sqrt": (lambda g: mb.sqrt(x=g["positive"]), None),
    "square": (lambda g: mb.square(x=g["x"]), None),
    "squeeze": (
        lambda g: mb.squeeze(
            x=mb.slice_by_size(x=g["x"], begin=[0, 1, 0], size=[2, 1, 4]), axes=[1]
        ),
        None,
    ),
    "stack": (lambda g: mb.stack(values=(g["x"], g["y"]), axis=1), None),
    "sub": (lambda g: mb.sub(x=g["x"], y=g["y"]), None),
    "tanh": (lambda g: mb.tanh(x=g["x"]), None),
    "tile": (lambda g: mb.tile(x=g["x"], reps=[1, 2, 3]), None),
    "transpose": (lambda g: mb.transpose(x=g["x"], perm=[2, 0, 1]), None),
    "upsample_nearest_neighbor": (
        lambda g: mb.upsample_nearest_neighbor(
            x=g["image"], scale_factor_height=2.0, scale_factor_width=3.0
        ),
        lambda g: g["image"].repeat(2, 2).repeat(3, 3),
    ),
}


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the interpreter makes of a package with all cases; bool as int32, fp16 as fp32."""
    path = tmp_path_factory.mktemp("mil") / "cases.mlpackage"

    def build(given: dict[str, Any]) -> list[Any]:
        made = [case(given) for case, _ in CASES.values()]
        return [mb.cast(x=v, dtype="int32" if "bool" in str(v.dtype) else "fp32") for v in made]

    save(build, path, "iOS18")
    outputs = load(path)(GIVEN)
    return dict(zip(CASES, (outputs[name] for name in read(path).outputs), strict=True))


def inferred(case: Callable[[dict[str, Any]], Any]) -> Any:
    """The value that coremltools infers where all inputs are constants."""
    found: list[Any] = []

    def program() -> Any:
        result = case({name: mb.const(val=value) for name, value in GIVEN.items()})
        found.append(result.val)
        return result

    mb.program(input_specs=[], opset_version=library().target.iOS18)(program)
    return found[0]


@pytest.mark.parametrize("name", CASES)
def test_an_operator_computes_what_coremltools_or_its_documentation_says(
    name: str, computed: dict[str, Any]
) -> None:
    case, reference = CASES[name]
    expected = inferred(case) if reference is None else reference(GIVEN)
    assert expected is not None, "coremltools infers no value: give a reference"
    assert computed[name].shape == np.shape(expected)
    tolerance = 1e-3 if name == "cast.half" else 2e-6
    np.testing.assert_allclose(computed[name], expected, rtol=tolerance, atol=2e-6)


def test_every_operator_is_validated() -> None:
    cases = {name.split(".")[0] for name in CASES}
    assert cases == {name for name in OPERATORS if not name.startswith("const")}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / "small.mlpackage"
    weight = random(40, 4)
    save(lambda g: [mb.softmax(x=mb.linear(x=g["x"], weight=weight), axis=-1)], path, "iOS17")
    return path


def test_an_operator_that_is_not_known_is_an_error_that_names_it(package: Path) -> None:
    spec = read_spec(package)
    block = spec.mlProgram.functions["main"].block_specializations["CoreML7"]
    (op,) = [op for op in block.operations if op.type == "softmax"]
    op.type = "hardmax"
    spec_path(package).write_bytes(spec.SerializeToString())
    with pytest.raises(Unsupported, match="hardmax, which the reference interpreter does not know"):
        load(package)


def test_a_damaged_weight_file_is_an_error_that_names_it(package: Path) -> None:
    (weights,) = package.rglob("weight.bin")
    data = bytearray(weights.read_bytes())
    weights.write_bytes(data[:100])
    with pytest.raises(BadInput, match=r"weight\.bin cannot be read"):
        read(package)
    data[64:68] = b"\0\0\0\0"
    weights.write_bytes(data)
    with pytest.raises(BadInput, match="at 64 is 0x0"):
        read(package)


def test_what_is_no_package_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read as a Core ML package"):
        load(tmp_path / "nothing.mlpackage")


def test_arrays_of_another_model_are_refused(package: Path) -> None:
    run = load(package)
    with pytest.raises(BadInput, match="given were x, y"):
        run({"x": GIVEN["x"], "y": GIVEN["y"]})
    with pytest.raises(BadInput, match=r"takes x of shape \(2, 3, 4\), given was \(1, 3, 4\)"):
        run(GIVEN | {"x": GIVEN["x"][:1]})


def test_a_value_is_rounded_to_the_type_that_the_program_declares(computed: dict[str, Any]) -> None:
    half = GIVEN["x"].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(computed["cast.half"], half)
