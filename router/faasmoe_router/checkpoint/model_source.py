"""Reads a checkpoint for the transformers adapter and reports its errors as PrepareError.

Tensors are opened but not read. Their bytes are read with `pread` rather than mapped, so that what
has been converted leaves memory at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from faasmoe_contracts.text import short_repr
from faasmoe_router.checkpoint.finite_tensors import checked_tensors
from faasmoe_router.checkpoint.formats.methods import dequantized_tensors
from faasmoe_router.checkpoint.source import CheckpointSource, read_json
from faasmoe_router.errors import PrepareError, SourceDamaged, SourceUnsupported
from faasmoe_transformers.errors import UnsupportedModel
from faasmoe_transformers.model_skeleton import (
    DTYPES,
    ModelSkeleton,
    build_skeleton,
    load_config,
)
from faasmoe_transformers.weight_conversion import LazyTensor, first_float_dtype

_DEPTH_FIELDS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")
_HARMLESS_LAYERS = 1000
MAX_NAME_CHARS = 1024
_LONG_NUMBER = re.compile(r"(^|\.)[0-9]{10}")


@contextmanager
def open_tensors(
    checkpoint: CheckpointSource, *, allows_nonfinite: bool = False
) -> Iterator[dict[str, LazyTensor]]:
    """Open every tensor of a checkpoint by name; quantised weights are dequantised when read.

    Reading a part of a weight that is not quantised and not finite raises WeightsNotFinite, unless
    that is allowed.

    Raises:
        PrepareError: a file cannot be read, or its codes and scales are not supported.
    """
    with ExitStack() as stack:
        tensors: dict[str, LazyTensor] = {}
        paths: dict[str, Path] = {}
        for path in checkpoint.weight_files:
            try:
                file = stack.enter_context(safe_open(path, framework="pt", backend="pread"))
                for name in file.keys():  # noqa: SIM118
                    _check_name(name, path)
                    tensors[name], paths[name] = file.get_slice(name), path
            except (OSError, SafetensorError) as error:
                raise PrepareError(f"{path}: got no readable safetensors file: {error}") from error
        if checkpoint.published is not None:
            files = checkpoint.weight_files
            tensors = dequantized_tensors(tensors, files, checkpoint.published)
        yield tensors if allows_nonfinite else checked_tensors(tensors, paths)


def _check_name(name: str, path: Path) -> None:
    """Raise SourceDamaged if no model can have a tensor of this name."""
    if len(name) > MAX_NAME_CHARS or _LONG_NUMBER.search(name):
        raise SourceDamaged(
            f"{path}: got a tensor named {short_repr(name)}, expected at most {MAX_NAME_CHARS} "
            "characters and indices of at most 9 digits"
        )


def load_skeleton(
    folder: Path, tensors: Mapping[str, LazyTensor], dtype: str | None
) -> ModelSkeleton:
    """Build the model of a checkpoint on the meta device.

    Args:
        folder: folder with the checkpoint's config.json.
        tensors: the checkpoint's tensors.
        dtype: name of the store's dtype; None for the config's, or else the tensors'.

    Raises:
        SourceUnsupported: the model cannot be served.
    """
    _check_depth(folder / "config.json", n_tensors=len(tensors))
    with unsupported_source():
        config = load_config(folder)
        if dtype is not None:
            return build_skeleton(config, DTYPES[dtype])
        return build_skeleton(config, config.dtype or first_float_dtype(tensors))


def _check_depth(path: Path, *, n_tensors: int) -> None:
    """Raise SourceUnsupported if a config has far more layers than a checkpoint has tensors.

    Configs and models are built layer by layer, so that a wrong number would take all memory.
    """
    limit = max(n_tensors, _HARMLESS_LAYERS)
    config = read_json(path)
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in _DEPTH_FIELDS:
            depth = section.get(name)
            if isinstance(depth, int) and depth > limit:
                raise SourceUnsupported(
                    f"{path}: {name}: got {depth}, expected at most {limit}: the checkpoint has "
                    f"{n_tensors} tensors"
                )


@contextmanager
def unsupported_source() -> Iterator[None]:
    """Raise SourceUnsupported for what the adapter does not support."""
    try:
        yield
    except UnsupportedModel as error:
        raise SourceUnsupported(str(error)) from error
