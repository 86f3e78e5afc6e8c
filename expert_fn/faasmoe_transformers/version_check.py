"""Checks that the installed torch and transformers have the names of `private_names`.

A process that starts with other versions fails at once with one clear error, instead of at the
first use of a name that is gone. Attributes that instances get in a method are found by the stores
in the bytecode of their class or function, so nothing has to be instantiated; all names together
take about 10 ms beyond importing the libraries. Imports only the standard library itself.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Collection, Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from types import CodeType
from typing import Any

from faasmoe_transformers.errors import UnsupportedVersions
from faasmoe_transformers.private_names import PRIVATE_NAMES, PrivateName

SUPPORTED_VERSIONS = {"torch": ">=2.13,<2.15", "transformers": ">=5.23,<5.24"}
"""The ranges that pyproject.toml allows."""

ROUTER_MODULES = (
    *("attention", "batch_inputs", "continuous_batching", "dtypes", "error_isolation"),
    *("experts_backend", "fast_import", "meta_model", "native_attention", "native_linear"),
    *("native_step", "observation", "onednn", "prefix_cache", "scheduler", "tensor_places"),
)
CHECKPOINT_MODULES = ("dtypes", "gguf_tokenizer", "model_skeleton", "weight_conversion")
SANDBOX_MODULES = ("lazy_import", "meta_model", "onednn")
VLLM_MODULES = ("compiled_artifacts", "onednn")
"""Of a router with vLLM, which has versions of its own."""


def check_private_names(
    modules: Collection[str] | None = None,
    *,
    libraries: Collection[str] = ("torch", "transformers"),
) -> None:
    """Check that the installed libraries have the names that some modules use.

    Args:
        modules: modules of this package; None for all.
        libraries: the libraries to check; names of others are not looked at, nor imported.

    Raises:
        UnsupportedVersions: names are missing; the message lists them with their users and the
            supported versions.
    """
    relevant = [
        name
        for name in PRIVATE_NAMES
        if name.library in libraries and (modules is None or name.used_by in modules)
    ]
    missing = find_missing(relevant)
    if missing:
        raise UnsupportedVersions(_describe_missing(missing))


def find_missing(names: Iterable[PrivateName]) -> list[PrivateName]:
    """Return the names that the installed libraries do not have."""
    return [name for name in names if not _is_present(name.location)]


def _describe_missing(missing: Collection[PrivateName]) -> str:
    installed = " and ".join(f"{name} {_installed_version(name)}" for name in SUPPORTED_VERSIONS)
    supported = " and ".join(f"{name}{allowed}" for name, allowed in SUPPORTED_VERSIONS.items())
    names = "; ".join(f"{name.location} ({name.used_by}: {name.reason})" for name in missing)
    return f"got {installed}, expected {supported}: missing {names}"


def _installed_version(library: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # 10 ms, needed in an error only

    try:
        return version(library)
    except PackageNotFoundError:
        return "(not installed)"


def _is_present(location: str) -> bool:
    module_name, has_path, path = location.partition(":")
    try:
        if not has_path:  # not imported: it may be deferred
            return find_spec(module_name) is not None
        owner: Any = import_module(module_name)
    except ImportError:
        return False
    path, _, parameter = path.partition("(")
    path, _, key = path.partition("[")
    *parents, last = path.split(".")
    for parent in parents:
        if (owner := getattr(owner, parent, None)) is None:
            return False
    if parameter or key:
        owner = getattr(owner, last, None)
        if parameter:
            return owner is not None and _has_parameter(owner, parameter.removesuffix(")"))
        return owner is not None and key.removesuffix("]") in owner
    return _has_attribute(owner, last)


def _has_attribute(owner: Any, name: str) -> bool:
    """Tell whether a module, class or function has an attribute or sets it on its instances."""
    if hasattr(owner, name):
        return True
    classes = owner.__mro__ if isinstance(owner, type) else ()
    if any(name in inspect.get_annotations(cls) for cls in classes):
        return True
    functions = [owner, *(member for cls in classes for member in vars(cls).values())]
    return any(
        instruction.opname == "STORE_ATTR" and instruction.argval == name
        for function in functions
        for code in _codes(function)
        if name in code.co_names
        for instruction in dis.get_instructions(code)
    )


def _has_parameter(function: Any, name: str) -> bool:
    """Tell whether a callable has a parameter, or takes it out of its keyword arguments by name."""
    if name in inspect.signature(function).parameters:
        return True
    return any(name in code.co_consts for code in _codes(function))


def _codes(function: Any) -> Iterator[CodeType]:
    """Yield the code of a function or method, and of the functions defined in it."""
    function = getattr(function, "__func__", function)
    function = getattr(function, "fget", function)
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    pending = [code] if isinstance(code, CodeType) else []
    while pending:
        current = pending.pop()
        yield current
        pending += [const for const in current.co_consts if isinstance(const, CodeType)]
