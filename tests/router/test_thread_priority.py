"""A router that has started lets others start."""

from __future__ import annotations

import json
import subprocess
import sys

LOWER = """
import asyncio, json, os, subprocess, threading
from faasmoe_router.thread_priority import lower_priority_later

def niceness(thread):
    return os.getpriority(os.PRIO_PROCESS, thread)

tids, of_later, started, go = [], [], threading.Event(), threading.Event()

def compute():
    tids.append(threading.get_native_id())
    started.set()
    go.wait()
    record = lambda: of_later.append(niceness(threading.get_native_id()))
    later = threading.Thread(target=record)
    later.start()
    later.join()

async def work():
    computing = threading.Thread(target=compute)
    computing.start()
    started.wait()
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    before = niceness(os.getpid())
    lower_priority_later(7, delay_s=0.0)
    while niceness(tids[0]) != 7 or niceness(child.pid) != 7:
        await asyncio.sleep(0.001)
    go.set()
    computing.join()
    child.communicate()
    print(json.dumps([niceness(os.getpid()) == before, of_later]))

asyncio.run(asyncio.wait_for(work(), 60))
"""


def test_all_but_the_main_thread_get_the_niceness_and_hand_it_on() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", LOWER], capture_output=True, text=True, check=True
    )
    assert json.loads(finished.stdout) == [True, [7]]
