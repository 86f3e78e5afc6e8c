"""The control plane's names of what functions map: equal where stores share files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store
from faasmoe_contracts.store.references import StoreMode
from faasmoe_operator.control.function_contents import FunctionContents
from faasmoe_router.checkpoint.prepare import prepare

WEIGHTS = "model.safetensors"
BLOCKS = tuple((layer, experts) for layer in range(2) for experts in ((0, 1), (2, 3)))


def contents(store: Store) -> list[str]:
    """Return the contents of functions of two experts each."""
    found = FunctionContents(store)
    specs = [FunctionSpec(f"f{n}", (layer,), experts) for n, (layer, experts) in enumerate(BLOCKS)]
    return [found.content_of(spec) for spec in specs]


@pytest.mark.parametrize("mode", [StoreMode.COPY, StoreMode.AUTO])
def test_only_functions_of_the_same_bytes_have_the_same_name(
    make_checkpoint: Callable[..., Path], tmp_path: Path, mode: StoreMode
) -> None:
    base = make_checkpoint(name="base", dtype=torch.bfloat16)
    tuned = make_checkpoint(name="tuned", dtype=torch.bfloat16)
    tensors = load_file(tuned / WEIGHTS)
    for name, tensor in tensors.items():
        if "layers.0.mlp.experts.1." in name:
            tensor += 1
    save_file(tensors, tuned / WEIGHTS, metadata={"format": "pt"})
    first = prepare(str(base), tmp_path / "a", mode=mode)
    second = prepare(str(tuned), tmp_path / "b", mode=mode, share_with=[first.path])
    alone = prepare(str(tuned), tmp_path / "c", mode=StoreMode.COPY)
    ours, theirs = contents(first), contents(second)
    assert len(set(ours)) == len(BLOCKS)
    assert [a == b for a, b in zip(ours, theirs, strict=True)] == [False, True, True, True]
    assert not set(contents(alone)) & {*ours, *theirs}  # equal bytes of other files


def test_linked_and_copied_stores(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    store = prepare(str(make_checkpoint()), tmp_path / "a", mode=StoreMode.COPY)
    linked, copied = tmp_path / "linked", tmp_path / "copied"
    shutil.copytree(store.path, linked, copy_function=os.link)
    shutil.copytree(store.path, copied)
    assert contents(Store.open(linked)) == contents(store)
    assert not set(contents(Store.open(copied))) & set(contents(store))
