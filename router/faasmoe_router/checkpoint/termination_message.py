"""The termination message of a preparation that runs as a Kubernetes Job: one JSON object.

The kubelet reads the container's termination log when the container exits and copies at most 4096
bytes of it into the pod's status, where the operator finds it. It describes the store, with the
keys of a MoEModel's `status.model`, or the failure.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from faasmoe_contracts.store import LayerEntry, Manifest, Store, StoreError
from faasmoe_router.errors import PrepareError, SourceUnsupported, failure_reason

MAX_TERMINATION_MESSAGE_BYTES = 4096
MAX_ERROR_TEXT_BYTES = 640  # JSON escapes may take six bytes for each
EXIT_RETRYABLE, EXIT_PERMANENT = 1, 2
"""Exit status of a failure that a retry may fix, and of one that it cannot."""


def run_with_termination_log(prepare: Callable[[], Store], termination_log: Path) -> Store:
    """Prepare a store and write the outcome to the termination log; errors are re-raised.

    Args:
        prepare: prepares the store.
        termination_log: path of the container's termination log.
    """
    try:
        store = prepare()
        termination_log.write_bytes(success_message(store.manifest))
    except Exception as error:
        termination_log.write_bytes(failure_message(error))
        raise
    return store


def exit_status(error: BaseException) -> int:
    """Return the exit status for a failure: EXIT_PERMANENT if a retry cannot help."""
    is_permanent = isinstance(error, PrepareError) and error.is_permanent
    return EXIT_PERMANENT if is_permanent else EXIT_RETRYABLE


def success_message(manifest: Manifest) -> bytes:
    """Return the message for a complete store.

    Raises:
        SourceUnsupported: the layers alternate so often that their description exceeds 4096 bytes.
    """
    message = _compact_json({"ok": True, **model_status(manifest)})
    if len(message) > MAX_TERMINATION_MESSAGE_BYTES:
        n_groups = len(_layer_groups(manifest.layers))
        raise SourceUnsupported(
            f"layers: got {len(manifest.layers)} MoE layers in {n_groups} runs of equal layers, "
            f"which take {len(message)} bytes to describe, expected at most "
            f"{MAX_TERMINATION_MESSAGE_BYTES}"
        )
    return message


def failure_message(error: BaseException) -> bytes:
    """Return the message for a failure; unexpected errors are prefixed with their class."""
    is_expected = isinstance(error, PrepareError | StoreError | OSError)
    text = str(error) if is_expected else f"{type(error).__name__}: {error}"
    message = (
        " ".join(text.split())
        .encode(errors="replace")[:MAX_ERROR_TEXT_BYTES]
        .decode(errors="ignore")
    )
    return _compact_json({"ok": False, "reason": failure_reason(error), "message": message})


def model_status(manifest: Manifest) -> dict[str, Any]:
    """Return the `status.model` of a MoEModel that this store serves."""
    model = manifest.model
    return {
        "digest": manifest.digest,
        **({} if model.revision is None else {"revision": model.revision}),
        "source": model.source,
        "family": model.family,
        "architecture": model.architecture,
        "dtype": model.dtype,
        **_quantization_status(manifest),
        "hiddenSize": model.hidden_size,
        "vocabSize": model.vocab_size,
        "maxPositionEmbeddings": model.max_position_embeddings,
        "numHiddenLayers": model.num_hidden_layers,
        "sizeBytes": manifest.size_bytes,
        "routerBytes": manifest.router_bytes,
        "layers": _layer_groups(manifest.layers),
    }


def _quantization_status(manifest: Manifest) -> dict[str, Any]:
    """Return the fields on quantisation; none for what is not quantised."""
    quantization, router_bytes = manifest.quantization, manifest.router.quantized_bytes
    return {
        **({"expertsQuantization": quantization.experts} if quantization.experts != "none" else {}),
        **({"routerQuantization": quantization.router} if quantization.router != "none" else {}),
        **({"routerQuantizedBytes": router_bytes} if router_bytes else {}),
    }


def _layer_groups(layers: tuple[LayerEntry, ...]) -> list[dict[str, int]]:
    """Return the runs of consecutive layers of equal shape, each with its length."""

    def layer_shape(layer: LayerEntry) -> tuple[int, int, int, int]:
        return (layer.num_experts, layer.top_k, layer.expert_bytes, layer.shared_bytes)

    names = ("numExperts", "topK", "expertBytes", "sharedBytes")
    return [
        {"count": len(list(run)), **dict(zip(names, values, strict=True))}
        for values, run in groupby(layers, key=layer_shape)
    ]


def _compact_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
