"""The demo model built from the real SmolLM2."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from faasmoe_router.checkpoint.demo import make_demo_model
from faasmoe_router.checkpoint.demo.build import gguf_path, load_dense

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]


def _generate_answer(model: Any, tokenizer: Any, question: str) -> str:
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)  # [1, T]
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_exact_variant_generates_the_same_text_as_the_dense_model(tmp_path: Path) -> None:
    dense, tokenizer = load_dense(gguf_path())
    model = AutoModelForCausalLM.from_pretrained(make_demo_model(tmp_path / "demo", exact=True))
    for question in ("What is the capital of France?", "Tell me about the moon."):
        assert _generate_answer(model, tokenizer, question) == _generate_answer(
            dense, tokenizer, question
        )


def test_default_variant_answers_in_english(tmp_path: Path) -> None:
    _, tokenizer = load_dense(gguf_path())
    model = AutoModelForCausalLM.from_pretrained(make_demo_model(tmp_path / "demo"))
    assert "Paris" in _generate_answer(model, tokenizer, "What is the capital of France?")
