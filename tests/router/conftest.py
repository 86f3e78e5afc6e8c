"""The fixtures of the tiny engine, for every test of the router."""

from tiny_engine import (  # fixtures
    base_model,
    greedy,
    make_engine,
    model,
    model_tokenizer,
    prompt_ids,
    tokenizer,
    until,
)

__all__ = [
    "base_model",
    "greedy",
    "make_engine",
    "model",
    "model_tokenizer",
    "prompt_ids",
    "tokenizer",
    "until",
]
