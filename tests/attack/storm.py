"""`python -m tests.attack.storm ARGUMENTS`: the clients that hang up; prints how often they did."""

import asyncio
import json
import sys

from tests.attack.clients import hang_up_storm

if __name__ == "__main__":
    print(asyncio.run(hang_up_storm(**json.loads(sys.argv[1]))))
