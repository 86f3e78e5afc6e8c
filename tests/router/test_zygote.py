"""How forked routers end."""

from __future__ import annotations

import subprocess
import sys

ENDS = """
import atexit
from faasmoe_router.zygote import end_process

class Object:
    def __del__(self):
        print("freed", flush=True)

kept = Object()
atexit.register(print, "at exit")
print("served", end="")
end_process(3)
"""


def test_router_that_has_served_ends_without_freeing_its_objects() -> None:
    finished = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (3, "served"), finished.stderr
