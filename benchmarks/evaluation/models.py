"""Models of the benchmarks: the demo model, and random ones with the geometry of a large model."""

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

MODEL_NAME = "bench"  # model name in requests
DEMO_EXPERTS_PER_FUNCTION = 3  # as in examples/demo.yaml
DEMO_FUNCTIONS_PER_SANDBOX = 30
GEOMETRY_MODEL_LEN = 512
NOT_QUANTIZED = "none"
ROUTER_SCHEMES = {NOT_QUANTIZED: "none", "int8": "int8", "int4": "int4", "mxfp4": "int8"}
"""Scheme of the router's linear layers by that of the experts."""
GEOMETRY_PROMPT_CHARACTERS = 160  # one token each, since its tokenizer is byte-level


@dataclass(frozen=True, slots=True)
class BenchmarkModel:
    """A model and how it is served.

    Attributes:
        name: label in reports.
        checkpoint: source of the full model.
        store: source of the functions.
        dtype: dtype of the weights.
        experts_per_function: experts of one layer per function.
        functions_per_sandbox: maximum functions per sandbox.
        max_model_len: maximum tokens of a request.
        sizes: lengths of its tasks.
        quantization: scheme of the store's weights, `none` for those of the checkpoint.
    """

    name: str
    checkpoint: Path
    store: Path
    dtype: str
    experts_per_function: int
    functions_per_sandbox: int
    max_model_len: int
    sizes: TaskSizes
    quantization: str = NOT_QUANTIZED

    def deployment(
        self,
        folder: Path,
        experts: Mapping[str, Any] | None = None,
        router: Mapping[str, Any] | None = None,
    ) -> LocalModel:
        """Write the model's MoEModel file and load it.

        Args:
            folder: folder to write the file to.
            experts: additional fields of spec.experts.
            router: additional fields of spec.router.
        """
        file = folder / "model.yaml"
        write_moemodel(
            file,
            checkpoint=self.checkpoint,
            store=self.store,
            experts_per_function=self.experts_per_function,
            max_model_len=self.max_model_len,
            experts={
                "functionsPerSandbox": self.functions_per_sandbox,
                "quantization": self.quantization,
                **(experts or {}),
            },
            router={"quantization": ROUTER_SCHEMES[self.quantization], **(router or {})},
        )
        return LocalModel.load(file)

    @property
    def experts_bytes(self) -> int:
        """Size of the routed experts in the store, without what their layers share."""
        layers = Store.open(self.store).manifest.layers
        return sum(layer.expert_bytes * layer.num_experts for layer in layers)

    def with_changes(self, **changes: int) -> BenchmarkModel:
        """Return the same model with another granularity or packing."""
        return replace(self, **changes)  # type: ignore[arg-type]  # numeric fields

    @property
    def floor_bytes(self) -> int:
        """Size of all weights, counted once."""
        return Store.open(self.store).manifest.weight_bytes

    def describe(self) -> dict[str, Any]:
        """Return the description of the model for reports."""
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
            "quantization": self.quantization,
        }


async def make_demo_model(folder: Path, *, dtype: str | None = None) -> BenchmarkModel:
    """Return the demo model; generate and prepare it unless it exists.

    Args:
        folder: folder of checkpoint and store.
        dtype: dtype of the weights; None for that of the checkpoint.
    """
    checkpoint = folder / "demo-model"
    store = folder / ("demo-store" if dtype is None else f"demo-store-{dtype}")
    await _run_faasmoe("demo-model", str(checkpoint))
    await prepare_store(checkpoint, store, *(() if dtype is None else (f"--dtype={dtype}",)))
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
    """Return a model with random weights; generate and prepare it unless it exists.

    Args:
        geometry: sizes of the model.
        folder: folder of checkpoint and store.
        experts_per_function: experts of one layer per function.
        sizes: lengths of its tasks; None for the default.
    """
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


async def quantized(model: BenchmarkModel, quantization: str) -> BenchmarkModel:
    """Return a model with a store in another scheme; prepare it unless it exists."""
    if quantization == NOT_QUANTIZED:
        return model
    store = model.store.with_name(f"{model.store.name}-{quantization}")
    schemes = (
        f"--quantization={quantization}",
        f"--quantize-router={ROUTER_SCHEMES[quantization]}",
    )
    await prepare_store(model.checkpoint, store, *schemes)
    return replace(model, store=store, quantization=quantization)


async def prepare_store(checkpoint: Path, store: Path, *options: str) -> None:
    """Prepare a checkpoint's store unless it is complete."""
    try:
        Store.open(store)
    except StoreError:
        # --force, because an existing folder is not a readable store.
        await _run_faasmoe("prepare", checkpoint.as_uri(), str(store), *options, "--force")


async def _run_faasmoe(*arguments: str) -> None:
    command = (sys.executable, "-m", "faasmoe_operator.cli", *arguments)
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
    if await process.wait():
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
