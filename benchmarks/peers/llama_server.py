"""llama.cpp's server: PyPI's xllamacpp in an environment of its own, or a llama-server binary."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from benchmarks.peers.gguf_files import download_converter, gguf_path, make_gguf
from benchmarks.peers.models import checkpoint_folder
from benchmarks.peers.servers import NotServedError, RunningServer
from benchmarks.peers.workload import CONTEXT_TOKENS
from benchmarks.server_process import free_port, running_process, wait_healthy

START_TIMEOUT_S = 120.0
RUNNER = Path(__file__).with_name("xllamacpp_server.py")
_SYSTEM_INFO = re.compile(r"system_info: *(.*)")


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """llama.cpp's server with continuous batching and without its prompt cache.

    Attributes:
        folder: the benchmark's cache folder, with checkpoints and GGUF files.
        parallel: slots, the highest concurrency of the run.
        threads: compute threads.
        python: Python of the environment with xllamacpp; used if `binary` is None.
        binary: a llama-server binary.
    """

    folder: Path
    parallel: int
    threads: int
    python: Path | None
    binary: Path | None = None

    @property
    def name(self) -> str:
        """Name in the report."""
        return "llama.cpp"

    def prepare(self, model: str, precision: str) -> None:
        """Convert the checkpoint to GGUF and load it once."""
        checkpoint = checkpoint_folder(self.folder, model)
        try:
            make_gguf(checkpoint, precision, download_converter(self.folder))
        except RuntimeError as error:
            raise NotServedError(f"the converter refuses it: {error}") from error
        try:
            asyncio.run(self._try_start(model, precision))
        except RuntimeError as error:
            raise NotServedError(f"the server does not load it: {error}") from error

    async def _try_start(self, model: str, precision: str) -> None:
        async with self.run(model, precision):
            pass

    @asynccontextmanager
    async def run(self, model: str, precision: str) -> AsyncIterator[RunningServer]:
        """Run the server for the lifetime of the context."""
        file = gguf_path(checkpoint_folder(self.folder, model), precision)
        settings = self.server_settings(file, free_port())
        with tempfile.TemporaryDirectory(prefix="faasmoe-bench-") as folder:
            log = Path(folder) / "log"
            async with running_process(self._command(settings), log=log) as process:
                if self.binary is None:
                    ready = await _read_ready_line(process)
                else:
                    url = f"http://127.0.0.1:{settings['port']}"
                    await wait_healthy(
                        url, lambda: process.returncode is None, timeout_s=START_TIMEOUT_S
                    )
                    info = _SYSTEM_INFO.search(await asyncio.to_thread(log.read_text))
                    ready = {"url": url, "system_info": info[1] if info else "unknown"}
                details = {**settings, **ready, "model": file.name}
                yield RunningServer(ready["url"], "bench", psutil.Process(process.pid), details)

    def server_settings(self, file: Path, port: int) -> dict[str, Any]:
        """Return the settings of one start; the others are llama.cpp's defaults.

        Those are flash attention where it helps, batches of 2048 and micro-batches of 512 tokens,
        weights mapped and repacked for the CPU, no unified KV cache.
        """
        return {
            "model": str(file),
            "port": port,
            "parallel": self.parallel,
            "context": self.parallel * CONTEXT_TOKENS,
            "threads": self.threads,
        }

    def _command(self, settings: dict[str, Any]) -> list[str]:
        if self.binary is None:
            return [str(self.python), str(RUNNER), json.dumps(settings)]
        options = {
            "--model": settings["model"],
            "--host": "127.0.0.1",
            "--port": settings["port"],
            "--parallel": settings["parallel"],
            "--ctx-size": settings["context"],
            "--threads": settings["threads"],
            "--threads-batch": settings["threads"],
            "--cache-ram": 0,
        }
        words = [str(word) for pair in options.items() for word in pair]
        return [str(self.binary), *words, "--no-cache-prompt", "--no-webui"]


async def _read_ready_line(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    async with asyncio.timeout(START_TIMEOUT_S):
        line = await process.stdout.readline()
    if not line:
        raise RuntimeError(f"llama.cpp ended with status {await process.wait()}")
    return dict(json.loads(line))


def binary_version(binary: Path) -> str:
    """Return the version line of a llama-server binary."""
    process = subprocess.run([str(binary), "--version"], capture_output=True, text=True, check=True)
    return (process.stderr or process.stdout).strip().splitlines()[0]
