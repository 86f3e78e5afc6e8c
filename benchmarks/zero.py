"""`python -m benchmarks.zero`: models at whole zero, and the first token from there.

Serves models whose routers and functions end while nobody uses them (the demo model, or --model),
waits until there is neither, and measures the memory that is left and the time to the first token
of a streamed chat. Writes benchmarks/out/zero.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "integration"))

from faasmoe_up import FaasmoeUp, running_up, wait_until  # noqa: E402

ZERO_TIMEOUT_S = 300.0
START_TIMEOUT_S = 1800.0
MANY_MEMORY = "2Gi"  # of several models: their routers start in turns
IDLE_SECONDS = 10
PROCESSES = (
    "faasmoe_gateway",
    "faasmoe_operator.control",
    "faasmoe_expert.zygote",
    "faasmoe_router.zygote",
    "faasmoe_router.common_zygote",
)
ZYGOTES = PROCESSES[2:]


def main() -> int:
    """Measure with the given numbers of models; print and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zero", description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / ".faasmoe" / "demo-model")
    parser.add_argument("--models", type=int, nargs="+", default=[1], help="models at one endpoint")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out" / "zero.json")
    arguments = parser.parse_args()
    if not arguments.model.is_dir():
        parser.error(f"--model: {arguments.model} is no folder; `faasmoe demo-model` makes one")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="zero-") as name:
        for n_models in arguments.models:
            folder = Path(name) / str(n_models)
            files = write_models(folder, arguments.model.resolve(), n_models)
            options = ("--memory", MANY_MEMORY) if n_models > 1 else ()
            log = folder / "up.log"
            with running_up(files, log, *options, timeout_s=START_TIMEOUT_S) as up:
                measured = measure(up, repeats=arguments.repeats)
            figures |= measured if n_models == arguments.models[0] else {}
            figures[f"models_{n_models}"] = measured
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    return 0


def write_models(
    folder: Path,
    model: Path,
    n_models: int,
    *,
    functions_per_sandbox: int = 8,
    linked_stores: bool = False,
) -> Path:
    """Write MoEModels of the same checkpoint; return their folder.

    Args:
        folder: gets the files and the stores.
        model: the checkpoint.
        n_models: number of models.
        functions_per_sandbox: as in the spec.
        linked_stores: whether the models' stores are hard links to one, which takes no disk, but
            lets models share pages that they would not; else copies.
    """
    files, stores = folder / "models", folder / "stores"
    files.mkdir(parents=True)
    prepare = (sys.executable, "-m", "faasmoe_operator.cli", "prepare")
    subprocess.run([*prepare, str(model), str(stores / "0")], check=True, stdout=sys.stderr)
    for index in range(1, n_models):
        copy = os.link if linked_stores else shutil.copy2
        shutil.copytree(stores / "0", stores / str(index), copy_function=copy)
    scaling = {
        "windowSeconds": 6,
        "panicWindowPercentage": 20,
        "scaleToZeroGracePeriodSeconds": 0,
    }
    for index in range(n_models):
        spec = {
            "model": {"source": model.as_uri()},
            "store": {"path": f"../stores/{index}"},
            "router": {"maxModelLen": 512, "scaling": {"idleSeconds": IDLE_SECONDS}},
            "experts": {
                "warmPool": 0,
                "functionsPerSandbox": functions_per_sandbox,
                "scaling": scaling,
            },
        }
        document = {
            "apiVersion": "faasmoe.dev/v1alpha1",
            "kind": "MoEModel",
            "metadata": {"name": f"m{index}"},
            "spec": spec,
        }
        (files / f"{index}.yaml").write_text(yaml.safe_dump(document))
    return files


def measure(up: FaasmoeUp, *, repeats: int) -> dict[str, float]:
    """Return memory at zero, and the time to the first token from there and warm."""
    cold_s, warm_s = [], []
    first_token_s(up)
    for _ in range(repeats):
        wait_until(lambda: is_at_zero(up), timeout_s=ZERO_TIMEOUT_S, what="zero")
        idle = memory_by_process(up)
        cold_s.append(first_token_s(up))
        warm_s.append(first_token_s(up))
    return {
        "idle_mb": round(idle["faasmoe_gateway"] + idle["faasmoe_operator.control"], 1),
        "idle_zygotes_mb": round(sum(idle[name] for name in ZYGOTES), 1),
        "ttft_zero_p50_s": round(statistics.median(cold_s), 3),
        "ttft_zero_p99_s": round(max(cold_s), 3),  # of few repeats
        "ttft_warm_p50_s": round(statistics.median(warm_s), 3),
    }


def is_at_zero(up: FaasmoeUp) -> bool:
    """Return whether neither routers nor sandboxes run."""
    return not any(
        process.children()
        for process in children(up)
        if runs(process, "faasmoe_router.zygote") or runs(process, "faasmoe_expert.zygote")
    )


def memory_by_process(up: FaasmoeUp) -> dict[str, float]:
    """Return the memory (PSS) of processes in MB, summed by what they run."""
    sizes = dict.fromkeys(PROCESSES, 0.0)
    for process in children(up):
        for name in PROCESSES:
            if runs(process, name):
                sizes[name] += process.memory_full_info().pss / 1e6
    return sizes


def children(up: FaasmoeUp) -> list[psutil.Process]:
    """Return the processes that the launcher has started."""
    found: list[psutil.Process] = psutil.Process(up.process.pid).children()
    return found


def runs(process: psutil.Process, module: str) -> bool:
    """Return whether a process runs a module."""
    try:
        return module in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def first_token_s(up: FaasmoeUp) -> float:
    """Return the seconds until the first model's first token."""
    body = {
        "model": "m0",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 2,
        "stream": True,
    }
    start_s = time.monotonic()
    with httpx.stream(
        "POST", f"{up.base_url}/v1/chat/completions", json=body, timeout=120, trust_env=False
    ) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get(
                "content"
            ):
                return time.monotonic() - start_s
    raise RuntimeError("the stream had no token")


if __name__ == "__main__":
    sys.exit(main())
