import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, re
from pathlib import Path
from faasmoe_expert import heap

def resident_bytes():
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Private_Dirty:\\s+(\\d+)", text)[1]) * 1024

blocks = [bytearray(b"x" * 64_000) for _ in range(400)]  # below malloc's threshold for mmap
del blocks[:-1]  # the last one keeps all before it in the heap
before = resident_bytes()
heap.give_back()
print(before - resident_bytes())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's own")
def test_free_memory_within_the_heap_goes_back_to_the_system() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 20 << 20
