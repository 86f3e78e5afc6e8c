"""A store by reference gives the bits of a store that copies: in sandboxes and in the router."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from families.inputs import prompts
from families.registry import FAMILIES, Family, forward_logits
from sandbox_processes import SandboxProcess, StartSandbox, block_specs
from torch import Tensor

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_contracts.store.references import StoreMode
from faasmoe_contracts.wire import OutputMode
from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.model_loader import load_router_model

SERVED = ("qwen2_moe", "mixtral", "olmoe", "gpt_oss")
DTYPES = (torch.bfloat16, torch.float32)
Sandboxes = tuple[SandboxProcess, ...]


@pytest.fixture(scope="module")
def sandboxes(sandbox: StartSandbox) -> Iterator[Sandboxes]:
    with ExitStack() as stack:
        yield tuple(stack.enter_context(sandbox(capacity=100, token="secret")) for _ in range(2))


def stores(family: Family, dtype: torch.dtype, folder: Path) -> tuple[Store, Store]:
    """Prepare a family's model by copying and by reference."""
    family.build().to(dtype).save_pretrained(folder / "checkpoint")
    copy = prepare(str(folder / "checkpoint"), folder / "copy", mode=StoreMode.COPY)
    return copy, prepare(str(folder / "checkpoint"), folder / "store", mode=StoreMode.AUTO)


def logits(family: Family, store: Store, sandboxes: Sandboxes) -> Tensor:
    """Logits [B, S, V] of a store with its experts in sandboxes, or in the router without any."""
    entries = [FunctionEndpoints(spec) for spec in block_specs(store, 3)]
    owners = [sandboxes[i % len(sandboxes)] for i in range(len(entries) if sandboxes else 0)]
    if owners:
        entries = [o.attach(store, e.spec) for o, e in zip(owners, entries, strict=True)]
    table = RoutingTable(store.manifest.digest, 0, tuple(entries))
    dispatcher = Dispatcher(store, table, mode=OutputMode.REDUCED, token="secret")
    try:
        model = load_router_model(store, dispatcher, device=torch.device("cpu"))
        return forward_logits(family, model, prompts())
    finally:
        dispatcher.close()
        for owner, entry in zip(owners, entries, strict=False):
            assert owner.http.delete(f"/v1/functions/{entry.spec.id}").status_code == 204


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_sandboxes_equal_those_of_a_copy_bit_by_bit(
    name: str, dtype: torch.dtype, sandboxes: Sandboxes, tmp_path: Path
) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    copy, reference = stores(family, dtype, tmp_path)
    checkpoint = reference.manifest.checkpoint
    assert checkpoint is not None
    assert set(checkpoint.layers) == {layer.index for layer in copy.manifest.layers}
    assert not list((reference.path / "experts").glob("*"))
    expected = logits(family, copy, sandboxes)  # [B, S, V]
    got = logits(family, reference, sandboxes)  # [B, S, V]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_logits_of_every_family_equal_those_of_a_copy_bit_by_bit(
    family: Family, tmp_path: Path
) -> None:
    copy, reference = stores(family, torch.float32, tmp_path)
    assert reference.manifest.checkpoint is not None
    referenced = set(reference.manifest.checkpoint.layers)
    copied = reference.manifest.checkpoint.copied
    for layer in copy.manifest.layers:
        is_copied = any(layer.name in names for names in copied.values())
        assert is_copied == (layer.index not in referenced)
    assert torch.equal(logits(family, reference, ()), logits(family, copy, ()))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("shift", [1, 2, 7])
def test_tensors_at_any_alignment_give_the_same_bits(name: str, shift: int, tmp_path: Path) -> None:
    """Headers of older writers are not padded, so that tensors begin anywhere."""
    family = next(family for family in FAMILIES if family.name == name)
    family.build().bfloat16().save_pretrained(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip(b" ")
    header += b" " * (-(len(header) - shift) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    copy = prepare(str(tmp_path / "checkpoint"), tmp_path / "copy")
    reference = prepare(str(tmp_path / "checkpoint"), tmp_path / "store", mode=StoreMode.REFERENCE)
    view = reference.map_layer(0).tensors["down_proj"]
    assert view.pieces[0].offset % 8 == shift
    assert torch.equal(logits(family, reference, ()), logits(family, copy, ()))


def test_both_stores_are_of_one_checkpoint_and_only_one_has_weights(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "olmoe")
    copy, reference = stores(family, torch.bfloat16, tmp_path)
    assert reference.manifest.size_bytes - copy.manifest.size_bytes < 1 << 16
    assert reference.manifest.checkpoint is not None
    assert not any(name.startswith("router/") for name in reference.manifest.files)
    sizes = [
        sum(os.path.getsize(file) for file in store.path.rglob("*") if file.is_file())
        for store in (reference, copy)
    ]
    assert sizes[0] < sizes[1] - reference.manifest.checkpoint.size_bytes * 0.9


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("mode", [StoreMode.AUTO, StoreMode.COPY])
def test_logits_of_a_variant_that_shares_equal_those_of_one_that_does_not(
    name: str, mode: StoreMode, sandboxes: Sandboxes, tmp_path: Path
) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    model = family.build().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    base = prepare(str(tmp_path / "base"), tmp_path / "a", mode=mode)
    for layer in base.manifest.layers:
        for parameter in model.get_submodule(layer.name).parameters():
            parameter.data[0] *= 1.5
    model.save_pretrained(tmp_path / "tuned")
    tuned = str(tmp_path / "tuned")
    alone = prepare(tuned, tmp_path / "alone", mode=mode)
    store = prepare(tuned, tmp_path / "b", mode=mode, share_with=[base.path])
    assert any((store.path / "shared").iterdir())
    for places in ((), sandboxes):
        expected = logits(family, alone, places)  # [B, S, V]
        assert torch.equal(logits(family, store, places), expected)
        assert not torch.equal(logits(family, base, places), expected)
