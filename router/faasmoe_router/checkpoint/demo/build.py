"""Building the demo model's checkpoint: once, atomically, the same each time on one machine."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from faasmoe_router.checkpoint.demo import calibration
from faasmoe_router.checkpoint.demo.card import model_card
from faasmoe_router.checkpoint.demo.dense import gguf_path, licence_text, load_dense
from faasmoe_router.checkpoint.demo.mixture import cut
from faasmoe_router.checkpoint.demo.split import NUM_EXPERTS, TOP_K
from faasmoe_router.checkpoint.errors import PrepareError
from faasmoe_router.checkpoint.writer import write_durably

RECIPE = 2  # counts up when the same inputs would give another model
RECORD_NAME = ".demo-model"
_SEED = 0

_log = logging.getLogger(__name__)


def make_demo_model(folder: Path, *, exact: bool = False) -> Path:
    """Make the demo model's checkpoint in `folder`; a complete one of the same inputs is kept.

    Args:
        folder: where the checkpoint goes; replaced as a whole.
        exact: activate every expert, so that logits equal the dense model's; in float32.

    Raises:
        PrepareError: a package that holds the dense model is missing, or the folder is in use.
    """
    source = gguf_path()
    key = _key(source, exact=exact)
    folder = folder.absolute()
    with _locked(folder):
        if _is_complete(folder, key):
            _log.info("%s is complete", folder)
            return folder
        _refuse_foreign(folder)
        partial = folder.with_name(f"{folder.name}.partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        _build(source, partial, exact=exact)
        _record(partial, key)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    return folder


def _build(source: Path, folder: Path, *, exact: bool) -> None:
    _log.info("loading %s", source.name)
    dense, tokenizer = load_dense(source)
    total = calibration.STEPS + dense.config.num_hidden_layers
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _bar(total) as bar:
        torch.manual_seed(_SEED)
        inputs = calibration.calibration_inputs(dense, tokenizer, step=bar.update)
        generator = torch.Generator().manual_seed(_SEED)
        model = cut(dense, inputs, exact=exact, generator=generator, step=bar.update)
    model.to(torch.float32 if exact else torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    active = NUM_EXPERTS if exact else TOP_K
    card = model_card(experts=NUM_EXPERTS, active=active, exact=exact)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "LICENSE").write_text(licence_text(), encoding="utf-8")


@contextmanager
def _bar(total: int) -> Iterator[Any]:
    with tqdm(total=total, desc="demo model", unit="step") as bar:
        yield bar


def _key(source: Path, *, exact: bool) -> dict[str, Any]:
    """Return all that decides the result."""
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    packages = {name: version(name) for name in ("torch", "transformers", "gguf")}
    return {"recipe": RECIPE, "exact": exact, "source_sha256": digest, "packages": packages}


def _record(folder: Path, key: dict[str, Any]) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    text = json.dumps({"key": key, "files": files}, indent=1) + "\n"
    write_durably(folder / RECORD_NAME, text.encode())


def _is_complete(folder: Path, key: dict[str, Any]) -> bool:
    try:
        record = json.loads((folder / RECORD_NAME).read_text())
        files = record["files"].items()
        return record["key"] == key and all(
            (folder / name).stat().st_size == size for name, size in files
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _refuse_foreign(folder: Path) -> None:
    """A folder is replaced only if it is empty or holds a demo model."""
    if folder.exists() and not (folder / RECORD_NAME).exists() and any(folder.iterdir()):
        raise PrepareError(f"demo model: got {folder} with other files, expected an empty folder")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time build this folder; a second one waits and finds it complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
