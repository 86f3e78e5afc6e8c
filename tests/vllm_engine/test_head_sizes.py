"""The sizes of attention heads that are refused are those that vLLM's CPU attention lacks."""

import json
import subprocess

from vllm_runs import NEEDS_VLLM, TIMEOUT_S, VLLM_PYTHON

from faasmoe_router.vllm_backend.compatibility import CPU_HEAD_SIZES

pytestmark = [*NEEDS_VLLM]

PROGRAM = """
import json
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
print(json.dumps(CPUAttentionBackend.get_supported_head_sizes()))
"""


def test_head_sizes_are_those_of_vllms_cpu_attention() -> None:
    output = subprocess.run(
        [VLLM_PYTHON, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    ).stdout
    assert tuple(json.loads(output.splitlines()[-1])) == CPU_HEAD_SIZES
