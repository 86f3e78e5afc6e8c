import pytest

from faasmoe_operator.plan.router_weights import router_weights_bytes, widest_router_dtype


@pytest.mark.parametrize("store_dtype", ["bfloat16", "float16", "float32"])
def test_auto_may_be_float32_unless_the_device_is_a_gpu(store_dtype: str) -> None:
    for device in ("cpu", "auto"):
        assert widest_router_dtype("auto", device, store_dtype=store_dtype) == "float32"
    assert widest_router_dtype("auto", "cuda", store_dtype=store_dtype) == store_dtype


@pytest.mark.parametrize("device", ["cpu", "auto", "cuda"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_explicit_dtype_is_used_on_every_device(dtype: str, device: str) -> None:
    assert widest_router_dtype(dtype, device, store_dtype="bfloat16") == dtype


@pytest.mark.parametrize(
    ("store_dtype", "dtype", "size_bytes"),
    [
        ("bfloat16", "bfloat16", 100),
        ("bfloat16", "float16", 100),
        ("bfloat16", "float32", 200),
        ("float16", "float32", 200),
        ("float32", "float32", 100),
        ("float32", "float16", 50),
    ],
)
def test_weights_have_the_routers_element_size(
    store_dtype: str, dtype: str, size_bytes: int
) -> None:
    assert router_weights_bytes(100, store_dtype=store_dtype, dtype=dtype) == size_bytes


def test_quantised_weights_keep_their_size() -> None:
    size_bytes = router_weights_bytes(
        100, store_dtype="bfloat16", dtype="float32", quantized_bytes=40
    )
    assert size_bytes == 2 * 60 + 40
