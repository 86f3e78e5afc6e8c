"""Fixtures for a tiny engine with a random model and its own tokenizer."""

import json
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

from faasmoe_router.engine.batcher import EngineLimits
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.structured_output import CompiledGrammar
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.metrics import EngineMetrics, new_registry

SPECIAL_TOKENS = ["<|end|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [json.dumps(Tokenizer.__doc__), "the quick brown fox jumps over the lazy dog " * 3]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_MODEL_LEN = 256

DEADLINE_S = 120.0


async def run_here(work: Callable[[], CompiledGrammar], *, timeout_s: float) -> CompiledGrammar:
    return work()


def manager_of(engine: Engine) -> Any:
    """Return transformers' manager behind a running engine, to inject faults or observe batches."""
    assert engine._batcher is not None
    return engine._batcher._manager


EngineMaker = Callable[..., Engine]
Until = Callable[[Callable[[], bool]], None]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=alphabet,
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="session")
def model_tokenizer(tokenizer: Any) -> ModelTokenizer:
    return ModelTokenizer(tokenizer)


@pytest.fixture(scope="session")
def base_model(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.4,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    return Qwen2MoeForCausalLM(config).eval()


@pytest.fixture
def model(base_model: Any) -> Any:
    """A copy that a test may modify."""
    return deepcopy(base_model)


@pytest.fixture
def make_engine(model: Any, model_tokenizer: ModelTokenizer) -> EngineMaker:
    def make(**limits: int) -> Engine:
        metrics = EngineMetrics(new_registry(), "tiny")
        return Engine(
            model,
            model_tokenizer,
            limits=EngineLimits(**{"max_model_len": MAX_MODEL_LEN, **limits}),
            metrics=metrics,
        )

    return make


@pytest.fixture
def prompt_ids(model_tokenizer: ModelTokenizer) -> tuple[int, ...]:
    return tuple(model_tokenizer.encode("the quick brown fox"))


@pytest.fixture
def greedy(base_model: Any) -> Callable[[tuple[int, ...], int], list[int]]:
    """Return the tokens that transformers' `generate` yields greedily for a prompt."""

    def generate(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])  # [1, T]
        output = base_model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
        )
        return list(output[0, len(prompt) :].tolist())

    return generate


@pytest.fixture
def until() -> Until:
    """Wait until a condition holds; fail after DEADLINE_S."""

    def wait(condition: Callable[[], bool]) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end_s, "timed out waiting for the condition"
            time.sleep(0.005)

    return wait
