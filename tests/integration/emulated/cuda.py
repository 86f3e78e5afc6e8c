"""Replaces the parts of `torch.cuda` and of pinned memory that the project uses."""

from __future__ import annotations

import functools
import os
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

import faasmoe_expert.device as resolving
from emulated import streams
from emulated.device import NAME, allocated_bytes, is_pinned, pin, pin_range, register

TOTAL_BYTES = int(os.environ.get("EMULATED_BYTES", str(2 << 30)))

PROPERTIES = SimpleNamespace(
    name="emulated", total_memory=TOTAL_BYTES, major=9, minor=0, multi_processor_count=1
)


def install() -> torch.device:
    """Resolve `cuda` and `auto` to the emulated device for the rest of the process; return it."""
    backend: Any = ModuleType(NAME)
    backend.is_initialized = backend.is_available = lambda: True
    backend._is_in_bad_fork = lambda: False
    backend.current_device = lambda: 0
    backend.device_count = lambda: 1
    backend.manual_seed_all = lambda seed: None
    device = register(backend)
    for module in (backend, torch.cuda):
        _use_streams(module)
    _device_constructors()  # caches the original functions before they are replaced
    torch.empty, torch.tensor = _with_pinning(torch.empty), _created_on_host(torch.tensor)
    tensors: Any = Tensor
    tensors.pin_memory = _pinned_copy
    tensors.is_pinned = lambda self, device=None: is_pinned(self)
    safetensors.torch.load_file = _device_loading(safetensors.torch.load_file)
    cuda: Any = torch.cuda
    cuda.device = lambda device: nullcontext()
    cuda.cudart = lambda: SimpleNamespace(cudaHostRegister=_register_host_memory)
    _patch_resolve_device(device)
    return device


def _register_host_memory(address: int, size_bytes: int, flags: int) -> int:
    pin_range(address, size_bytes)
    return 0


def _use_streams(module: Any) -> None:
    module.Stream, module.Event = streams.Stream, streams.Event
    module.stream, module.current_stream = streams.stream, streams.current_stream
    module.empty_cache = lambda: None
    module.memory_allocated = module.memory_reserved = lambda device=None: allocated_bytes()
    module.mem_get_info = lambda device=None: (TOTAL_BYTES - allocated_bytes(), TOTAL_BYTES)
    module.get_device_properties = lambda device=None: PROPERTIES
    module.get_device_capability = lambda device=None: (PROPERTIES.major, PROPERTIES.minor)
    module.synchronize = lambda device=None: streams.current_stream().synchronize()


def _device_loading(load_file: Any) -> Any:
    def load(path: Any, device: str = "cpu", **options: Any) -> dict[str, Tensor]:
        if not device.startswith(NAME):
            return load_file(path, device=device, **options)  # type: ignore[no-any-return]
        return {name: tensor.to(device) for name, tensor in load_file(path, **options).items()}

    return load


def _patch_resolve_device(device: torch.device) -> None:
    """Replace `resolve_device`; must run before other modules import it."""
    real = resolving.resolve_device

    def resolve_device(name: str, *, field: str = "FAASMOE_DEVICE") -> torch.device:
        return real(name, field=field) if name == "cpu" else device

    resolving.resolve_device = resolve_device
    cuda, built = torch.cuda, torch.backends.cuda
    cuda.is_available = built.is_built = lambda: True
    cuda.device_count = lambda: 1


def _with_pinning(empty: Any) -> Any:
    @functools.wraps(empty)
    def empty_or_pinned(*sizes: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        tensor: Tensor = empty(*sizes, **options)
        return pin(tensor) if pin_memory else tensor

    return empty_or_pinned


def _created_on_host(tensor: Any) -> Any:
    """Wrap `torch.tensor` so that it creates device tensors on the host and copies them."""

    @functools.wraps(tensor)
    def created(
        values: Any, *, device: Any = None, pin_memory: bool = False, **options: Any
    ) -> Tensor:
        target_device = torch.empty(0).device if device is None else torch.device(device)
        host_tensor: Tensor = tensor(
            values, device="cpu" if target_device.type == NAME else target_device, **options
        )
        return host_tensor.to(target_device)

    return created


def _pinned_copy(self: Tensor, device: Any = None) -> Tensor:
    return self if is_pinned(self) else pin(self.clone())
