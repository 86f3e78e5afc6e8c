"""The models that strategies serve: the demo model, and random ones of a large model's geometry."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.evaluation.tasks import TaskSizes
from benchmarks.geometry import CheckpointGeometry
from benchmarks.static_deployment import make_model_in_subprocess, write_moemodel
from benchmarks.worker import ROOT

from faasmoe_contracts.store import Store, StoreError
from faasmoe_operator.control.local_model import LocalModel

MODEL_NAME = "bench"  # what requests call the model
DEMO_EXPERTS_PER_FUNCTION = 3  # as in examples/demo.yaml
DEMO_FUNCTIONS_PER_SANDBOX = 27
GEOMETRY_MODEL_LEN = 512
GEOMETRY_PROMPT_CHARACTERS = 160  # a token each: its tokenizer knows bytes only


@dataclass(frozen=True, slots=True)
class BenchmarkModel:
    """A model as it is served.

    Attributes:
        name: what reports call it.
        checkpoint: what the full model is loaded from.
        store: what functions are attached from.
        dtype: number format of the weights.
        experts_per_function: experts of a layer in one function.
        functions_per_sandbox: functions that one sandbox may hold.
        max_model_len: tokens of a request.
        sizes: how long its tasks are.
    """

    name: str
    checkpoint: Path
    store: Path
    dtype: str
    experts_per_function: int
    functions_per_sandbox: int
    max_model_len: int
    sizes: TaskSizes

    def deployment(self, folder: Path, experts: Mapping[str, Any] | None = None) -> LocalModel:
        """Write the model's MoEModel file and load it.

        Args:
            folder: where the file is written.
            experts: settings of the sandboxes beyond the model's own.
        """
        file = folder / "model.yaml"
        write_moemodel(
            file,
            checkpoint=self.checkpoint,
            store=self.store,
            experts_per_function=self.experts_per_function,
            max_model_len=self.max_model_len,
            experts={"functionsPerSandbox": self.functions_per_sandbox, **(experts or {})},
        )
        return LocalModel.load(file)

    def with_changes(self, **changes: int) -> BenchmarkModel:
        """Return the same model, cut or packed in another way."""
        return replace(self, **changes)  # type: ignore[arg-type]  # fields that are numbers

    @property
    def floor_bytes(self) -> int:
        """Bytes of all weights, once."""
        files = Store.open(self.store).manifest.files.items()
        return sum(file.size_bytes for name, file in files if name.endswith(".safetensors"))

    def describe(self) -> dict[str, Any]:
        """Return what a report says of it."""
        manifest = Store.open(self.store).manifest
        return {
            "name": self.name,
            "architecture": manifest.model.architecture,
            "dtype": manifest.model.dtype,
            "digest": manifest.digest,
            "moe_layers": len(manifest.layers),
            "experts": max(layer.num_experts for layer in manifest.layers),
            "weights_bytes": self.floor_bytes,
            "experts_per_function": self.experts_per_function,
            "functions_per_sandbox": self.functions_per_sandbox,
            "max_model_len": self.max_model_len,
        }


async def make_demo_model(folder: Path, *, dtype: str | None = None) -> BenchmarkModel:
    """Return the demo model, made and prepared if it is not there.

    Args:
        folder: where checkpoint and store lie.
        dtype: number format of the weights; None for the checkpoint's.
    """
    checkpoint = folder / "demo-model"
    store = folder / ("demo-store" if dtype is None else f"demo-store-{dtype}")
    await _run_faasmoe("demo-model", str(checkpoint))
    await _prepare(checkpoint, store, dtype)
    return BenchmarkModel(
        name="demo",
        checkpoint=checkpoint,
        store=store,
        dtype=dtype or Store.open(store).manifest.model.dtype,
        experts_per_function=DEMO_EXPERTS_PER_FUNCTION,
        functions_per_sandbox=DEMO_FUNCTIONS_PER_SANDBOX,
        max_model_len=1024,
        sizes=TaskSizes(),
    )


async def make_random_model(
    geometry: CheckpointGeometry,
    folder: Path,
    *,
    experts_per_function: int,
    sizes: TaskSizes | None = None,
) -> BenchmarkModel:
    """Return a model of random weights, made and prepared if it is not there."""
    checkpoint, store = await make_model_in_subprocess(geometry, folder)
    return BenchmarkModel(
        name=f"{geometry.layers} layers of {geometry.experts} experts",
        checkpoint=checkpoint,
        store=store,
        dtype="bfloat16",
        experts_per_function=experts_per_function,
        functions_per_sandbox=1,
        max_model_len=GEOMETRY_MODEL_LEN,
        sizes=sizes or TaskSizes(GEOMETRY_PROMPT_CHARACTERS),
    )


async def _prepare(checkpoint: Path, store: Path, dtype: str | None) -> None:
    try:
        Store.open(store)
    except StoreError:
        format_ = () if dtype is None else (f"--dtype={dtype}",)
        # Whatever is there is no store of this version.
        await _run_faasmoe("prepare", checkpoint.as_uri(), str(store), *format_, "--force")


async def _run_faasmoe(*arguments: str) -> None:
    command = (sys.executable, "-m", "faasmoe_operator.cli", *arguments)
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
    if await process.wait():
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
