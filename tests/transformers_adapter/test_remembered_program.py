"""What comparing one model has shown serves models of an equal config with other weights."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.transformers_adapter.test_native_step import (
    PROGRAM_FAMILIES,
    TIMEOUT_S,
    build,
    generate,
    loop,
    require_kernels,
)

from faasmoe_kernels import load
from faasmoe_transformers import native_step, remembered_program
from faasmoe_transformers.native_linear import use_native_linears
from faasmoe_transformers.native_step import NativeForward
from faasmoe_transformers.observation import observe_passes
from faasmoe_transformers.remembered_program import FOLDER_ENV, ProgramMemory

__all__ = ["loop", "require_kernels"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "verified"
    monkeypatch.setenv(FOLDER_ENV, str(path))
    return path


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models whose modules were watched."""
    models: list[Any] = []

    def record(model: Any, *args: Any) -> Any:
        models.append(model)
        return observe_passes(model, *args)

    monkeypatch.setattr(native_step, "observe_passes", record)
    return models


def with_other_weights(model: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (parameter.data * (1 + 0.1 * noise)).to(parameter.dtype)
    return model


@pytest.mark.parametrize("name", PROGRAM_FAMILIES)
def test_equal_model_with_other_weights_is_not_compared_again(
    name: str, folder: Path, compared: list[Any], loop: asyncio.AbstractEventLoop
) -> None:
    first = build(name)
    use_native_linears(first, load())
    generate(first, loop)
    (file,) = folder.glob("*.json")
    assert (file.stat().st_mode & 0o777, compared) == (0o600, [first])

    expected, _, _ = generate(with_other_weights(build(name)), loop, compute="torch")
    second = with_other_weights(build(name))
    use_native_linears(second, load())
    tokens, _, _ = generate(second, loop)
    assert isinstance(getattr(second, second.base_model_prefix).forward, NativeForward)
    assert tokens == expected
    assert compared == [first]


def test_of_equal_models_that_start_together_one_is_compared(
    folder: Path, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[Any] = []
    other_waits = threading.Event()

    def observe(model: Any, *args: Any) -> Any:
        compared.append(model)
        assert other_waits.wait(TIMEOUT_S), "the other one does not wait"
        return observe_passes(model, *args)

    def sleep(seconds: float) -> None:
        other_waits.set()
        time.sleep(seconds)

    monkeypatch.setattr(native_step, "observe_passes", observe)
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    monkeypatch.setattr(remembered_program, "time", clock)
    models = [build("qwen2_moe") for _ in range(2)]
    for model in models:
        use_native_linears(model, load())
    with ThreadPoolExecutor(2) as pool:
        (first, _, _), (second, _, _) = pool.map(partial(generate, loop=loop), models)
    assert first == second
    assert len(compared) == 1
    for model in models:
        assert isinstance(getattr(model, model.base_model_prefix).forward, NativeForward)


def test_another_that_hangs_is_not_waited_for_without_end(
    folder: Path,
    compared: list[Any],
    loop: asyncio.AbstractEventLoop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remembered_program, "MAX_WAIT_S", 0.0)
    model = build("qwen2_moe")
    use_native_linears(model, load())
    with ProgramMemory(folder, load().path).turn(model) as has_waited:
        generate(model, loop)
        assert not has_waited
    assert compared == [model]


@pytest.mark.parametrize("text", ["{", "{}", '{"layers": []}'])
def test_file_that_cannot_be_used_is_replaced(
    text: str, folder: Path, compared: list[Any], loop: asyncio.AbstractEventLoop
) -> None:
    for n_compared in (1, 2, 2):
        model = build("qwen2_moe")
        use_native_linears(model, load())
        generate(model, loop)
        assert len(compared) == n_compared
        if n_compared == 1:
            (file,) = folder.glob("*.json")
            file.write_text(text)


def test_model_of_another_config_is_compared(
    folder: Path, compared: list[Any], loop: asyncio.AbstractEventLoop
) -> None:
    for scale in (1.0, 2.0):
        model = build("qwen2_moe")
        model.config.rms_norm_eps *= scale
        use_native_linears(model, load())
        generate(model, loop)
    assert len(compared) == len(list(folder.glob("*.json"))) == 2
