"""Tensors of the emulated device, registered under torch's PrivateUse1 dispatch key."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from emulated.streams import PendingCopy, counts, current_stream

NAME = "emulated"
LOST_FILE = os.environ.get("EMULATED_LOST", "")
"""While this file exists, every operation fails, as after a kernel error."""

_aten = torch.ops.aten
COPIES = {_aten.copy_.default, _aten._to_copy.default}
ALLOCATORS = {_aten.empty.memory_format, _aten.empty_strided.default}
HOST_READS = {
    _aten._local_scalar_dense.default,
    _aten.is_nonzero.default,
    _aten.item.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
}
"""Operations for which the host waits: they return values, or shapes that depend on values."""
INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}
"""Operations that accept host indices and wait for their copy."""


def _histogram(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _aten.histc.default(values.double(), *args, **kwargs).to(values.dtype)  # type: ignore[no-any-return]


CUDA_ONLY_OPS = {_aten.histc.default: _histogram}
"""Replacements for operations that CUDA supports for more dtypes than the CPU."""

_live_tensors: dict[int, weakref.ref[DeviceTensor]] = {}


class DeviceTensor(Tensor):
    """A tensor on the emulated device.

    Attributes:
        raw: the host tensor with its data; only this module uses it.
    """

    raw: Tensor

    @staticmethod
    def __new__(cls: type[DeviceTensor], raw: Tensor) -> DeviceTensor:
        """Wrap a host tensor."""
        wrapper = Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        wrapper.raw = raw
        key = id(wrapper)
        _live_tensors[key] = weakref.ref(wrapper, lambda _: _live_tensors.pop(key, None))
        return wrapper

    def data_ptr(self) -> int:
        """Return the address of its data."""
        return self.raw.data_ptr()

    def __getitem__(self, index: Any) -> Tensor:
        """Convert list indices to a host tensor, which torch would fail to do."""
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def numpy(self, *, force: bool = False) -> Any:
        """Raise TypeError, as CUDA tensors do."""
        raise TypeError("can't convert a device's tensor to numpy; copy it to host memory first")

    def tolist(self) -> Any:
        """Wait for the values and return them."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Execute an operation on the host tensors."""
        return execute(func, args, kwargs or {})


@dataclass(slots=True)
class MemoryLimit:
    """Memory available to the tensors of this process.

    Attributes:
        size_bytes: the limit; None for no limit.
    """

    size_bytes: int | None = None


limit = MemoryLimit()


def _check_room(size: Sequence[int], dtype: torch.dtype) -> None:
    """Raise OutOfMemoryError if a new tensor would exceed the limit."""
    size_bytes = math.prod(size) * dtype.itemsize
    if limit.size_bytes is not None and allocated_bytes() + size_bytes > limit.size_bytes:
        raise torch.OutOfMemoryError(
            f"CUDA out of memory. Tried to allocate {size_bytes} bytes. The emulated device has "
            f"{limit.size_bytes} bytes."
        )


def allocated_bytes() -> int:
    """Return the total size of the storages of all tensors on the device."""
    storages: dict[int, int] = {}
    for reference in list(_live_tensors.values()):
        tensor = reference()
        if tensor is not None:
            storage = tensor.raw.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def execute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Execute an operation that involves the device.

    Raises:
        AcceleratorError: the device is lost.
        RuntimeError: the operation mixes host and device tensors.
        OutOfMemoryError: the device has not enough memory.
    """
    if LOST_FILE and os.path.exists(LOST_FILE):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    if func in COPIES:
        copied = _copy(func, args, kwargs)
        if copied is not None:
            return copied
    if func in HOST_READS:
        counts.implicit += 1
        current_stream().complete()
    current_stream().apply_on_device()
    if func in ALLOCATORS:
        _check_room(args[0], kwargs.get("dtype") or torch.float32)
    known: dict[int, DeviceTensor] = {}

    def unwrapped(value: Any) -> Any:
        if isinstance(value, DeviceTensor):
            known[id(value.raw)] = value
            return value.raw
        if isinstance(value, torch.device) and value.type == NAME:
            return torch.device("cpu")
        if isinstance(value, Tensor) and value.dim() > 0:
            _refuse_host(func, value)
        return value

    target_device = kwargs.get("device")

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or (
            target_device is not None and target_device.type == "cpu"
        ):
            return value
        return known[id(value)] if id(value) in known else DeviceTensor(value)

    host_args, host_kwargs = tree_map(unwrapped, (args, kwargs))
    results = CUDA_ONLY_OPS.get(func, func)(*host_args, **host_kwargs)
    # A view of a normal tensor is a normal tensor, even in inference mode.
    is_view = any(returned.alias_info is not None for returned in func._schema.returns)
    is_outside = is_view and not any(tensor.is_inference() for tensor in known.values())
    with torch.inference_mode(torch.is_inference_mode_enabled() and not is_outside):
        return tree_map(wrapped, results)


def _refuse_host(func: Any, value: Tensor) -> None:
    if func in INDEXING and value.dtype in (torch.int64, torch.int32, torch.bool):
        counts.implicit += 1
        return
    raise RuntimeError(
        f"{func}: expected all tensors to be on the same device, found {NAME} and {value.device}"
    )


def _copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Copy between host and device; return None for a copy within the device."""
    if func is _aten.copy_.default:
        target, source, *rest = args
        non_blocking = bool(rest[0]) if rest else bool(kwargs.get("non_blocking", False))
        return _copy_across(target, source, non_blocking=non_blocking)
    (source,) = args
    device = kwargs.get("device") or source.device
    if (device.type == NAME) == isinstance(source, DeviceTensor):
        return None
    options = {"dtype": kwargs.get("dtype") or source.dtype, "device": device}
    target = torch.empty_like(source, **options)
    return _copy_across(target, source, non_blocking=bool(kwargs.get("non_blocking", False)))


def _copy_across(target: Tensor, source: Tensor, *, non_blocking: bool) -> Tensor | None:
    to_device, from_device = isinstance(target, DeviceTensor), isinstance(source, DeviceTensor)
    if to_device == from_device:
        return None
    queue = current_stream()
    queue.apply_on_device()
    host_target, host_source = _raw(target), _raw(source)
    is_async = non_blocking and (not to_device or is_pinned(host_source))
    data = host_source.to(host_target.dtype).expand(host_target.shape).clone()
    if is_async:
        same = host_source.dtype == host_target.dtype and host_source.shape == data.shape
        read = host_source if to_device and same else data
        queue.enqueue(PendingCopy(host_target, read, data, to_host=not to_device))
    else:
        counts.implicit += 1
        queue.complete()
        host_target.copy_(data)
    return target


def _raw(tensor: Tensor) -> Tensor:
    return tensor.raw if isinstance(tensor, DeviceTensor) else tensor


_pinned: list[tuple[int, int]] = []


def pin(tensor: Tensor) -> Tensor:
    """Mark the memory of a host tensor as pinned."""
    storage = tensor.untyped_storage()
    pin_range(storage.data_ptr(), storage.nbytes())
    _retained_storages.append(storage)
    return tensor


def pin_range(address: int, size_bytes: int) -> None:
    """Mark a range of host memory as pinned."""
    _pinned.append((address, address + size_bytes))


_retained_storages: list[Any] = []
"""Keeps pinned memory allocated; a new tensor at the same address would appear to be pinned."""


def is_pinned(tensor: Tensor) -> bool:
    """Return whether a host tensor is in pinned memory."""
    at = tensor.data_ptr()
    return any(begin <= at < end for begin, end in _pinned)


_libraries: list[Any] = []


def register(backend: ModuleType) -> torch.device:
    """Register the device with torch for the rest of the process.

    Args:
        backend: becomes `torch.emulated`.
    """
    if not _libraries:
        _setup_privateuseone_for_python_backend(NAME, backend)
        library: Any = torch.library.Library
        fallback = library("_", "IMPL")
        fallback.fallback(lambda func, *args, **kwargs: execute(func, args, kwargs), "PrivateUse1")
        aten = library("aten", "IMPL")
        for func in (_aten.empty.memory_format, _aten.empty_strided.default):
            aten.impl(func, _factory(func), "PrivateUse1")
        _libraries.extend((fallback, aten))
    return torch.device(NAME, 0)


def _factory(func: Any) -> Any:
    return lambda *args, **kwargs: execute(func, args, kwargs)
