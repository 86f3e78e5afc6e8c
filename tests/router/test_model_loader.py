"""Loading of the router's model from a store, and errors of damaged stores."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families.inputs import prompts
from families.reference import upcast_model
from families.registry import FAMILIES, Family, experts_modules, forward_logits
from safetensors.torch import load_file, save_file
from sandbox_processes import PreparedStore, SandboxProcess, StartSandbox, block_specs
from torch import Tensor, nn

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_contracts.store import Store, manifest_digest
from faasmoe_contracts.wire import OutputMode
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.engine.batcher import KVCacheGeometry
from faasmoe_router.model_loader import ModelLoadError, load_router_model

CPU = torch.device("cpu")
# Families with router buffers, the general kernel, tied names, and norms inside the experts.
SAMPLE = ["deepseek_v3", "gpt_oss", "zaya", "muse_spark", "diffusion_gemma"]


@pytest.fixture(scope="module")
def sandbox_server(sandbox: StartSandbox) -> Iterator[SandboxProcess]:
    with sandbox(capacity=1000) as server:
        yield server


class UnreachableDispatcher:
    """Fails the test if a layer is computed."""

    def compute(
        self,
        layer: int,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weight: Tensor,
        *,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> Tensor:
        raise AssertionError(f"layer {layer} was computed")


def family_named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


@pytest.mark.parametrize("mode", OutputMode)
@pytest.mark.parametrize("name", SAMPLE)
def test_logits_equal_the_in_process_models(
    sandbox_server: SandboxProcess, prepared_store: PreparedStore, name: str, mode: OutputMode
) -> None:
    store, family = prepared_store(name), family_named(name)
    dispatcher = Dispatcher(store, sandbox_server.attach_blocks(store, 3), mode=mode)
    model = load_router_model(store, dispatcher, device=CPU)
    got = forward_logits(family, model, prompts())
    dispatcher.close()
    expected = forward_logits(family, family.build(), prompts())
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", SAMPLE)
def test_only_experts_stay_on_meta(prepared_store: PreparedStore, name: str) -> None:
    store = prepared_store(name)
    model = load_router_model(store, UnreachableDispatcher(), device=CPU)
    experts = [f"{name}." for name in experts_modules(model)]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.is_meta == name.startswith(tuple(experts)), name
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [f"{layer.name}." for layer in store.manifest.layers] == experts


def test_each_experts_module_calls_its_own_layer(prepared_store: PreparedStore) -> None:
    called: list[int] = []

    class RecordingDispatcher:
        def compute(
            self,
            layer: int,
            hidden: Tensor,
            top_k_index: Tensor,
            top_k_weight: Tensor,
            *,
            while_waiting: Callable[[], None] = lambda: None,
        ) -> Tensor:
            called.append(layer)
            assert hidden.shape == (24, 32)
            assert top_k_index.shape == top_k_weight.shape
            return torch.zeros_like(hidden)

    family = family_named("mixtral")
    model = load_router_model(prepared_store("mixtral"), RecordingDispatcher(), device=CPU)
    forward_logits(family, model, prompts())
    assert called == [0, 1, 2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_served_in_its_dtype(prepared_store: PreparedStore, dtype: str) -> None:
    # Not every tiny model: rounding decides between experts of nearly equal scores.
    store, family = prepared_store("qwen2_moe", dtype=dtype), family_named("qwen2_moe")
    table = RoutingTable(
        store.manifest.digest, 0, tuple(FunctionEndpoints(spec) for spec in block_specs(store, 3))
    )
    model = load_router_model(store, Dispatcher(store, table), device=CPU)
    got = forward_logits(family, model, prompts())
    assert got.dtype == getattr(torch, dtype)
    expected = forward_logits(family, family.build().to(got.dtype), prompts())
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


class InProcessExperts:
    """Computes layers by a model's own experts modules."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(experts_modules(model).values())

    def compute(
        self,
        layer: int,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weight: Tensor,
        *,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> Tensor:
        while_waiting()
        with torch.no_grad():
            total: Tensor = self._modules[layer](hidden, top_k_index, top_k_weight)  # [T, H]
        return total


@pytest.mark.parametrize("name", SAMPLE)
def test_16_bit_store_is_computed_in_float32(prepared_store: PreparedStore, name: str) -> None:
    store, family = prepared_store(name, dtype="bfloat16"), family_named(name)
    reference = upcast_model(family, store)
    model = load_router_model(store, InProcessExperts(reference), device=CPU, dtype=torch.float32)
    loaded = {n: t for n, t in model.state_dict().items() if not t.is_meta}
    assert {t.dtype for t in loaded.values() if t.is_floating_point()} == {torch.float32}
    assert model.dtype == torch.float32
    assert model.config.dtype == torch.float32
    got = forward_logits(family, model, prompts())
    expected = forward_logits(family, reference, prompts())
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["deepseek_v3", "hy_v4"])
def test_conversion_equals_a_store_of_the_dtype(prepared_store: PreparedStore, name: str) -> None:
    """Parameters that the family keeps in float32 stay so."""
    stores = [prepared_store(name, dtype=dtype) for dtype in ("float32", "bfloat16")]
    converted, expected = (
        load_router_model(s, UnreachableDispatcher(), device=CPU, dtype=torch.bfloat16).state_dict()
        for s in stores
    )
    assert {n: t.dtype for n, t in converted.items()} == {n: t.dtype for n, t in expected.items()}
    loaded = [n for n, t in expected.items() if not t.is_meta]
    assert all(torch.equal(converted[n], expected[n]) for n in loaded)
    assert torch.float32 in {expected[n].dtype for n in loaded}


def test_kv_cache_is_counted_in_the_routers_dtype(prepared_store: PreparedStore) -> None:
    store = prepared_store("mixtral", dtype="bfloat16")
    narrow, wide = (
        KVCacheGeometry.from_model(
            load_router_model(store, UnreachableDispatcher(), device=CPU, dtype=dtype)
        )
        for dtype in (None, torch.float32)
    )
    assert (narrow.itemsize, wide.itemsize) == (2, 4)
    assert wide == replace(narrow, itemsize=4)


Change = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


@pytest.fixture
def damaged(prepared_store: PreparedStore, tmp_path: Path) -> Callable[[Change], Store]:
    """Copies a store with its router tensors changed and the manifest updated accordingly."""

    def change_copy(change: Change) -> Store:
        source = prepared_store("deepseek_v3")
        folder = Path(shutil.copytree(source.path, tmp_path / "store"))
        (path,) = Store.open(folder).router_files()
        save_file(dict(change(load_file(path))), path)
        update_manifest(folder, path)
        return Store.open(folder)

    return change_copy


def update_manifest(folder: Path, path: Path) -> None:
    """Update the size of a changed file and the digest in the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["files"][path.relative_to(folder).as_posix()]
    entry["size_bytes"] = path.stat().st_size
    manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


PARAMETER = "model.layers.0.self_attn.o_proj.weight"
BUFFER = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("name", [PARAMETER, BUFFER, "lm_head.weight"])
def test_missing_tensor_is_reported_by_name(damaged: Callable[[Change], Store], name: str) -> None:
    store = damaged(lambda tensors: {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(ModelLoadError, match=f"no tensor for '{name}' and 0 more of the model"):
        load_router_model(store, UnreachableDispatcher(), device=CPU)


def test_unexpected_tensor_is_reported_by_name(damaged: Callable[[Change], Store]) -> None:
    store = damaged(lambda tensors: {**tensors, "model.extra": torch.zeros(1)})
    with pytest.raises(ModelLoadError, match=r"got the tensor 'model.extra' and 0 more"):
        load_router_model(store, UnreachableDispatcher(), device=CPU)


def test_tensor_of_another_shape_is_reported_by_name(damaged: Callable[[Change], Store]) -> None:
    store = damaged(lambda tensors: {**tensors, PARAMETER: torch.zeros(3, 5)})
    with pytest.raises(ModelLoadError, match=f"size mismatch for {PARAMETER}"):
        load_router_model(store, UnreachableDispatcher(), device=CPU)


def test_damaged_file_is_reported_by_name(damaged: Callable[[Change], Store]) -> None:
    store = damaged(dict)
    (path,) = store.router_files()
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ModelLoadError, match=str(path)):
        load_router_model(store, UnreachableDispatcher(), device=CPU)


def test_config_that_transformers_rejects_is_reported(
    damaged: Callable[[Change], Store],
) -> None:
    store = damaged(dict)
    (store.path / "model" / "config.json").write_text('{"model_type": "moe_next"}')
    with pytest.raises(ModelLoadError, match=r"config\.json: .*moe_next"):
        load_router_model(store, UnreachableDispatcher(), device=CPU)


def test_unknown_architecture_is_reported(prepared_store: PreparedStore, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared_store("mixtral").path, tmp_path / "store"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["architecture"] = "MoeNextForCausalLM"
    manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelLoadError, match="architecture: got 'MoeNextForCausalLM', which trans"):
        load_router_model(Store.open(folder), UnreachableDispatcher(), device=CPU)


def test_only_experts_modules_are_bound(prepared_store: PreparedStore) -> None:
    model = load_router_model(prepared_store("mixtral"), UnreachableDispatcher(), device=CPU)
    experts = set(experts_modules(model).values())
    bound = {m for m in model.modules() if "_faasmoe_binding" in vars(m)}
    assert bound == experts
    assert all(isinstance(module, nn.Module) for module in bound)
