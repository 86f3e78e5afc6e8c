import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_transformers.untouched_zeros import MIN_BYTES, UntouchedZeros

N_BYTES = 256 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_large_byte_tensor_takes_memory_only_where_it_is_written(dtype: torch.dtype) -> None:
    before = resident_bytes()
    with UntouchedZeros():
        tensor = torch.zeros(N_BYTES, dtype=dtype, device=torch.device("cpu"))
    assert tensor.dtype == dtype
    assert resident_bytes() - before < N_BYTES // 8
    assert tensor.shape == (N_BYTES,)
    assert tensor.data_ptr() % mmap.PAGESIZE == 0
    assert not tensor[:: mmap.PAGESIZE].any()
    tensor[-1] = 7
    assert tensor[-1] == 7


@given(n_bytes=st.integers(1, 2 * MIN_BYTES))
def test_any_size_is_zeros(n_bytes: int) -> None:
    with UntouchedZeros():
        assert torch.zeros(n_bytes, dtype=torch.uint8).sum() == 0


@pytest.mark.parametrize(
    ("size", "dtype", "device"),
    [
        ((MIN_BYTES - 1,), torch.uint8, "cpu"),
        ((MIN_BYTES,), torch.float32, "cpu"),
        ((2, MIN_BYTES), torch.uint8, "cpu"),
        ((MIN_BYTES,), torch.uint8, "meta"),
    ],
)
def test_other_tensors_are_torchs_own(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    monkeypatch.setattr("mmap.mmap", None)  # a call would raise TypeError
    with UntouchedZeros():
        tensor = torch.zeros(*size, dtype=dtype, device=device)
    assert (tensor.shape, tensor.dtype, tensor.device.type) == (size, dtype, device)


def test_without_room_for_the_mapping_torch_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("out of memory")

    monkeypatch.setattr("mmap.mmap", fail)
    with UntouchedZeros():
        assert torch.zeros(MIN_BYTES, dtype=torch.uint8).shape == (MIN_BYTES,)
