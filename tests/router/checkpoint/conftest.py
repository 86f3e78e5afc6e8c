"""Fixtures: tiny random checkpoints as save_pretrained writes them, with one tensor per expert."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from faasmoe_contracts.store import Store

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {
            "num_experts": 6,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "tie_word_embeddings": True,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {"num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            "n_routed_experts": 8,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "llama": ("LlamaForCausalLM", {}),
}

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(autouse=True)
def _without_progress_bars() -> Iterator[None]:
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def _tiny_model(family: str, **overrides: Any) -> Any:
    """Build a random float32 model, the same each time."""
    name, extra = FAMILIES[family]
    cls = getattr(transformers, name)
    config = cls.config_class(**{**SIZES, **extra, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape))
    return model.eval()


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    def make(
        family: str = "qwen2_moe",
        *,
        name: str = "checkpoint",
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        **overrides: Any,
    ) -> Path:
        folder = tmp_path / name
        model = _tiny_model(family, **overrides).to(dtype)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return make


def _stored_tensors(store: Store) -> dict[str, torch.Tensor]:
    """Return every tensor of a store, by its name in the model."""
    tensors: dict[str, torch.Tensor] = {}
    for path in store.router_files():
        tensors |= load_file(path)
    for layer in store.manifest.layers:
        for name, tensor in load_file(store.path / layer.file).items():
            tensors[f"{layer.name}.{name}"] = tensor
    return tensors


def _assert_holds_model(store: Store, checkpoint: Path, dtype: torch.dtype) -> None:
    """Assert that a store holds every parameter and buffer once, equal to from_pretrained's."""
    cls = getattr(transformers, store.manifest.model.architecture)
    model = cls.from_pretrained(checkpoint, dtype=dtype)
    expected, got = model.state_dict(), _stored_tensors(store)
    assert set(got) == set(expected) - set(model.all_tied_weights_keys)
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment of a child process in offline mode."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    return _tiny_model


@pytest.fixture
def stored_tensors() -> Callable[[Store], dict[str, torch.Tensor]]:
    return _stored_tensors


@pytest.fixture
def assert_holds_model() -> Callable[[Store, Path, torch.dtype], None]:
    return _assert_holds_model
