"""Loads the router's model: everything of a checkpoint but the routed experts, which stay on meta.

Reads the router's files of a store into a model of the family's class and binds its experts modules
to the dispatcher. Parameters are created on the meta device and replaced by the tensors of the
files, so none is allocated twice. Where the router computes in another dtype than the store's, each
tensor is converted as it is read, so that only one is in memory in both dtypes.

A router that computes in float32 on a CPU with the kernel library keeps the weights of linear
layers and embeddings as they lie in the files, mapped: the kernels compute with those
(faasmoe_transformers.native_linear).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from faasmoe_contracts.store import Store, StoreError, TensorQuantization
from faasmoe_contracts.store.quantization import SCALE_SUFFIX
from faasmoe_expert.functions.dequantization import dequantize
from faasmoe_expert.functions.native_kernel import QUANTIZED_SCHEMES, SCALE_DTYPES
from faasmoe_expert.functions.verification import VerifiedBlocks
from faasmoe_expert.functions.weights import TORCH_DTYPES
from faasmoe_kernels import KernelLibrary, KernelsUnavailable, Matrix, load
from faasmoe_router.errors import RouterWeightsChanged
from faasmoe_router.loaded_models import LOADED_MODELS, LoadedModel
from faasmoe_router.referenced_tensors import (
    RouterWeightsWatch,
    map_referenced_tensors,
    watch_model,
)
from faasmoe_router.skeletons import SKELETONS, Skeleton
from faasmoe_transformers.errors import UnsupportedModel
from faasmoe_transformers.experts_backend import (
    EXPERTS_IMPLEMENTATION,
    MoELayerComputer,
    bind_experts,
    register_implementation,
)
from faasmoe_transformers.meta_model import build_from_config, move_buffers
from faasmoe_transformers.native_linear import use_matrix, use_native_linears
from faasmoe_transformers.native_step import ComputeMode
from faasmoe_transformers.tensor_places import TensorPlaces

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


logger = logging.getLogger(__name__)

SAFETENSORS_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class ModelLoadError(Exception):
    """A store whose router tensors cannot be loaded into the model that its config describes."""


def load_router_model(
    store: Store,
    dispatcher: MoELayerComputer,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    compute: ComputeMode = "auto",
) -> PreTrainedModel:
    """Build the family's model, load the router's tensors and bind its experts to `dispatcher`.

    Expert parameters stay on the meta device and take no memory.

    Args:
        store: the prepared store.
        dispatcher: computes the experts of each layer.
        device: device of the router's tensors.
        dtype: dtype to compute in; None for the store's. As in `from_pretrained`, parameters that
            the family keeps in float32 stay so.
        compute: what computes the model; torch leaves the kernel library unused.

    Raises:
        ModelLoadError: transformers does not know the model, a file cannot be read, a tensor is
            missing, unknown or of another shape, or the device has no room for the tensors.
    """
    register_implementation()
    dtype = dtype or _stored_dtype(store)
    loaded = LOADED_MODELS.take(store, dtype, compute) if device.type == "cpu" else None
    if loaded is None:
        loaded = _load(store, device, dtype, compute)
    else:
        logger.info("The zygote has loaded the model, for models with equal tensors")
    bind_experts(loaded.model, [layer.name for layer in store.manifest.layers], dispatcher)
    watch_model(loaded.model, loaded.watch)
    return loaded.model


def prepare_model(
    store: Store,
    dtype: torch.dtype,
    *,
    user: str,
    compute: ComputeMode = "auto",
    verified_blocks: VerifiedBlocks | None = None,
) -> None:
    """Make what a forked router will take of its model on the CPU: with tensors, or without.

    Args:
        store: the router's store.
        dtype: the dtype that it computes in.
        user: name of the model that it is to serve.
        compute: what computes the model.
        verified_blocks: record of what was verified; that of the process by default.

    Raises:
        ModelLoadError: as `load_router_model`.
        StoreError: a file is missing or of another size.
    """
    register_implementation()
    is_loaded = LOADED_MODELS.prepare(
        store,
        dtype,
        compute,
        user=user,
        load=lambda: _load(
            store,
            torch.device("cpu"),
            dtype,
            compute,
            map_tensors=partial(
                map_referenced_tensors, verified_blocks=verified_blocks, max_threads=1
            ),
        ),
    )
    if not is_loaded:
        SKELETONS.prepare(store, dtype, build_skeleton)


def _stored_dtype(store: Store) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, store.manifest.model.dtype)
    return dtype


def _load(
    store: Store,
    device: torch.device,
    dtype: torch.dtype,
    compute: ComputeMode,
    *,
    map_tensors: TensorMapper = map_referenced_tensors,
) -> LoadedModel:
    """Build the model and load the router's tensors; raises ModelLoadError."""
    stored_dtype = _stored_dtype(store)
    skeleton = SKELETONS.take(store, dtype)
    if skeleton is None:
        skeleton = build_skeleton(store, dtype)
    model, places = skeleton.model, skeleton.places
    uses_kernels = compute != "torch"
    kernels = _find_kernels(device, dtype) if uses_kernels else None
    convert = None
    if dtype != stored_dtype:
        kept = set() if kernels is None else places.stored_weights
        convert = partial(places.converted, kept=kept)
    tensors: dict[str, Tensor] = {}
    quantized = store.manifest.router.quantized
    native = {} if kernels is None else _native_modules(model, quantized)
    codes: dict[str, Tensor] = {}
    for path in store.router_files():
        read = _read_tensors(path, device, convert)
        _check_quantized(read, quantized, path)
        codes |= {name: read.pop(name) for name in _codes_of(native) if name in read}
        tensors |= dequantize_weights(read, quantized, dtype=dtype)
    referenced, watch = _map_referenced(store, device, convert, map_tensors)
    tensors |= referenced
    _assign_tensors(places, tensors, store)
    model.tie_weights()
    if kernels is not None:
        for module, quantization in native.items():
            _use_codes(model.get_submodule(module), module, quantization, codes, kernels)
    _check_all_assigned(places, tensors, store)
    move_buffers(model, device)  # those that are computed, such as rotary frequencies
    if kernels is not None:
        use_native_linears(model, kernels)
    return LoadedModel(model, watch)


def _find_kernels(device: torch.device, dtype: torch.dtype) -> KernelLibrary | None:
    """Return the kernels if the router computes with them: in float32, on a CPU."""
    if device.type != "cpu" or dtype is not torch.float32:
        return None
    try:
        return load()
    except KernelsUnavailable:
        return None


def build_skeleton(store: Store, dtype: torch.dtype) -> Skeleton:
    """Build the family's model with parameters on the meta device; raises ModelLoadError."""
    model = _build_model(store, dtype).eval().requires_grad_(False)
    return Skeleton(model, TensorPlaces(model, dtype))


def _build_model(store: Store, dtype: torch.dtype) -> PreTrainedModel:
    entry, folder = store.manifest.model, store.path / "model"
    config = _load_config(folder)
    try:
        with init_empty_weights(include_buffers=False):
            model = build_from_config(
                config,
                entry.architecture,
                dtype=dtype,
                experts_implementation=EXPERTS_IMPLEMENTATION,
            )
    except UnsupportedModel as error:
        raise ModelLoadError(f"{store.path}: {error}") from error
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _load_config(folder: Path) -> PreTrainedConfig:
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{folder / 'config.json'}: {error}") from error


TensorMapper = Callable[[Store], tuple[dict[str, Tensor], RouterWeightsWatch | None]]
"""Maps the router's tensors that a store refers to, as `map_referenced_tensors`."""
TensorConverter = Callable[[str, Tensor], Tensor]
"""Takes a stored tensor and its name; returns the tensor to compute with."""


def _read_tensors(
    path: Path, device: torch.device, convert: TensorConverter | None
) -> dict[str, Tensor]:
    try:
        if convert is None:
            tensors: dict[str, Tensor] = load_file(path, device=str(device))
            return tensors
        with safe_open(path, framework="pt") as file:
            # What is read is a view of the mapped file, whose pages are not the process's own.
            return {
                name: convert(name, file.get_tensor(name).to(device)) for name in file.offset_keys()
            }
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{path}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(path, device, error) from error


def _map_referenced(
    store: Store,
    device: torch.device,
    convert: TensorConverter | None,
    map_tensors: TensorMapper,
) -> tuple[dict[str, Tensor], RouterWeightsWatch | None]:
    """Return the tensors that lie in the checkpoint, and their watch if they stay mapped."""
    try:
        mapped, watch = map_tensors(store)
        tensors = {
            name: tensor.to(device) if convert is None else convert(name, tensor.to(device))
            for name, tensor in mapped.items()
        }
        if watch is not None:
            watch.check()  # what was copied meanwhile
    except (StoreError, RouterWeightsChanged) as error:
        raise ModelLoadError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(store.path, device, error) from error
    return tensors, watch if device.type == "cpu" else None


def _out_of_memory(
    path: Path, device: torch.device, error: torch.OutOfMemoryError
) -> ModelLoadError:
    reason = str(error).partition("\n")[0]
    return ModelLoadError(
        f"{path}: the router's part of the model does not fit on {device}: {reason}"
    )


def _native_modules(
    model: nn.Module, quantized: Mapping[str, TensorQuantization]
) -> dict[str, TensorQuantization]:
    """Return the quantised modules that the kernels compute from their codes."""
    modules = dict(model.named_modules())
    return {
        name: entry
        for name, entry in quantized.items()
        if type(modules.get(name)) is nn.Linear and not entry.transposed
    }


def _codes_of(modules: Iterable[str]) -> Iterator[str]:
    """Yield the names of the codes and scales of quantised modules."""
    for module in modules:
        yield f"{module}.weight"
        yield f"{module}.weight{SCALE_SUFFIX}"


def _check_quantized(
    tensors: Mapping[str, Tensor], quantized: Mapping[str, TensorQuantization], path: Path
) -> None:
    """Raise ModelLoadError if codes or scales of a file are not what the manifest says."""
    stored = {n: (SAFETENSORS_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()}
    for module, entry in quantized.items():
        if f"{module}.weight" not in tensors:
            continue
        try:
            entry.check_tensors(f"{module}.weight", stored)
        except StoreError as error:
            raise ModelLoadError(f"{path}: {error}") from error


def _use_codes(
    linear: nn.Module,
    name: str,
    quantization: TensorQuantization,
    codes: Mapping[str, Tensor],
    kernels: KernelLibrary,
) -> None:
    """Have a linear layer computed from its codes, which stay where the file is mapped."""
    weight, scales = (codes.get(tensor_name) for tensor_name in _codes_of([name]))
    if weight is None or scales is None:
        return  # reported as missing
    n, k = quantization.shape
    matrix = Matrix(
        QUANTIZED_SCHEMES[quantization.scheme],
        n,
        k,
        weight.data_ptr(),
        scales=scales.data_ptr(),
        scale_dtype=SCALE_DTYPES[quantization.scale_dtype],
        group=quantization.group,
    )
    use_matrix(linear, matrix, kernels, kept=(weight, scales))


def dequantize_weights(
    tensors: Mapping[str, Tensor],
    quantized: Mapping[str, TensorQuantization],
    *,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return the tensors of a file with weights in the place of codes and scales.

    Args:
        tensors: tensors of a router's file by name, checked.
        quantized: how the weights of quantised modules are stored, by the module's name.
        dtype: dtype of the weights.
    """
    entries = {f"{module}.weight": entry for module, entry in quantized.items()}
    scale_names = {name + SCALE_SUFFIX for name in entries}
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in entries:
            scales = tensors[name + SCALE_SUFFIX]
            weights[name] = dequantize(tensor, scales, entries[name]).to(dtype)
        elif name not in scale_names:
            weights[name] = tensor
    return weights


def _assign_tensors(places: TensorPlaces, tensors: Mapping[str, Tensor], store: Store) -> None:
    try:
        unexpected = places.assign(tensors)
    except ValueError as error:
        raise ModelLoadError(
            f"{store.path}: router tensors do not fit the model: {error}"
        ) from error
    if unexpected:
        raise ModelLoadError(
            f"{store.path}: got the tensor {unexpected[0]!r} and {len(unexpected) - 1} more that "
            "the model does not have"
        )


def _check_all_assigned(places: TensorPlaces, tensors: Mapping[str, Tensor], store: Store) -> None:
    """Raise ModelLoadError if a tensor outside the experts was not loaded."""
    expert_prefixes = tuple(f"{layer.name}." for layer in store.manifest.layers)
    missing = [n for n in places.unassigned(tensors) if not n.startswith(expert_prefixes)]
    if missing:
        raise ModelLoadError(
            f"{store.path}: no tensor for {missing[0]!r} and {len(missing) - 1} more of the model"
        )
