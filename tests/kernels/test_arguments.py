"""Arguments that cannot be used raise KernelError, which names the argument."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_matrices import random_matrix

from faasmoe_kernels import (
    Activation,
    Gating,
    KernelDtype,
    KernelError,
    KernelLibrary,
    Matrix,
    Scheme,
    matrix_table,
)

H, I = 64, 96  # noqa: E741
BAD_MATRICES: list[tuple[Scheme, dict[str, Any], str]] = [
    (Scheme.FLOAT32, {"scheme": 9}, "scheme: got 9"),
    (Scheme.FLOAT32, {"scheme": -1}, "scheme: got -1"),
    (Scheme.FLOAT32, {"n": 0}, "n: got 0"),
    (Scheme.FLOAT32, {"k": -4}, "k: got -4"),
    (Scheme.FLOAT32, {"k": 2**32}, "k: got 4294967296"),
    (Scheme.FLOAT32, {"codes": 0}, "codes: got NULL"),
    (Scheme.INT8, {"scales": 0}, "scales: got NULL"),
    (Scheme.INT8, {"group": 48}, "group: got 48, expected 0 or a multiple of 32"),
    (Scheme.INT8, {"group": 128}, r"group: got 128, expected .* divides k \(64\)"),
    (Scheme.INT8, {"group": -32}, "group: got -32"),
    (Scheme.MXFP4, {"zeros": 1}, "zeros: got an address, expected NULL for scheme 5"),
    (Scheme.INT8, {"scale_dtype": 4}, r"scale_dtype: got 4, expected 0 to 3 \(.*E8M0\)"),
    (Scheme.INT4, {"zeros": 1, "zero_dtype": 3}, "zero_dtype: got 3, expected 0 to 2 or 4"),
    (Scheme.FLOAT32, {"bias": 1, "bias_dtype": 3}, "bias_dtype: got 3, expected 0 to 2"),
    (Scheme.INT4, {"k": 63, "group": 0}, "k: got 63, expected an even number"),
    (Scheme.MXFP4, {"group": 64}, "group: got 64, expected 32 for MXFP4"),
    (Scheme.MXFP4, {"group": 0}, "group: got 0, expected 32 for MXFP4"),
    (Scheme.INT8, {"group_rows": 2}, "group_rows: got 2, expected 0 or 1 for scheme 3"),
    (Scheme.BFLOAT16, {"scales_upper": 1}, "scales_upper: got an address, expected NULL for sch"),
    (Scheme.INT4, {"scales_upper": 1, "zeros": 1}, "scales_upper: got an address, .* with zeros"),
    (Scheme.INT8, {"scales_upper": 1, "n": 7}, r"scales_upper: .* odd n \(7\)"),
    (Scheme.FP8, {"group": 48}, "group: got 48, expected 0 or a multiple of 32"),
    (Scheme.FP8, {"group_rows": -1}, "group_rows: got -1, expected at least 0"),
    (Scheme.FP8, {"scale_dtype": 5}, "scale_dtype: got 5, expected 0 to 3"),
    (Scheme.FP8, {"zeros": 1}, "zeros: got an address"),
    (Scheme.FP8, {"factors": 1}, "factors: got an address, expected NULL for scheme 6"),
    (Scheme.FP8, {"n": 7, "scales_upper": 1}, "n: got 7, expected an even number for scales"),
    (Scheme.NVFP4, {"group": 32}, "group: got 32, expected 16 for NVFP4"),
    (Scheme.NVFP4, {"k": 56}, "k: got 56, expected a multiple of 16 for NVFP4"),
    (Scheme.NVFP4, {"scale_dtype": 0}, r"scale_dtype: got 0, expected 5 \(E4M3\)"),
    (Scheme.NVFP4, {"n": 7}, "n: got 7, expected an even number for scales"),
]


def linear_arguments(weight: Matrix, **changes: Any) -> dict[str, Any]:
    """Return valid arguments of `linear` with some of them replaced."""
    x, out = torch.ones(2, H), torch.empty(2, weight.n if 0 < weight.n < 1000 else 8)
    arguments = {
        "weight": weight,
        "x": x.data_ptr(),
        "x_dtype": KernelDtype.FLOAT32,
        "x_stride": max(H, weight.k),
        "rows": 2,
        "out": out.data_ptr(),
        "out_dtype": KernelDtype.FLOAT32,
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(("scheme", "changes", "message"), BAD_MATRICES)
def test_a_matrix_that_cannot_be_used_is_named(
    default_library: KernelLibrary,
    rng: np.random.Generator,
    scheme: Scheme,
    changes: dict[str, Any],
    message: str,
) -> None:
    group = {Scheme.MXFP4: 32, Scheme.NVFP4: 16}.get(scheme, 0)
    good = random_matrix(rng, scheme, 8, H, group=group)
    with pytest.raises(KernelError, match=rf"^w\.{message}"):
        default_library.linear(**linear_arguments(replace(good.matrix, **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": 0}, "x: got NULL"),
        ({"out": 0}, "out: got NULL"),
        ({"x_dtype": 7}, "x_dtype: got 7"),
        ({"out_dtype": -1}, "out_dtype: got -1"),
        ({"rows": -1}, "rows: got -1"),
        ({"x_stride": 63}, "x_stride: got 63, expected at least 64"),
        ({"n_threads": 0}, "n_threads: got 0"),
    ],
)
def test_an_argument_of_a_product_is_named(
    default_library: KernelLibrary,
    rng: np.random.Generator,
    changes: dict[str, Any],
    message: str,
) -> None:
    weight = random_matrix(rng, Scheme.FLOAT32, 8, H)
    with pytest.raises(KernelError, match=f"^{message}"):
        default_library.linear(**linear_arguments(weight.matrix, **changes))


def test_no_rows_are_no_error(default_library: KernelLibrary, rng: np.random.Generator) -> None:
    weight = random_matrix(rng, Scheme.FLOAT32, 8, H)
    default_library.linear(**linear_arguments(weight.matrix, rows=0))


def call_experts(
    library: KernelLibrary,
    rng: np.random.Generator,
    *,
    gating: Gating = Gating(Activation.SILU),  # noqa: B008
    first: dict[str, Any] | None = None,
    down: dict[str, Any] | None = None,
    sizes: tuple[int, ...] = (2,),
    pair_row: tuple[int, ...] = (0, 1),
    positions: tuple[int, ...] = (0, 1),
    **changes: Any,
) -> None:
    """Call `experts` for one expert and two pairs, with some arguments replaced."""
    wide, narrow = (
        random_matrix(rng, Scheme.FLOAT32, 2 * I, H),
        random_matrix(rng, Scheme.FLOAT32, H, I),
    )
    tables = [
        np.frombuffer(matrix_table([replace(matrix, **(fields or {}))]), np.uint8)
        for matrix, fields in ((wide.matrix, first), (narrow.matrix, down))
    ]
    group_sizes, pair_rows, pair_positions = (
        np.array(values, dtype=np.int64) for values in (sizes, pair_row, positions)
    )
    weights = np.ones(2, dtype=np.float32)
    x, out = torch.ones(2, H), torch.empty(2, H)
    arguments: dict[str, Any] = {
        "n_groups": 1,
        "group_sizes": group_sizes.ctypes.data,
        "pair_rows": pair_rows.ctypes.data,
        "pair_positions": pair_positions.ctypes.data,
        "pair_weights": weights.ctypes.data,
        "x": x.data_ptr(),
        "x_dtype": KernelDtype.FLOAT32,
        "hidden_size": H,
        "rows": 2,
        "is_reduced": False,
        "out": out.data_ptr(),
        "out_dtype": KernelDtype.FLOAT32,
    }
    arguments |= {"first": tables[0].ctypes.data, "down": tables[1].ctypes.data, "gating": gating}
    library.experts(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gating": Gating(Activation(0), is_gated=False)}, r"first: got \[192, 64\]"),
        ({"gating": Gating(99)}, "gating.activation: got 99"),  # type: ignore[arg-type]
        (
            {"gating": Gating(Activation.CLAMPED_SWIGLU, is_gated=False)},
            "gating.is_gated: got 0, expected 1",
        ),
        ({"first": {"n": 190}}, r"first: got \[190, 64\], expected \[192, 64\]"),
        ({"first": {"scheme": 17}}, "first.scheme: got 17"),
        ({"down": {"n": 63}}, r"down: got \[63, 96\], expected \[64, 96\]"),
        ({"n_groups": 0}, "pairs.n_groups: got 0"),
        ({"sizes": (0,)}, "pairs.group_sizes: got 0"),
        ({"positions": (0, 2)}, "pairs.positions: got 2, expected 0 to 1"),
        ({"positions": (-1, 0)}, "pairs.positions: got -1"),
        ({"pair_positions": 0}, "pairs.positions: got NULL"),
        ({"group_sizes": 0}, "pairs.group_sizes: got NULL"),
        ({"pair_rows": 0}, "pairs.rows: got NULL"),
        ({"pair_weights": 0}, "pairs.weights: got NULL"),
        ({"hidden_size": 63}, "x_stride: got 63"),
        ({"n_threads": -2}, "n_threads: got -2"),
    ],
)
def test_an_argument_of_a_block_is_named(
    default_library: KernelLibrary,
    rng: np.random.Generator,
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(KernelError, match=f"^{message}"):
        call_experts(default_library, rng, **changes)


@pytest.mark.parametrize("row", [-1, 2])
def test_a_pair_of_no_row_is_named(
    default_library: KernelLibrary, rng: np.random.Generator, row: int
) -> None:
    with pytest.raises(KernelError, match=f"^pairs.rows: got {row}, expected 0 to 1"):
        call_experts(default_library, rng, pair_row=(0, row))


def test_an_unknown_instruction_set_is_named(default_library: KernelLibrary) -> None:
    before = default_library.isa
    with pytest.raises(KernelError, match=r'^isa: got "sse9"'):
        default_library.use_isa("sse9")
    assert default_library.isa == before
