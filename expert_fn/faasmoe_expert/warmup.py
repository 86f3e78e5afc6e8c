"""Warms up the zygote before it forks, so that sandboxes share the results.

The first attach and the first matrix products of a process create caches: oneDNN primitives (half a
megabyte per shape, twice), specialized bytecode, lazy imports, and all of transformers for model
families without a gated kernel. Created before the fork, their pages are shared by all sandboxes.

Everything runs in one thread, so that no OpenMP region starts: children of a parent that has run
one hang in their first region.
"""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from faasmoe_contracts.store import LayerEntry, Store, StoreError
from faasmoe_contracts.wire import Dtype, OutputMode, encode_request
from faasmoe_expert import malloc
from faasmoe_expert.config import SandboxConfig
from faasmoe_expert.device import is_cuda_possible
from faasmoe_expert.functions.kernels import PADDED_ROW_COUNTS
from faasmoe_expert.server.api import FUNCTIONS_PATH, SandboxRoutes
from faasmoe_expert.server.http import HttpRequest, HttpResponse
from faasmoe_expert.server.runtime import SandboxRuntime

logger = logging.getLogger(__name__)

WARMUP_FUNCTION_ID = "warmup"
WARMUP_ROW_COUNTS = (*PADDED_ROW_COUNTS, *range(128, 513, 64))  # padded sizes up to 512 rows


def warm_up(config: SandboxConfig, store_path: Path) -> None:
    """Attach, call and detach one function for each kind of layer in a store.

    Does nothing if sandboxes may use a device other than the CPU, because CUDA does not survive a
    fork. Failures are logged, and the sandboxes warm up on their own.

    Args:
        config: settings of the sandboxes.
        store_path: directory of the store.
    """
    if not _runs_on_cpu(config.device):
        return
    torch.set_num_threads(1)
    try:
        store = Store.open(store_path)
    except StoreError as error:
        logger.warning("warm-up skipped: %s", error)
        return
    routes = SandboxRoutes(SandboxRuntime(replace(config, capacity=1), torch.device("cpu")))
    start_s = time.monotonic()
    layers = list(_distinct_layers(store))
    for layer in layers:
        _warm_up_layer(routes, store, layer, token=config.token)
    logger.info("warmed up %d layer kinds in %.1f s", len(layers), time.monotonic() - start_s)
    del routes
    gc.collect()
    malloc.trim_heap()


def _runs_on_cpu(device: str) -> bool:
    return device == "cpu" or (device == "auto" and not is_cuda_possible())


def _distinct_layers(store: Store) -> Iterator[LayerEntry]:
    """Yield one layer per combination of module class, kernel and sizes."""
    seen = set()
    for layer in store.manifest.layers:
        kernel = json.dumps(layer.kernel, sort_keys=True)
        kind = (layer.class_name, kernel, layer.hidden_size, layer.expert_bytes)
        if kind not in seen:
            seen.add(kind)
            yield layer


def _warm_up_layer(routes: SandboxRoutes, store: Store, layer: LayerEntry, *, token: str) -> None:
    experts = list(range(min(2, layer.num_experts)))
    attachment = {
        "store": str(store.path),
        "model_digest": store.manifest.digest,
        "layers": [layer.index],
        "experts": experts,
    }
    dtype = Dtype[store.manifest.model.dtype.upper()]
    frames = [
        _warmup_frame(layer, n, dtype=dtype, last_expert=experts[-1]) for n in WARMUP_ROW_COUNTS
    ]
    for method, body in (
        ("PUT", json.dumps(attachment).encode()),
        *(("POST", frame) for frame in frames),
        ("DELETE", b""),
    ):
        response = routes.handle(  # without a loader, it attaches in this thread
            HttpRequest(
                target=f"{FUNCTIONS_PATH}/{WARMUP_FUNCTION_ID}".encode(),
                authorization=f"Bearer {token}".encode(),
                method=method,
                body=bytearray(body),
            )
        )
        assert isinstance(response, HttpResponse)
        if response.status >= 300:
            message = b"".join(response.body).decode("utf-8", "replace")
            logger.warning("%s for layer %d was not warmed up: %s", method, layer.index, message)


def _warmup_frame(layer: LayerEntry, n_rows: int, *, dtype: Dtype, last_expert: int) -> bytes:
    """Return a request frame of `n_rows` rows for expert 0 and one row for `last_expert`."""
    experts = np.zeros(n_rows + 1, dtype=np.int32)  # [P]
    experts[-1] = last_expert
    parts = encode_request(
        bytes((n_rows + 1) * layer.hidden_size * dtype.itemsize),
        dtype=dtype,
        mode=OutputMode.REDUCED,
        layer=layer.index,
        hidden_size=layer.hidden_size,
        n_rows=n_rows + 1,
        pair_row=np.arange(n_rows + 1, dtype=np.int32),
        pair_expert=experts,
        pair_weight=np.ones(n_rows + 1, dtype=np.float32),
    )
    return b"".join(parts)
