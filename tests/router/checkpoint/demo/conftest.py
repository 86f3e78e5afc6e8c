"""Fixtures: a tiny random dense model with a tokenizer, in place of SmolLM2."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from faasmoe_router.checkpoint.demo import build, moefication

TEMPLATE = (
    "{% for m in messages %}user {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)


def _tokenizer() -> Any:
    words = sorted({word for prompt in moefication.CALIBRATION_PROMPTS for word in prompt.split()})
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", "user", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="left",
        chat_template=TEMPLATE,
    )


def _dense(vocab_size: int) -> Any:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=2,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture
def dense() -> Any:
    return _dense(len(_tokenizer()))


@pytest.fixture
def loads(tmp_path: Path, dense: Any, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the dense model by the tiny one; return the list of its loads."""
    load_calls: list[Path] = []

    def load_dense(path: Path) -> tuple[Any, Any]:
        load_calls.append(path)
        return dense, _tokenizer()

    (tmp_path / "tiny.gguf").write_bytes(b"weights")
    monkeypatch.setattr(build, "gguf_path", lambda: tmp_path / "tiny.gguf")
    monkeypatch.setattr(build, "licence_text", lambda: "Apache License")
    monkeypatch.setattr(build, "load_dense", load_dense)
    monkeypatch.setattr(moefication, "ANSWER_TOKENS", 6)
    return load_calls
