"""Size of the router's weights, which depends on the dtype that it computes in. Pure."""

from __future__ import annotations

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
DEFAULT_DTYPE_BYTES = 2


def widest_router_dtype(dtype: str, device: str, *, store_dtype: str) -> str:
    """Return the widest dtype that a router may compute in.

    Where `dtype` is auto and the device may be a CPU, that is float32: the CPU may have no fast
    products in the store's dtype, which only the router itself can find out.

    Args:
        dtype: `spec.router.dtype`.
        device: `spec.router.device`.
        store_dtype: dtype of the stored weights.
    """
    if dtype != "auto":
        return dtype
    return store_dtype if device == "cuda" else "float32"


def element_bytes(dtype: str) -> int:
    """Return the size of one element in bytes."""
    return DTYPE_BYTES.get(dtype, DEFAULT_DTYPE_BYTES)


def router_weights_bytes(
    stored_bytes: int, *, store_dtype: str, dtype: str, quantized_bytes: int = 0
) -> int:
    """Return the size of the router's weights in bytes.

    Quantised weights are computed with as they lie in the store.

    Args:
        stored_bytes: their size in the store.
        store_dtype: dtype of the stored weights that are not quantised.
        dtype: dtype that the router computes in.
        quantized_bytes: size of those that are quantised.
    """
    float_bytes = stored_bytes - quantized_bytes
    return float_bytes * element_bytes(dtype) // element_bytes(store_dtype) + quantized_bytes
