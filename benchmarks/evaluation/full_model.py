"""Server of the strategies without functions: the router with all experts in its own process.

API, scheduler and batching are unchanged, so that only the place where experts are computed
differs. The weights are in private memory, as in a container of their own. Settings in addition to
those of the router:

    FAASMOE_BENCH_CHECKPOINT   checkpoint to load
    FAASMOE_BENCH_EXPERTS      experts implementation of transformers
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from typing import Any

import torch
from benchmarks.evaluation import variables
from transformers import AutoModelForCausalLM

from faasmoe_contracts.store import Store
from faasmoe_router import __main__ as router
from faasmoe_router import process


def load_full_model(store: Store, _: Any, *, device: torch.device, **__: Any) -> Any:
    """Load the whole model; replaces `load_router_model` of the router.

    The dtype that the router would compute in is not used: the whole model in float32 would take
    twice the memory, the router's kernels compute so with 16-bit weights.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(
        os.environ[variables.CHECKPOINT],
        dtype=getattr(torch, store.manifest.model.dtype),
        attn_implementation="sdpa",
        experts_implementation=os.environ[variables.EXPERTS],
    )
    _make_private(model)
    return model.to(device).eval().requires_grad_(False)


def _make_private(model: torch.nn.Module) -> None:
    """Copy the weights out of the mapped checkpoint and release memory used for loading."""
    for parameter in model.parameters():  # yields tied parameters once
        parameter.data = parameter.data.clone()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def main() -> int:
    """Serve until SIGTERM and return the exit status."""
    # Replaces only the name that the router calls; the rest of the router is unchanged.
    setattr(process, "load_router_model", load_full_model)  # noqa: B010 (mypy rejects assignment)
    return router.main()


if __name__ == "__main__":
    sys.exit(main())
