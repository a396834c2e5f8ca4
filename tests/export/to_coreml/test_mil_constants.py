"""Compressed constants as a package holds them, against what coremltools unfolds them to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laptop.export.to_coreml.mil_interpreter import load
from laptop.export.to_coreml.mil_operators import OPERATORS
from laptop.export.to_coreml.mil_program import read
from laptop.export.to_coreml.target import library
from support.packages import GIVEN, RNG, random, save

library()
from coremltools.converters.mil import Builder as mb  # noqa: E402


def packed(values: Any, bits: int) -> Any:
    return np.packbits(np.unpackbits(values[:, None], axis=1, bitorder="little")[:, :bits].reshape(-1), bitorder="little")  # noqa: E501  # fmt: skip


CONSTANTS: dict[str, list[tuple[str, Callable[[], Any]]]] = {
    "lut_to_dense": [
        (
            "iOS16",
            lambda bits=bits: mb.constexpr_lut_to_dense(
                indices=packed(RNG.integers(0, 2**bits, 77).astype(np.uint8), bits),
                lut=random(2**bits).astype(np.float16),
                shape=np.array([7, 11], np.uint32),
            ),
        )
        for bits in (4, 6, 8)
    ]
    + [
        (
            "iOS18",
            lambda bits=bits: mb.constexpr_lut_to_dense(
                indices=RNG.integers(0, 2**bits, (6, 10)).astype(library_numpy_type(f"uint{bits}")),
                lut=random(3, 1, 2**bits, 1).astype(np.float16),
            ),
        )
        for bits in (1, 2, 3, 4, 6, 8)
    ],
    "affine_dequantize": [
        (
            "iOS16",
            lambda: mb.constexpr_affine_dequantize(
                quantized_data=RNG.integers(-128, 128, (5, 9)).astype(np.int8),
                zero_point=np.array([1, -3, 0, 7, 2], np.int8),
                scale=np.abs(random(5)).astype(np.float16),
                axis=0,
            ),
        ),
    ],
    "blockwise_shift_scale": [
        (
            "iOS18",
            lambda: mb.constexpr_blockwise_shift_scale(
                data=RNG.integers(-8, 8, (6, 10)).astype(library_numpy_type("int4")),
                scale=np.abs(random(3, 2)).astype(np.float16),
                offset=RNG.integers(-8, 8, (3, 2)).astype(library_numpy_type("int4")),
            ),
        ),
        (
            "iOS18",
            lambda: mb.constexpr_blockwise_shift_scale(
                data=RNG.integers(0, 255, (6, 10)).astype(np.uint8),
                scale=np.abs(random(6, 1)).astype(np.float32),
            ),
        ),
    ],
    "cast": [
        (
            "iOS16",
            lambda: mb.constexpr_cast(
                source_val=random(3, 5).astype(np.float16), output_dtype="fp32"
            ),
        ),
    ],
}


def library_numpy_type(name: str) -> Any:
    from coremltools.converters.mil.mil.types import type_mapping

    return type_mapping.string_to_nptype(name)


@pytest.mark.parametrize(
    ("target", "build"),
    [
        pytest.param(*case, id=f"{k}-{i}")
        for k, cases in CONSTANTS.items()
        for i, case in enumerate(cases)
    ],
)
def test_a_compressed_constant_unfolds_as_coremltools_unfolds_it(
    target: str, build: Callable[[], Any], tmp_path: Path
) -> None:
    expected: list[Any] = []

    def program(given: dict[str, Any]) -> list[Any]:
        made = build()
        expected.append(made.op.materialized_val_inference())
        return [mb.cast(x=made, dtype="fp32"), mb.add(x=given["x"], y=1.0)]

    save(program, tmp_path / "constant.mlpackage", target)
    outputs = load(tmp_path / "constant.mlpackage")(GIVEN)
    got = outputs[read(tmp_path / "constant.mlpackage").outputs[0]]
    np.testing.assert_allclose(got, np.asarray(expected[0], np.float32), rtol=1e-3, atol=1e-6)


def test_every_compressed_constant_is_validated() -> None:
    wanted = {name for name in OPERATORS if name.startswith("const")}
    assert wanted == {"const", *(f"constexpr_{kind}" for kind in CONSTANTS)}
