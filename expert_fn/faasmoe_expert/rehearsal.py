"""The zygote's rehearsal: what each sandbox would do once for itself, done once before the forks.

The first attach and the first products of a process leave something behind: oneDNN's primitives
(half a megabyte for each shape, twice), specialised bytecode, lazy imports, for families without a
lean kernel all of transformers. Done here, it lies in pages that all sandboxes share.

Everything runs in one thread, so that no OpenMP region is ever begun: a parent that has run one
leaves children that hang in their first.
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

from faasmoe_expert import heap
from faasmoe_expert.config import SandboxConfig
from faasmoe_expert.device import may_have_cuda
from faasmoe_expert.functions.kernels import PADDED_ROWS
from faasmoe_expert.server.answer import Answer
from faasmoe_expert.server.request import HttpRequest
from faasmoe_expert.server.routes import FUNCTIONS, Routes
from faasmoe_expert.server.sandbox import Sandbox
from faasmoe_expert.store import LayerEntry, Store, StoreError
from faasmoe_expert.wire import Dtype, Mode, encode_request

log = logging.getLogger(__name__)

FUNCTION = "rehearsal"
ROWS = (*PADDED_ROWS, *range(128, 513, 64))  # those of batches of up to 512 tokens


def rehearse(config: SandboxConfig, path: Path) -> None:
    """Attach, call and detach a function of each kind of layer of the store in `path`.

    Does nothing if sandboxes may compute elsewhere than on the CPU: CUDA does not survive a fork.
    What cannot be rehearsed is left to the sandboxes, and said.

    Args:
        config: what sandboxes are made of.
        path: folder of the prepared model.
    """
    if not _computes_here(config.device):
        return
    torch.set_num_threads(1)
    try:
        store = Store.open(path)
    except StoreError as error:
        log.warning("nothing is rehearsed: %s", error)
        return
    routes = Routes(Sandbox(replace(config, capacity=1), torch.device("cpu")))
    begun_s = time.monotonic()
    kinds = list(_kinds(store))
    for layer in kinds:
        _rehearse_layer(routes, store, layer, token=config.token)
    log.info("rehearsed %d kinds of layers in %.1f s", len(kinds), time.monotonic() - begun_s)
    del routes
    gc.collect()
    heap.give_back()


def _computes_here(device: str) -> bool:
    return device == "cpu" or (device == "auto" and not may_have_cuda())


def _kinds(store: Store) -> Iterator[LayerEntry]:
    """Give one layer of each kind: of one class, kernel and size."""
    seen = set()
    for layer in store.manifest.layers:
        kernel = json.dumps(layer.kernel, sort_keys=True)
        kind = (layer.class_name, kernel, layer.hidden_size, layer.expert_bytes)
        if kind not in seen:
            seen.add(kind)
            yield layer


def _rehearse_layer(routes: Routes, store: Store, layer: LayerEntry, *, token: str) -> None:
    experts = list(range(min(2, layer.num_experts)))
    attachment = {
        "store": str(store.path),
        "model_digest": store.manifest.digest,
        "layers": [layer.index],
        "experts": experts,
    }
    dtype = Dtype[store.manifest.model.dtype.upper()]
    frames = [_frame(layer, n, dtype=dtype, last_expert=experts[-1]) for n in ROWS]
    for method, body in (
        ("PUT", json.dumps(attachment).encode()),
        *(("POST", frame) for frame in frames),
        ("DELETE", b""),
    ):
        answer = routes.handle(  # which attaches at once, in this thread
            HttpRequest(
                target=f"{FUNCTIONS}/{FUNCTION}".encode(),
                authorization=f"Bearer {token}".encode(),
                method=method,
                body=bytearray(body),
            )
        )
        assert isinstance(answer, Answer)
        if answer.status >= 300:
            said = b"".join(answer.body).decode("utf-8", "replace")
            log.warning("%s of layer %d was not rehearsed: %s", method, layer.index, said)


def _frame(layer: LayerEntry, n_rows: int, *, dtype: Dtype, last_expert: int) -> bytes:
    """Return a frame of rows for the first expert, and one more row for the last."""
    experts = np.zeros(n_rows + 1, dtype=np.int32)
    experts[-1] = last_expert
    parts = encode_request(
        bytes((n_rows + 1) * layer.hidden_size * dtype.itemsize),
        dtype=dtype,
        mode=Mode.REDUCED,
        layer=layer.index,
        hidden_size=layer.hidden_size,
        n_rows=n_rows + 1,
        pair_row=np.arange(n_rows + 1, dtype=np.int32),
        pair_expert=experts,
        pair_weight=np.ones(n_rows + 1, dtype=np.float32),
    )
    return b"".join(parts)
