import copy
from collections.abc import Callable
from typing import Any

import pytest

from faasmoe_contracts.store import Manifest, QuantizationEntry, StoreError, manifest_digest
from faasmoe_contracts.store.quantization import TensorQuantization, relative_error

ENTRY: dict[str, Any] = {
    "scheme": "int4",
    "codebook": "linear",
    "symmetric": True,
    "shape": [48, 64],
    "group": 32,
    "scale_dtype": "bfloat16",
    "transposed": False,
    "norm": 3.0,
    "relative_error": 0.1,
}
MXFP4 = {"scheme": "mxfp4", "codebook": "e2m1", "scale_dtype": "e8m0"}
FP8 = {"scheme": "fp8", "codebook": "e4m3", "scale_dtype": "float32"}
FP8_BLOCKS = {**FP8, "shape": [48, 72], "group": 32, "group_rows": 16, "parts": 2}
NVFP4 = {"scheme": "nvfp4", "codebook": "e2m1", "scale_dtype": "e4m3", "group": 16, "parts": 2}
TENSORS = {"w": ("U8", (6, 48, 32)), "w_scale": ("BF16", (6, 48, 2))}


def parse(**changes: Any) -> TensorQuantization:
    return TensorQuantization.from_json({**ENTRY, **changes}, path="q")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        MXFP4,
        {"group": 0},
        {"scheme": "int8"},
        {"symmetric": False},
        {"scheme": "int8", "symmetric": False},
        FP8,
        {**FP8, "scale_dtype": "e8m0"},
        FP8_BLOCKS,
        NVFP4,
    ],
)
def test_round_trips_through_json(changes: dict[str, Any]) -> None:
    assert parse(**changes).to_json() == {**ENTRY, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "int3"}, "q.scheme: got 'int3', expected one of int8, int4, mxfp4"),
        ({"codebook": "e2m1"}, "q.codebook: got 'e2m1', expected one of linear"),
        ({**FP8, "symmetric": False}, "q.symmetric: got False, expected true for fp8"),
        ({**FP8, "group": 48}, "q.group: got 48, expected 0 or a multiple of 32"),
        ({**FP8, "group_rows": 49}, "q.group_rows: got 49, expected 1 to 48 for fp8"),
        ({**FP8_BLOCKS, "group_rows": 25}, "q.group_rows: got 25, expected 1 to 24 for fp8"),
        ({**FP8, "group_rows": 0}, "q.group_rows: got 0, expected an integer"),
        ({**FP8, "parts": 3}, "q.parts: got 3, expected 1, or 2 of an even number of rows"),
        ({**FP8, "parts": 2, "shape": [47, 64]}, "q.parts: got 2, expected 1, or 2 of an even"),
        ({"parts": 2}, "q.parts: got 2, expected 1 for int4"),
        ({"group_rows": 2}, "q.group_rows: got 2, expected 1 to 1 for int4"),
        ({**FP8, "scale_dtype": "e4m3"}, "q.scale_dtype: got 'e4m3', expected one of bfloat16"),
        ({**NVFP4, "group": 32}, "q.group: got 32, expected 16 for nvfp4"),
        ({**NVFP4, "scale_dtype": "float32"}, "q.scale_dtype: got 'float32', expected one of e4m3"),
        ({**NVFP4, "shape": [48, 72]}, "q.group: got 16, expected 0 or a multiple of 16 that div"),
        ({"group": 48}, "q.group: got 48, expected 0 or a multiple of 32 that divides 64"),
        ({"group": 128}, "q.group: got 128, expected 0 or a multiple of 32 that divides 64"),
        ({**MXFP4, "group": 64}, "q.group: got 64, expected 32 for mxfp4"),
        ({"scale_dtype": "e8m0"}, "q.scale_dtype: got 'e8m0', expected one of bfloat16"),
        ({**MXFP4, "scale_dtype": "float16"}, "q.scale_dtype: got 'float16', expected one of e8m0"),
        ({"shape": [48, 63], "group": 0}, r"q.shape: got \[48, 63\], expected an even number"),
        ({"shape": [48]}, r"q.shape: got \[48\], expected two positive integers"),
        ({"shape": [48, True]}, "q.shape: got"),
        ({"transposed": 0}, "q.transposed: got 0, expected true or false"),
        ({"norm": -1.0}, "q.norm: got -1.0, expected a number of 0 or more"),
        ({"zeros": "U8"}, "q: got unknown fields zeros"),
    ],
)
def test_names_the_wrong_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        parse(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w": ("U8", (6, 48, 64))}, r"w: got U8 \[6, 48, 64\], expected U8 \[6, 48, 32\]: int4 c"),
        ({"w": ("I8", (6, 48, 32))}, r"w: got I8 \[6, 48, 32\], expected U8 \[6, 48, 32\]"),
        ({"w_scale": ("BF16", (6, 48, 1))}, r"got BF16 \[6, 48, 1\], expected BF16 \[6, 48, 2\]"),
        ({"w_scale": ("F32", (6, 48, 2))}, r"BF16 \[6, 48, 2\]: int4 scales of \[48, 64\]"),
        ({"w_scale": None}, "w_scale: got nothing, expected BF16"),
    ],
)  # fmt: skip
def test_names_codes_and_scales_of_a_wrong_size(changes: dict[str, Any], message: str) -> None:
    parse().check_tensors("w", TENSORS, leading=(6,))
    tensors = {name: value for name, value in (TENSORS | changes).items() if value is not None}
    with pytest.raises(StoreError, match=message):
        parse().check_tensors("w", tensors, leading=(6,))


@pytest.mark.parametrize(
    ("entry", "missing", "message"),
    [
        ({"symmetric": False}, "w_zero_point", r"U8 \[6, 48, 2\]: int4 zero points of \[48, 64\]"),
        (FP8_BLOCKS, "w_scale", r"expected F32 \[6, 4, 3\]: fp8 scales of \[48, 72\] weights"),
        (FP8_BLOCKS, "w", r"expected F8_E4M3 \[6, 48, 72\]: fp8 codes"),
        (NVFP4, "w_scale", r"expected F8_E4M3 \[6, 48, 4\]: nvfp4 scales"),
        (NVFP4, "w_global_scale", r"expected F32 \[6, 2, 1\]: nvfp4 factors of \[48, 64\]"),
    ],
)
def test_names_each_tensor_of_a_weight(entry: dict[str, Any], missing: str, message: str) -> None:
    parsed = parse(**entry)
    tensors = {
        f"w{suffix}": (dtype, (6, *shape)) for suffix, (dtype, shape) in parsed.components.items()
    }
    parsed.check_tensors("w", tensors, leading=(6,))
    for wrong in (None, ("I64", (6, 1, 1)), (tensors[missing][0], (6, 3, 5))):
        changed = {**tensors, missing: wrong} if wrong else {**tensors}
        if wrong is None:
            del changed[missing]
        with pytest.raises(StoreError, match=f"^{missing}: got .*{message}"):
            parsed.check_tensors("w", changed, leading=(6,))


def test_sizes() -> None:
    assert parse(**FP8).size_bytes == 48 * 64 + 48 * 2 * 4
    assert parse(**FP8_BLOCKS).size_bytes == 48 * 72 + 4 * 3 * 4
    assert parse(**NVFP4).size_bytes == 48 * 32 + 48 * 4 + 2 * 4
    assert parse(symmetric=False).size_bytes == 48 * 32 + 48 * 2 * 3
    assert parse().size_bytes == 48 * 32 + 48 * 2 * 2
    assert parse(scheme="int8", group=0).size_bytes == 48 * 64 + 48 * 2
    assert parse(**MXFP4).size_bytes == 48 * 32 + 48 * 2


def test_relative_error_weighs_by_the_norms() -> None:
    entries = [parse(norm=3.0, relative_error=0.1), parse(norm=4.0, relative_error=0.2)]
    assert relative_error(entries) == pytest.approx(((0.3**2 + 0.8**2) ** 0.5) / 5)
    assert relative_error([]) == 0.0


def with_digest(manifest: dict[str, Any]) -> dict[str, Any]:
    return {**manifest, "digest": manifest_digest(manifest)}


def test_a_manifest_without_quantised_weights_is_as_it_was(manifest: dict[str, Any]) -> None:
    parsed = Manifest.from_json(manifest)
    assert parsed.quantization == QuantizationEntry("none", "none")
    assert parsed.router.quantized == {}
    assert parsed.to_json() == manifest
    assert not {"quantization", "router"} & set(manifest)


def test_a_manifest_names_what_is_quantised(manifest: dict[str, Any]) -> None:
    manifest = copy.deepcopy(manifest)
    manifest["layers"][0]["quantization"] = {"gate_up_proj": ENTRY}
    manifest["quantization"] = {"experts": "int4", "router": "int8"}
    manifest["router"] = {"quantized": {"lm_head": {**ENTRY, "scheme": "int8"}}}
    parsed = Manifest.from_json(with_digest(manifest))
    assert parsed.layers[0].quantization["gate_up_proj"].group == 32
    assert parsed.quantization == QuantizationEntry(experts="int4", router="int8")
    assert parsed.router.quantized_bytes == 48 * 64 + 48 * 2 * 2
    assert Manifest.from_json(parsed.to_json()) == parsed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m["layers"][1].update(quantization={"down_proj": {**ENTRY, "scheme": "q4"}}),
            r"layers\[1\].quantization\['down_proj'\].scheme: got 'q4', expected one of int8",
        ),
        (lambda m: m.update(quantization={"experts": "int8"}), "quantization.router: got nothing"),
        (
            lambda m: m.update(quantization={"experts": "int8", "router": "mxfp4"}),
            "quantization.router: got 'mxfp4', expected one of none, int8, int4",
        ),
        (lambda m: m.update(router={"quantized": {"q": 1}}), r"router.quantized\['q'\]: got 1"),
    ],
)
def test_a_manifest_names_the_wrong_field(
    manifest: dict[str, Any], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    manifest = copy.deepcopy(manifest)
    change(manifest)
    with pytest.raises(StoreError, match=message):
        Manifest.from_json(with_digest(manifest))
