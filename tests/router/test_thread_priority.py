"""A router that has started lets others start."""

from __future__ import annotations

import json
import subprocess
import sys

LOWER = """
import asyncio, json, os, subprocess, threading
from faasmoe_router.thread_priority import lower_priority_later

def niceness():
    threads = map(int, os.listdir("/proc/self/task"))
    return [os.getpriority(os.PRIO_PROCESS, thread) for thread in threads]

async def work():
    end = threading.Event()
    threading.Thread(target=end.wait).start()
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    before, all_lower = niceness(), asyncio.Event()
    lower_priority_later(7, delay_s=0.0)
    while set(niceness()) != {7}:
        await asyncio.sleep(0.001)
    threading.Thread(target=end.wait).start()
    print(json.dumps([before, niceness(), os.getpriority(os.PRIO_PROCESS, child.pid)]))
    child.communicate()
    end.set()

asyncio.run(asyncio.wait_for(work(), 60))
"""


def test_all_threads_children_and_what_is_started_later_get_the_niceness() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", LOWER], capture_output=True, text=True, check=True
    )
    before, after, of_child = json.loads(finished.stdout)
    assert before == [before[0]] * 2
    assert before[0] < 7
    assert after == [7, 7, 7]
    assert of_child == 7  # an engine may have a process of its own
