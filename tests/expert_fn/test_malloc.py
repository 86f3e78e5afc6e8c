import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, re
from pathlib import Path
from faasmoe_expert import malloc

def resident_bytes():
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Private_Dirty:\\s+(\\d+)", text)[1]) * 1024

blocks = [bytearray(b"x" * 64_000) for _ in range(400)]  # below malloc's mmap threshold
del blocks[:-1]  # the last one keeps the heap from shrinking
before = resident_bytes()
malloc.trim_heap()
print(before - resident_bytes())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_returns_free_heap_pages_to_the_system() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 20 << 20
