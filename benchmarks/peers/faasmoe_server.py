"""Our own server: `faasmoe up` with a store of the requested precision."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.comparison import OURS, OURS_VLLM
from benchmarks.peers.models import DEMO_CHECKPOINT, checkpoint_folder, function_counts
from benchmarks.peers.servers import NotServedError, RunningServer
from benchmarks.peers.workload import CONTEXT_TOKENS
from benchmarks.static_deployment import write_moemodel
from benchmarks.up_process import running_up
from pydantic import BaseModel

from faasmoe_contracts.store import Store, StoreError
from faasmoe_operator.api.v1alpha1.experts import ExpertsSpec
from faasmoe_operator.api.v1alpha1.router import RouterSpec
from faasmoe_operator.control.local_model import LocalModel

LONG_WINDOW_S = 600  # functions stay at work between the rounds
MODEL_NAME = "bench"  # the name that write_moemodel gives


@dataclass(frozen=True, slots=True)
class FaasmoeServer:
    """`faasmoe up` on this machine.

    Attributes:
        folder: the benchmark's cache folder, with checkpoints and stores.
        max_num_seqs: highest concurrency of the run.
        functions_per_layer: functions that a layer's experts are divided into.
        sandboxes: sandboxes of one thread each.
        router_dtype: `router.dtype` of the MoEModel.
        window_s: how long functions stay without calls.
        vllm_python: Python of the environment with vLLM, as the engine; None for our own engine.
        vllm_is_compiled: whether that engine compiles the model.
    """

    folder: Path
    max_num_seqs: int
    functions_per_layer: int
    sandboxes: int
    router_dtype: str = "auto"
    window_s: int = LONG_WINDOW_S
    vllm_python: Path | None = None
    vllm_is_compiled: bool = False

    @property
    def name(self) -> str:
        """Name in the report."""
        return OURS if self.vllm_python is None else OURS_VLLM

    def prepare(self, model: str, precision: str) -> None:
        """Prepare the store in its precision, by the product itself."""
        if self.vllm_python is not None and model == DEMO_CHECKPOINT:
            raise NotServedError("compared with vLLM, which does not serve it")
        if precision != "bf16" and (missing := missing_spec_fields()):
            raise NotServedError(f"the MoEModel has no {' and no '.join(missing)}")
        deployment = LocalModel.load(self._write_moemodel(model, precision))
        try:
            Store.open(deployment.store_path)
        except StoreError as error:
            print(f"preparing {deployment.store_path.name}: {error}")
            shutil.rmtree(deployment.store_path, ignore_errors=True)
            asyncio.run(self._prepare_store(deployment.file))

    async def _prepare_store(self, moemodel: Path) -> None:
        async with running_up(
            moemodel, variables=self._variables()
        ):  # prepares it at its first start
            pass

    @asynccontextmanager
    async def run(self, model: str, precision: str) -> AsyncIterator[RunningServer]:
        """Run `faasmoe up` for the lifetime of the context."""
        moemodel = self._write_moemodel(model, precision)
        async with running_up(moemodel, variables=self._variables()) as up:
            details = {"moemodel": LocalModel.load(moemodel).model.spec.model_dump(mode="json")}
            yield RunningServer(up.url, MODEL_NAME, up.launcher, details)

    def _variables(self) -> dict[str, str]:
        return {} if self.vllm_python is None else {"FAASMOE_VLLM_PYTHON": str(self.vllm_python)}

    def _write_moemodel(self, model: str, precision: str) -> Path:
        checkpoint = checkpoint_folder(self.folder, model)
        engine = "" if self.vllm_python is None else "-vllm"
        path = checkpoint.with_name(f"{checkpoint.name}-{precision}{engine}.yaml")
        experts_per_function, functions_per_sandbox = function_counts(
            model, functions_per_layer=self.functions_per_layer, sandboxes=self.sandboxes
        )
        experts, router = self.spec_fields(precision)
        write_moemodel(
            path,
            checkpoint=checkpoint,
            store=checkpoint.with_name(f"{checkpoint.name}-{precision}-store"),
            experts_per_function=experts_per_function,
            max_model_len=CONTEXT_TOKENS,
            experts=experts | {"functionsPerSandbox": functions_per_sandbox},
            router=router,
        )
        return path

    def spec_fields(self, precision: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the additional fields of spec.experts and spec.router."""
        experts: dict[str, Any] = {
            "warmPool": 1,
            "scaling": {"windowSeconds": self.window_s, "scaleToZeroGracePeriodSeconds": 0},
        }
        router: dict[str, Any] = {"maxNumSeqs": self.max_num_seqs, "dtype": self.router_dtype}
        if self.vllm_python is not None:
            router["engine"] = "vllm"
            router["engineArgs"] = {
                "enforceEager": not self.vllm_is_compiled,
                "enablePrefixCaching": False,
            }
        if precision != "bf16":
            experts["quantization"] = router["quantization"] = precision
        return experts, router


def missing_spec_fields() -> list[str]:
    """Return the fields that a quantized model needs and this version's MoEModel has not."""
    specs: dict[str, type[BaseModel]] = {
        "experts.quantization": ExpertsSpec,
        "router.quantization": RouterSpec,
    }
    return [name for name, spec in specs.items() if "quantization" not in spec.model_fields]
