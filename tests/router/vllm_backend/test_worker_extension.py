"""What vLLM's worker frees, measured as resident memory of the process."""

import re
from pathlib import Path
from types import SimpleNamespace

import torch

from faasmoe_router.vllm_backend.worker_extension import FunctionWorkerExtension

SIZE_BYTES = 64 << 20


def resident_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_cache_of_layers_that_share_one_storage_is_not_resident_and_reads_as_zeros() -> None:
    cache = torch.ones(SIZE_BYTES, dtype=torch.int8)
    layers = [part.view(torch.float32) for part in cache.view(4, -1)]
    worker = FunctionWorkerExtension()
    worker.model_runner = SimpleNamespace(kv_caches=layers)
    before = resident_bytes()
    worker.faasmoe_release_cache()
    assert before - resident_bytes() > 0.9 * SIZE_BYTES
    assert not layers[1].any()
