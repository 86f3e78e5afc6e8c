"""`python -m tests.attack.storm ARGUMENTS`: the clients that hang up; prints how often they did.

Says when it is ready, and begins when it is sent a line: its own start is no part of the storm.
"""

import asyncio
import json
import sys

from tests.attack.clients import hang_up_storm

if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    print(asyncio.run(hang_up_storm(**json.loads(sys.argv[1]))))
