"""`python -m benchmarks.many_models`: many models on one machine with memory for a few of them.

Several tenants call models of one endpoint that they draw from a Zipf distribution, each with one
request at a time, while `--memory` leaves room for `--active` models. Measures the memory of
routers and functions, the time to the first token (of requests that waited for a router too, and
where it went), the processor time of a swap, what failed, and how evenly tenants were served.
Writes benchmarks/out/many_models.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from benchmarks.polling import polling
from benchmarks.report import OUT, percentile
from benchmarks.swaps import Answer, cpu_s, followed_log
from benchmarks.tenant_load import jain_index
from benchmarks.zero import ROOT, START_TIMEOUT_S, children, runs, write_models

sys.path.insert(0, str(ROOT / "tests" / "integration"))

from faasmoe_up import FaasmoeUp, running_up

MAX_TOKENS = 8
SAMPLE_S = 2.0  # a sample takes 0.1 s of a processor, which models that start would have
SWAP_S = 0.5  # to the first token, above which a request has waited for a router or functions
WARM_REQUESTS = 3
SANDBOX_FUNCTIONS = 30  # three sandboxes of the demo model, as `faasmoe up MODEL` lays it out
REQUEST_TIMEOUT_S = 120.0


@dataclass(slots=True)
class Served:
    """What tenants got.

    Attributes:
        answers: the answered requests.
        tokens: tokens by tenant.
        failures: what failed.
    """

    answers: list[Answer] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


@dataclass(slots=True)
class MemorySamples:
    """What routers and functions held while tenants called them.

    Attributes:
        sizes: bytes, in the order of the samples.
        cpu_s: processor seconds that sampling took.
    """

    sizes: list[int] = field(default_factory=list)
    cpu_s: float = 0.0

    def add(self, up: FaasmoeUp) -> None:
        """Take a sample."""
        started_s = time.thread_time()
        self.sizes.append(held_bytes(up))
        self.cpu_s += time.thread_time() - started_s


def main() -> int:
    """Measure; print and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_models", description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / ".faasmoe" / "demo-model")
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--active", type=int, default=3, help="models that memory is left for")
    parser.add_argument("--tenants", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--exponent", type=float, default=1.1, help="of the Zipf distribution")
    parser.add_argument("--separate-sandboxes", action="store_true", help="for comparison")
    parser.add_argument("--out", type=Path, default=OUT / "many_models.json")
    arguments = parser.parse_args()
    if not arguments.model.is_dir():
        parser.error(f"--model: {arguments.model} is no folder; `faasmoe demo-model` makes one")
    with tempfile.TemporaryDirectory(prefix="many-") as name:
        figures = measure(Path(name), arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    return 0


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one model alone, then all of them."""
    files = write_models(
        folder,
        arguments.model.resolve(),
        arguments.models,
        functions_per_sandbox=SANDBOX_FUNCTIONS,
    )
    alone = files / "0.yaml"
    with running_up(alone, folder / "alone.log") as up:
        for _ in range(WARM_REQUESTS):
            stream_chat(up, "m0", key="")
        one_bytes = held_bytes(up)
    limit_bytes = arguments.active * one_bytes
    names = [f"t{index}" for index in range(arguments.tenants)]
    write_tenants(files, names, arguments.models)
    options, log = ["--memory", str(limit_bytes)], folder / "up.log"
    if arguments.separate_sandboxes:
        options.append("--separate-sandboxes")
    with (
        running_up(files, log, *options, timeout_s=START_TIMEOUT_S) as up,
        sampled_memory(up) as samples,
        followed_log(log) as timeline,
    ):
        launcher = psutil.Process(up.process.pid)
        before_s = cpu_s(launcher)
        served = serve(up, names, arguments)
        used_s = {name: s - before_s[name] for name, s in cpu_s(launcher).items()}
    swapped = [answer for answer in served.answers if answer.waited_s > SWAP_S]
    swaps = [answer.waited_s for answer in swapped]
    first_token_s = [answer.waited_s for answer in served.answers]
    return {
        "models": arguments.models,
        "tenants": arguments.tenants,
        "requests": len(served.answers),
        "failed": len(served.failures),
        "failures": sorted(set(served.failures))[:5],
        "one_model_mb": round(one_bytes / 1e6, 1),
        "limit_mb": round(limit_bytes / 1e6, 1),
        "memory_peak_over_limit": round(max(samples.sizes) / limit_bytes, 3),
        "memory_median_over_limit": round(percentile(samples.sizes, 50) / limit_bytes, 3),
        "memory_samples": len(samples.sizes),
        "sampling_cpu_s": round(samples.cpu_s, 1),
        "swaps": len(swaps),
        "swap_p50_s": round(percentile(swaps, 50), 3) if swaps else None,
        "swap_p99_s": round(percentile(swaps, 99), 3) if swaps else None,
        "swap_parts": timeline.figures(swapped),
        "cpu_s_per_swap": {name: round(s / max(1, len(swaps)), 3) for name, s in used_s.items()},
        "first_token_p50_s": round(percentile(first_token_s, 50), 3),
        "jain": round(jain_index(list(served.tokens.values())), 4),
    }


def write_tenants(files: Path, names: Sequence[str], n_models: int) -> None:
    """Write equal tenants that may use every model."""
    documents = []
    for name in names:
        (files / "keys" / name).mkdir(parents=True)
        (files / "keys" / name / "key").write_text(f"sk-{name}")
        spec = {
            "apiKeysPath": f"keys/{name}",
            "models": [{"name": f"m{index}"} for index in range(n_models)],
        }
        documents.append(
            {
                "apiVersion": "faasmoe.dev/v1alpha1",
                "kind": "Tenant",
                "metadata": {"name": name},
                "spec": spec,
            }
        )
    (files / "tenants.yaml").write_text(yaml.safe_dump_all(documents))


def serve(up: FaasmoeUp, names: Sequence[str], arguments: argparse.Namespace) -> Served:
    """Let every tenant send one request after the other."""
    weights = [1 / rank**arguments.exponent for rank in range(1, arguments.models + 1)]
    served, lock = Served(tokens=dict.fromkeys(names, 0)), threading.Lock()
    end_s = time.monotonic() + arguments.seconds

    def call(name: str) -> None:
        draws = random.Random(name)
        while time.monotonic() < end_s:
            (model,) = draws.choices(range(arguments.models), weights)
            sent_s = time.monotonic()
            try:
                first_s, n_tokens = stream_chat(up, f"m{model}", key=f"sk-{name}")
            except (httpx.HTTPError, RuntimeError) as error:
                with lock:
                    served.failures.append(repr(error))
                continue
            with lock:
                served.answers.append(Answer(f"m{model}", sent_s, sent_s + first_s))
                served.tokens[name] += n_tokens

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(call, names))
    return served


def stream_chat(up: FaasmoeUp, model: str, *, key: str) -> tuple[float, int]:
    """Stream a chat; return the seconds to its first token, and its tokens.

    Raises:
        RuntimeError: the answer is an error, or breaks off.
        httpx.HTTPError: there is none.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Say something."}],
        "max_tokens": MAX_TOKENS,
        "stream": True,
        "temperature": 0,
    }
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url, start_s = f"{up.base_url}/v1/chat/completions", time.monotonic()
    first_s, n_tokens, is_whole = None, 0, False
    timeout = REQUEST_TIMEOUT_S
    with httpx.stream(
        "POST", url, json=body, headers=headers, timeout=timeout, trust_env=False
    ) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {response.read()[:200]!r}")
        for line in response.iter_lines():
            is_whole |= line == "data: [DONE]"
            if line.startswith("data: {") and _has_content(json.loads(line[6:])):
                first_s = first_s or time.monotonic() - start_s
                n_tokens += 1
    if first_s is None or not is_whole:
        raise RuntimeError("the stream broke off")
    return first_s, n_tokens


def _has_content(chunk: dict[str, Any]) -> bool:
    if "error" in chunk:
        raise RuntimeError(str(chunk["error"]))
    return any(choice["delta"].get("content") for choice in chunk["choices"])


@contextmanager
def sampled_memory(up: FaasmoeUp) -> Iterator[MemorySamples]:
    """Sample the memory of routers and sandboxes within the context."""
    samples = MemorySamples()
    samples.add(up)
    with polling(lambda: samples.add(up), interval_s=SAMPLE_S):
        yield samples


def held_bytes(up: FaasmoeUp) -> int:
    """Return the memory (PSS) of all routers and sandboxes."""
    zygotes = [p for p in children(up) if runs(p, "faasmoe_router.zygote")]
    zygotes += [p for p in children(up) if runs(p, "faasmoe_expert.zygote")]
    return sum(map(_pss, itertools.chain.from_iterable(zygote.children() for zygote in zygotes)))


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0  # it has ended meanwhile


if __name__ == "__main__":
    sys.exit(main())
