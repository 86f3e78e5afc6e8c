"""Makes a router import torch and transformers in half the time, by what it never uses.

Called before the first import of either. Deferred until something uses it: torch's compiler, and
its kernels for meta tensors. Left out: transformers' distributed code, since a router is one
process; transformers treats torch as one that was built without it. Cached: the index of all names
that transformers exports, for which it otherwise reads 40 MB of its sources twice at each start.
The cache lies beside this module's bytecode; `python -m faasmoe_transformers.fast_import` fills it.

Imports only the standard library and contracts itself.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import logging
import os
import sys
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from faasmoe_contracts.atomic_file import write_atomically
from faasmoe_transformers.lazy_import import (
    META_REGISTRATIONS,
    call_after_import,
    defer_import,
    is_deferred,
)

logger = logging.getLogger(__name__)

COMPILER = "torch._dynamo"
MARKS = ("allow_in_graph", "assume_constant_result", "mark_static_address")
"""Functions of the compiler that tell it something about a function or tensor, for later."""
GETITEM_TRANSFORM = "torch._dynamo._trace_wrapped_higher_order_op"
"""The only module of the compiler that transformers imports, for masks under `vmap`."""
IMPORT_UTILS = "transformers.utils.import_utils"
CACHE_NAME = "transformers-import-structure-{:08x}.json"
"""With a checksum of the installation's path: one copy of this module may serve several."""

ImportStructure = dict[frozenset[str], dict[str, set[str]]]
"""Exported names by module, by the backends that they require."""


def prepare_fast_import() -> None:
    """Arrange for a fast import of torch and transformers; no effect once either is imported."""
    if not sys.modules.keys().isdisjoint(("torch", "transformers")):
        return
    defer_import(META_REGISTRATIONS)
    pending = _PendingMarks()
    defer_import(
        COMPILER,
        {
            "disable": _disable_compiler,
            **{name: pending.stand_in(name) for name in MARKS},
        },
        independent_submodules=(GETITEM_TRANSFORM,),
        load_first=(META_REGISTRATIONS,),
        on_executed=pending.apply,
    )
    call_after_import(IMPORT_UTILS, _replace_names)


def prepare_import_of_names() -> None:
    """Arrange for the cached index of names alone, for a process that uses the rest."""
    call_after_import(IMPORT_UTILS, _cache_exported_names)


class _PendingMarks:
    """Functions and tensors that were marked for the compiler before it was loaded."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, weakref.ref[Any], tuple[Any, ...]]] = []

    def stand_in(self, name: str) -> Callable[..., Any]:
        """Return what records a mark until the compiler's function of that name can set it."""

        def mark(target: Any, *options: Any) -> Any:
            self._marks = [mark for mark in self._marks if mark[1]() is not None]
            self._marks.append((name, weakref.ref(target), options))
            return target

        return mark

    def apply(self, compiler: ModuleType) -> None:
        """Set the recorded marks."""
        for name, reference, options in self._marks:
            if (target := reference()) is not None:
                getattr(compiler, name)(target, *options)
        self._marks.clear()


def _disable_compiler(
    function: Callable[..., Any] | None = None, recursive: bool = True, **options: Any
) -> Callable[..., Any]:
    """Stand in for the compiler's `disable`: the function is disabled once there is a compiler."""
    if function is None:
        return functools.partial(_disable_compiler, recursive=recursive, **options)
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            if is_deferred(COMPILER):
                return function(*args, **kwargs)
            disabled = sys.modules[COMPILER].disable(function, recursive, **options)
        return disabled(*args, **kwargs)

    return call


def _replace_names(import_utils: ModuleType) -> None:
    _cache_exported_names(import_utils)
    vars(import_utils).update(is_torch_distributed_available=lambda: False)


def _cache_exported_names(import_utils: ModuleType) -> None:
    original = import_utils.define_import_structure

    def define_import_structure(module_path: str, prefix: str | None = None) -> ImportStructure:
        models = _models_folder(Path(module_path))
        if models is None:
            structure: ImportStructure = original(module_path, prefix)
            return structure
        structure = _read_or_compute(models, lambda: original(module_path))
        if prefix is None:
            return structure
        return {
            backends: {f"{prefix}.{module}": names for module, names in modules.items()}
            for backends, modules in structure.items()
        }

    vars(import_utils).update(define_import_structure=define_import_structure)


def _models_folder(path: Path) -> Path | None:
    """Return the folder of all families if `path` is it or its `__init__.py`, else None."""
    folder = path.parent if path.name == "__init__.py" else path
    return folder if folder.name == "models" and folder.parent.name == "transformers" else None


def _read_or_compute(models: Path, compute: Callable[[], ImportStructure]) -> ImportStructure:
    """Return the import structure of all families, from the cache if it is of this installation."""
    cached = _read_cache(_cache_path(models), _installation(models))
    if cached is not None:
        return cached
    structure = compute()
    if not sys.dont_write_bytecode:
        _write_cache(_cache_path(models), _installation(models), structure)
    return structure


def _cache_path(models: Path) -> Path:
    name = CACHE_NAME.format(zlib.crc32(os.fsencode(models)))
    return Path(importlib.util.cache_from_source(__file__)).with_name(name)


def _installation(models: Path) -> list[object]:
    """Return what differs between installations of transformers: an upgrade replaces each file."""
    init = models.parent / "__init__.py"  # which has the version
    status = os.stat(init)
    return [str(init), status.st_size, status.st_mtime_ns]


def _read_cache(path: Path, installation: list[object]) -> ImportStructure | None:
    try:
        cached = json.loads(path.read_text())
        if cached["installation"] != installation:
            return None
        return {
            frozenset(backends): {module: set(names) for module, names in modules.items()}
            for backends, modules in cached["structure"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.debug("no import structure in %s: %s", path, error)
        return None


def _write_cache(path: Path, installation: list[object], structure: ImportStructure) -> None:
    document = {
        "installation": installation,
        "structure": [
            [sorted(backends), {module: sorted(names) for module, names in modules.items()}]
            for backends, modules in structure.items()
        ],
    }
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(document))
    except OSError as error:  # as for bytecode, a read-only installation only costs time
        logger.debug("import structure not cached: %s", error)


def main() -> int:
    """Fill the cache, as `compileall` does for bytecode; return the exit status."""
    sys.dont_write_bytecode = False
    prepare_import_of_names()
    importlib.import_module("transformers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
