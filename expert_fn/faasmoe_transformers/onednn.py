"""Which dtypes oneDNN, torch's library of CPU products, computes at full speed on this machine.

Products of a 16-bit dtype are fast on a CPU only where oneDNN has kernels for it. Without them,
torch's own loops take several times as long as oneDNN does in float32.
"""

from __future__ import annotations

import torch


def is_fast_on_cpu(dtype: torch.dtype) -> bool:
    """Return whether oneDNN computes matrix products of `dtype` on this CPU.

    True for dtypes wider than 16 bits. Respects oneDNN's own limit, ONEDNN_MAX_CPU_ISA.
    """
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True
