import asyncio
import os
import subprocess
import sys
import time

import pytest
from benchmarks.evaluation.meter import MemorySample, ProcessTree, ResourceUsage, metering

BURN = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
# Uses 0.3 s of CPU time in a child, reaps it, reports that, and waits.
PARENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {BURN!r}], check=True)
print("reaped", flush=True)
sys.stdin.read()
"""


def _burn() -> None:
    end_s = time.process_time() + 0.1
    while time.process_time() < end_s:
        pass


def _start(program: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True)


def test_counts_cpu_time_of_exited_children() -> None:
    with _start(PARENT) as parent:
        tree = ProcessTree([parent.pid])
        before_s = tree.cpu_s()
        assert parent.stdout is not None
        assert parent.stdout.readline() == "reaped\n"
        assert tree.cpu_s() - before_s >= 0.28  # resolution of 10 ms
        parent.communicate("")


def test_memory_includes_descendants() -> None:
    child = "block = bytearray(b'x') * (32 << 20); print('allocated', flush=True); input()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with _start(program) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "allocated\n"
        assert ProcessTree([parent.pid]).memory(0.0).anonymous > 32 << 20
        parent.communicate("\n")


def test_counts_each_process_once() -> None:
    with _start("print('up', flush=True); input()") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        processes = ProcessTree([os.getpid(), child.pid]).processes()
        assert [process.pid for process in processes].count(child.pid) == 1
        child.communicate("\n")


def test_integrates_memory_over_uneven_intervals() -> None:
    usage = ResourceUsage(
        [MemorySample(0.0, 100, 0), MemorySample(1.0, 100, 0), MemorySample(3.0, 300, 0)]
    )
    assert usage.byte_s == pytest.approx(100 + 2 * 200)
    assert usage.peak_bytes == 300


def test_meters_for_lifetime_of_context() -> None:
    async def meter() -> ResourceUsage:
        async with metering(ProcessTree([os.getpid()]), interval_s=0.01) as usage:
            await asyncio.to_thread(_burn)
        return usage

    usage = asyncio.run(meter())
    assert usage.cpu_s >= 0.1
    assert usage.samples[0].at_s == 0.0
    assert usage.samples[-1].at_s == usage.time_s >= 0.1
    times = [sample.at_s for sample in usage.samples]
    assert times == sorted(times)
    assert usage.byte_s > 0
