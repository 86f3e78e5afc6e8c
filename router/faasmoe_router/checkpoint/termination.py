"""The last words of a preparation that runs as a Kubernetes Job: one JSON object in a file.

The kubelet reads the file when the container has ended and puts it into the pod's status, where the
operator finds it: what the store holds, or why there is none. The keys are those of a MoEModel's
`status.model`; the kubelet takes at most MAX_BYTES of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from faasmoe_expert.store import LayerEntry, Manifest, Store, StoreError
from faasmoe_router.checkpoint.errors import PrepareError, SourceUnsupported, reason_of

MAX_BYTES = 4096
MAX_MESSAGE_BYTES = 640  # of which each may become six in JSON
FAILED, FINAL = 1, 2
"""Exit status of what may work when it is tried again, and of what cannot."""


def run_logged(prepare: Callable[[], Store], log: Path) -> Store:
    """Prepare a store and write what became of it; every error is raised on.

    Args:
        prepare: prepares the store.
        log: the container's termination log.
    """
    try:
        store = prepare()
        log.write_bytes(success(store.manifest))
    except Exception as error:
        log.write_bytes(failure(error))
        raise
    return store


def exit_status(error: BaseException) -> int:
    """Return the exit status for a failure: FINAL if trying again cannot help."""
    return FINAL if isinstance(error, PrepareError) and error.is_final else FAILED


def success(manifest: Manifest) -> bytes:
    """Return the message of a store that is complete.

    Raises:
        SourceUnsupported: its layers are of so many kinds that they do not fit into a message.
    """
    message = _encoded({"ok": True, **summary(manifest)})
    if len(message) > MAX_BYTES:
        n_runs = len(_runs(manifest.layers))
        raise SourceUnsupported(
            f"layers: got {len(manifest.layers)} MoE layers in {n_runs} runs of equal ones, which "
            f"take {len(message)} bytes to describe, expected at most {MAX_BYTES}"
        )
    return message


def failure(error: BaseException) -> bytes:
    """Return the message of a failure."""
    is_told = isinstance(error, PrepareError | StoreError | OSError)
    text = str(error) if is_told else f"{type(error).__name__}: {error}"
    message = (
        " ".join(text.split()).encode(errors="replace")[:MAX_MESSAGE_BYTES].decode(errors="ignore")
    )
    return _encoded({"ok": False, "reason": reason_of(error), "message": message})


def summary(manifest: Manifest) -> dict[str, Any]:
    """Return what a MoEModel's status says of a store."""
    model, files = manifest.model, manifest.files
    return {
        "digest": manifest.digest,
        **({} if model.revision is None else {"revision": model.revision}),
        "source": model.source,
        "family": model.family,
        "architecture": model.architecture,
        "dtype": model.dtype,
        "hiddenSize": model.hidden_size,
        "vocabSize": model.vocab_size,
        "maxPositionEmbeddings": model.max_position_embeddings,
        "numHiddenLayers": model.num_hidden_layers,
        "sizeBytes": sum(entry.size_bytes for entry in files.values()),
        "routerBytes": sum(e.size_bytes for name, e in files.items() if name.startswith("router/")),
        "layers": _runs(manifest.layers),
    }


def _runs(layers: tuple[LayerEntry, ...]) -> list[dict[str, int]]:
    """Return the runs of layers that are alike."""

    def shape(layer: LayerEntry) -> tuple[int, int, int, int]:
        return (layer.num_experts, layer.top_k, layer.expert_bytes, layer.shared_bytes)

    names = ("numExperts", "topK", "expertBytes", "sharedBytes")
    return [
        {"count": len(list(run)), **dict(zip(names, found, strict=True))}
        for found, run in groupby(layers, key=shape)
    ]


def _encoded(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
