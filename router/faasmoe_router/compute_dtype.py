"""Chooses the dtype in which the router computes its part of the model.

Independent of the functions: they compute in the store's dtype, and frames carry it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from faasmoe_contracts.store import Store
from faasmoe_kernels import KernelsUnavailable, load
from faasmoe_transformers.native_step import ComputeMode
from faasmoe_transformers.onednn import is_fast_on_cpu

DtypeSetting = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True, slots=True)
class ComputeDtype:
    """The router's dtype.

    Attributes:
        dtype: dtype of activations and KV cache, and of weights that the kernels do not read as
            they are stored.
        reason: why it was chosen, for the log.
    """

    dtype: torch.dtype
    reason: str


def select_compute_dtype(
    setting: DtypeSetting, store: Store, device: torch.device, *, compute: ComputeMode = "auto"
) -> ComputeDtype:
    """Return the dtype to compute in.

    Args:
        setting: a dtype, or auto for the store's dtype, or float32 on a CPU with the kernel
            library, or where products in the store's dtype would be slow.
        store: the prepared model.
        device: device of the router's part of the model.
        compute: what computes it; torch leaves the kernel library out of account.
    """
    if setting != "auto":
        return ComputeDtype(getattr(torch, setting), "FAASMOE_DTYPE is set")
    stored_name = store.manifest.model.dtype
    stored: torch.dtype = getattr(torch, stored_name)
    if (
        device.type == "cpu"
        and stored is not torch.float32
        and compute != "torch"
        and _has_kernels()
    ):
        reason = f"the kernels multiply the store's {stored_name} weights in float32"
        return ComputeDtype(torch.float32, reason)
    if device.type == "cpu" and not is_fast_on_cpu(stored):
        reason = f"this CPU has no fast products in {stored_name}, the store's dtype"
        return ComputeDtype(torch.float32, reason)
    return ComputeDtype(stored, "it is the store's dtype")


def _has_kernels() -> bool:
    try:
        load()
    except KernelsUnavailable:
        return False
    return True
