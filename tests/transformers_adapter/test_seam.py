"""Nothing outside the adapter uses private or undocumented names of torch and transformers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from faasmoe_transformers.private_names import PRIVATE_NAMES

ROOT = Path(__file__).parents[2]
ADAPTER = ROOT / "expert_fn" / "faasmoe_transformers"
SOURCES = sorted(
    path
    for folder in ("operator", "router", "expert_fn", "gateway", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if not path.is_relative_to(ADAPTER)
)

PUBLIC_TRANSFORMERS_MODULES = {"transformers", "transformers.generation"}
PRIVATE_PATH = re.compile(r"(torch|transformers)(\.\w+)*\._[a-z]\w*(\.\w+)*")

PRIVATE_ATTRIBUTES = {
    name.attribute for name in PRIVATE_NAMES if name.attribute and ":" in name.location
}
SHARED_ATTRIBUTES = {
    # of classes of our own, the adapter's among them
    *("add_request", "cache", "error", "fatal_error", "generated_tokens", "is_finished"),
    *("index", "is_transposed", "model", "request_id", "scheduler", "state"),
    # of the standard library, and documented ones of torch and transformers
    *("__call__", "device", "dim", "input_ids", "register", "reset", "convert", "disable"),
}


def violations(source: str) -> list[str]:
    """Return what a module uses of the libraries that only the adapter may use."""
    return [message for node in ast.walk(ast.parse(source)) for message in _violations_of(node)]


def _violations_of(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=aliases):
            yield from (f"import {a.name}" for a in aliases if _is_private_module(a.name))
        case ast.ImportFrom(module=str(module), level=0, names=aliases):
            if _is_private_module(module):
                yield f"from {module} import"
            for alias in aliases:
                path = f"{module}.{alias.name}"
                if PRIVATE_PATH.fullmatch(path) or alias.name in _module_level_names(module):
                    yield f"from {module} import {alias.name}"
        case ast.Attribute(value=value, attr=attribute):
            is_table_name = attribute in PRIVATE_ATTRIBUTES - SHARED_ATTRIBUTES
            path = ast.unparse(node)
            if PRIVATE_PATH.fullmatch(path) or (is_table_name and not _is_self(value)):
                yield path
        case ast.Call(func=ast.Name("getattr" | "setattr" | "hasattr" | "delattr")):
            for argument in node.args[1:2]:
                if isinstance(argument, ast.Constant) and argument.value in PRIVATE_ATTRIBUTES:
                    yield ast.unparse(node)
        case ast.Constant(value=str(text)) if PRIVATE_PATH.fullmatch(text):
            yield repr(text)


def _is_private_module(module: str) -> bool:
    if module.partition(".")[0] == "transformers":
        return module not in PUBLIC_TRANSFORMERS_MODULES
    return PRIVATE_PATH.fullmatch(module) is not None


def _module_level_names(module: str) -> set[str]:
    paths = (name.location.partition(":") for name in PRIVATE_NAMES)
    return {path for owner, _, path in paths if owner == module}


def _is_self(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_adapter_uses_private_names(path: Path) -> None:
    assert violations(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from transformers.generation.continuous_batching.continuous_api import OutputRouter",
        "import transformers.integrations.moe",
        "from transformers.utils import logging",
        "import torch._meta_registrations",
        "from torch import _meta_registrations",
        "from torch.utils._pytree import tree_map_only",
        "from torch.utils import _pytree",
        "torch.utils._pytree.tree_map_only",
        "torch._dynamo.reset()",
        "load('torch._meta_registrations')",
        "model.config._attn_implementation",
        "self.config._attn_implementation = 'eager'",
        "model_class._from_config(config)",
        "module._buffers[name] = buffer",
        "manager.output_router = router",
        "getattr(model, '_supports_sdpa')",
    ],
)
def test_a_use_of_a_private_name_is_found(source: str) -> None:
    assert violations(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch.nn.functional as F",
        "from transformers import AutoConfig",
        "from transformers.generation import ContinuousBatchingConfig",
        "self._buffers = {}",
        "output.request_id",
        '"""Defers torch._meta_registrations until it is used."""',
    ],
)
def test_public_and_own_names_are_allowed(source: str) -> None:
    assert violations(source) == []
