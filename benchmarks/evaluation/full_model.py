"""The server of strategies without functions: our router, but with all experts in its own process.

API, scheduler and batching are the product's, so that a comparison is of where experts are computed
and of nothing else. Each process has its weights in private memory, as a container would. Settings
beyond the router's own:

    FAASMOE_BENCH_CHECKPOINT   the checkpoint that is loaded
    FAASMOE_BENCH_EXPERTS      transformers' experts implementation
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


def load_full_model(store: Store, _: Any, *, device: torch.device) -> Any:
    """Load the whole model; takes the place of the router's way to load its part."""
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
    """Copy what is mapped from the checkpoint, and let the mapping and what loading took go."""
    for parameter in model.parameters():  # tied ones come once
        parameter.data = parameter.data.clone()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def main() -> int:
    """Serve until SIGTERM; return the exit status."""
    # By name in the module that calls it: everything else stays as the product has it.
    setattr(process, "load_router_model", load_full_model)  # noqa: B010 (mypy refuses to assign)
    return router.main()


if __name__ == "__main__":
    sys.exit(main())
