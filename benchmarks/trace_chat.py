"""Which modules one streamed chat crosses, in the router and in a sandbox.

`python -m benchmarks.trace_chat` serves a small model by `faasmoe up`, streams one chat to warm up
and traces the next three: a module counts if one of its functions runs in that process during each
of them, which leaves out periodic jobs such as load reports. It prints both lists and writes
`benchmarks/out/trace_chat.json`. It shows how far a reader has to walk through the
code, and is no measure of speed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from benchmarks.geometry import small_geometry
from benchmarks.report import OUT, write_figures
from benchmarks.static_deployment import make_model_in_subprocess, write_moemodel
from benchmarks.up_process import UpProcess, running_up
from benchmarks.worker import ROOT

TRACER_DIR = ROOT / "benchmarks" / "tracing"
OUTPUT_DIR_ENV = "FAASMOE_TRACE_DIR"
WRITE_TIMEOUT_S = 30.0
POLL_S = 0.05
MAX_MODEL_LEN = 256
N_CHATS = 3
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
)


async def trace_chat() -> dict[str, list[str]]:
    """Return the modules that a streamed chat crosses, by process."""
    with tempfile.TemporaryDirectory(prefix="faasmoe-trace-") as folder:
        root = Path(folder)
        moemodel = await _write_model(root)
        trace_dir = root / "traces"
        trace_dir.mkdir()
        with _tracer_environment(trace_dir):
            async with running_up(moemodel) as up:
                model = await _model_name(up)
                await _stream_chat(up, model)
                traces = [await _trace(up, model, trace_dir) for _ in range(N_CHATS)]
                return {
                    name: sorted(set.intersection(*(t[name] for t in traces))) for name in traces[0]
                }


async def _write_model(root: Path) -> Path:
    """Write a small model with a chat template and its MoEModel file; return the file."""
    checkpoint, _ = await make_model_in_subprocess(small_geometry(), root / "model")
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "chat_template": CHAT_TEMPLATE}), encoding="utf-8")
    moemodel = root / "trace.yaml"
    write_moemodel(
        moemodel,
        checkpoint=checkpoint,
        store=root / "store",
        experts_per_function=4,
        max_model_len=MAX_MODEL_LEN,
    )
    return moemodel


@contextmanager
def _tracer_environment(trace_dir: Path) -> Iterator[None]:
    """Have the processes that are started meanwhile import the tracer."""
    before = dict(os.environ)
    paths = [str(TRACER_DIR), *filter(None, [before.get("PYTHONPATH")])]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), OUTPUT_DIR_ENV: str(trace_dir)}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


async def _trace(up: UpProcess, model: str, trace_dir: Path) -> dict[str, set[str]]:
    router = up.router()
    sandboxes = up.sandboxes()
    processes = [router, *sandboxes]
    for process in processes:
        process.send_signal(signal.SIGUSR1)
    await _stream_chat(up, model)
    for process in processes:
        process.send_signal(signal.SIGUSR2)
    traces = {p.pid: await _read_trace(trace_dir, p) for p in processes}
    return {
        "router": traces[router.pid],
        "sandbox": set[str]().union(*(traces[process.pid] for process in sandboxes)),
    }


async def _read_trace(trace_dir: Path, process: psutil.Process) -> set[str]:
    path = trace_dir / f"{process.pid}.json"
    deadline_s = time.monotonic() + WRITE_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"process {process.pid} wrote no trace in {WRITE_TIMEOUT_S:.0f} s")
        await asyncio.sleep(POLL_S)
    modules: list[str] = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return set(modules)


async def _stream_chat(up: UpProcess, model: str) -> None:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "stream": True,
        "max_tokens": 8,
    }
    async with (
        aiohttp.ClientSession() as client,
        client.post(f"{up.url}/v1/chat/completions", json=body) as response,
    ):
        response.raise_for_status()
        text = (await response.read()).decode()
    if not text.rstrip().endswith("data: [DONE]"):
        raise RuntimeError(f"the stream was cut: {text[-200:]!r}")


async def _model_name(up: UpProcess) -> str:
    async with aiohttp.ClientSession() as client, client.get(f"{up.url}/v1/models") as response:
        models = await response.json()
    name: str = models["data"][0]["id"]
    return name


def summarize(modules: dict[str, list[str]]) -> dict[str, Any]:
    """Return the figures: how many modules, and which."""
    return {
        "router_modules": len(modules["router"]),
        "sandbox_modules": len(modules["sandbox"]),
        "modules": modules,
    }


def main() -> None:
    """Trace, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=OUT, help="folder of the figures")
    arguments = parser.parse_args()
    modules = asyncio.run(trace_chat())
    for process, names in modules.items():
        print(f"{process}: {len(names)} modules")
        print("".join(f"  {name}\n" for name in names), end="")
    print(write_figures("trace_chat", summarize(modules), folder=arguments.output))


if __name__ == "__main__":
    main()
