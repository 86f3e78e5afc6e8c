"""The dtype that a router computes in, by its setting, the store, the device and the CPU."""

import os
import subprocess
import sys

import pytest
import torch
from sandbox_processes import PreparedStore

from faasmoe_router import compute_dtype
from faasmoe_router.compute_dtype import DtypeSetting, select_compute_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def slow_dtypes(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """The dtypes that the CPU has no fast products in; empty at first."""
    slow: set[torch.dtype] = set()
    monkeypatch.setattr(compute_dtype, "is_fast_on_cpu", lambda dtype: dtype not in slow)
    return slow


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel library is not installed."""
    monkeypatch.setattr(compute_dtype, "_has_kernels", lambda: False)


@pytest.mark.usefixtures("slow_dtypes", "no_kernels")
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_auto_is_the_stores_dtype(prepared_store: PreparedStore, stored: str) -> None:
    store = prepared_store("mixtral", dtype=stored)
    for device in (CPU, CUDA):
        selected = select_compute_dtype("auto", store, device)
        assert selected.dtype == getattr(torch, stored)
        assert selected.reason == "it is the store's dtype"


@pytest.mark.usefixtures("slow_dtypes")
@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_auto_is_float32_on_a_cpu_with_kernels(
    prepared_store: PreparedStore, monkeypatch: pytest.MonkeyPatch, stored: str
) -> None:
    monkeypatch.setattr(compute_dtype, "_has_kernels", lambda: True)
    store = prepared_store("mixtral", dtype=stored)
    selected = select_compute_dtype("auto", store, CPU)
    assert selected.dtype == torch.float32
    assert selected.reason == f"the kernels multiply the store's {stored} weights in float32"
    assert select_compute_dtype("auto", store, CUDA).dtype == getattr(torch, stored)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_auto_is_float32_on_a_cpu_without_fast_products(
    prepared_store: PreparedStore, slow_dtypes: set[torch.dtype], stored: str
) -> None:
    store, dtype = prepared_store("mixtral", dtype=stored), getattr(torch, stored)
    slow_dtypes.add(dtype)
    selected = select_compute_dtype("auto", store, CPU)
    assert selected.dtype == torch.float32
    assert f"no fast products in {stored}" in selected.reason
    assert select_compute_dtype("auto", store, CUDA).dtype == dtype


@pytest.mark.parametrize("setting", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_explicit_dtype_is_used_on_every_device(
    prepared_store: PreparedStore,
    slow_dtypes: set[torch.dtype],
    setting: DtypeSetting,
    device: torch.device,
) -> None:
    slow_dtypes |= {torch.bfloat16, torch.float16}
    store = prepared_store("mixtral", dtype="bfloat16")
    selected = select_compute_dtype(setting, store, device)
    assert selected.dtype == getattr(torch, setting)
    assert selected.reason == "FAASMOE_DTYPE is set"


def test_auto_without_the_kernels_is_the_dtype_that_torch_is_fast_in(
    prepared_store: PreparedStore, slow_dtypes: set[torch.dtype]
) -> None:
    store = prepared_store("mixtral", dtype="bfloat16")
    assert select_compute_dtype("auto", store, CPU, compute="torch").dtype == torch.bfloat16
    slow_dtypes.add(torch.bfloat16)
    selected = select_compute_dtype("auto", store, CPU, compute="torch")
    assert "no fast products in bfloat16" in selected.reason


SCRIPT = """
import sys
from pathlib import Path
import torch
from faasmoe_contracts.store import Store
from faasmoe_router.compute_dtype import select_compute_dtype
for path in sys.argv[1:]:
    print(select_compute_dtype("auto", Store.open(Path(path)), torch.device("cpu")).dtype)
"""


def test_auto_is_float32_for_16_bit_stores_under_avx2(prepared_store: PreparedStore) -> None:
    dtypes = ("bfloat16", "float16", "float32")
    paths = [str(prepared_store("mixtral", dtype=dtype).path) for dtype in dtypes]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *paths],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "FAASMOE_KERNELS": "off"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert result.stdout.split() == ["torch.float32"] * 3
