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


HOLE_BYTES = """
import ctypes
from faasmoe_expert.malloc import HOLES, MAX_FILLED_BYTES, _Mallinfo

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
libc.mallinfo2.restype = _Mallinfo

def hole_bytes():
    info = libc.mallinfo2()
    return info.fordblks - info.keepcost
"""

FILL = """
def make_holes():
    blocks = [libc.malloc(2000) for _ in range(4000)]
    for block in blocks[::2]:
        libc.free(block)

make_holes()
before = hole_bytes()
HOLES.fill()
print(before, hole_bytes(), HOLES.filled_bytes)
for _ in range(20):
    make_holes()
    HOLES.fill()
print(hole_bytes(), HOLES.filled_bytes, MAX_FILLED_BYTES)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 only")
def test_fills_holes_up_to_a_limit() -> None:
    command = [sys.executable, "-c", HOLE_BYTES + FILL]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    before, after, filled = map(int, lines[0].split())
    assert before > 3_000_000
    assert after < before / 10
    assert filled > before / 2
    left, filled, limit = map(int, lines[1].split())
    assert left > 3_000_000  # 60 MB of holes are more than the limit
    assert limit - 100_000 < filled <= limit


LARGE_HOLES = """
def make_holes(size, number):
    blocks = [libc.malloc(size) for _ in range(2 * number)]
    for block in blocks[::2]:
        libc.free(block)

make_holes(100_000, 600)  # a tokenizer leaves as much
make_holes(2000, 2000)
print(hole_bytes())
HOLES.fill()
print(hole_bytes(), HOLES.filled_bytes, MAX_FILLED_BYTES)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 only")
def test_large_holes_leave_enough_of_the_limit_for_small_ones() -> None:
    command = [sys.executable, "-c", HOLE_BYTES + LARGE_HOLES]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert int(lines[0]) > 50_000_000
    left, filled, limit = map(int, lines[1].split())
    assert left < 1_000_000
    assert filled < limit / 2


VARIABLES = """
import ctypes
from faasmoe_expert.malloc import _Mallinfo, apply_malloc_variables

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.mallinfo2.restype = _Mallinfo

def mapped_blocks():
    before = libc.mallinfo2().hblks
    libc.malloc(500_000)
    return libc.mallinfo2().hblks - before

counts = [mapped_blocks()]
for value in ("1048576", "x", "100000"):
    apply_malloc_variables({"MALLOC_MMAP_THRESHOLD_": value})
    counts.append(mapped_blocks())
print(counts)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 only")
def test_variables_set_malloc_again_in_a_running_process() -> None:
    run = subprocess.run(
        [sys.executable, "-c", VARIABLES], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[1, 0, 0, 1]"
