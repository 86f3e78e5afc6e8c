"""A zygote whose children print a variable and wait, write to a descriptor, or exit.

They print what it has made for them, too: the words of all children so far.
"""

from __future__ import annotations

import os
import signal
import sys

from faasmoe_contracts.fork_server import ForkServer
from faasmoe_contracts.parent_death import die_with_parent


def main() -> int:
    die_with_parent()
    if "FAILS" in os.environ:
        sys.exit("no luck")
    words: list[str] = []
    server = ForkServer.from_environment(
        process_name="forked",
        before_fork=lambda environment: words.append(environment["WORD"]),
        gives_away="GIVES_AWAY" in os.environ,
    )
    if not server.run():
        return 0
    die_with_parent()  # its environment names the zygote
    if "IGNORES_SIGTERM" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"{' '.join(words)} {sorted(os.environ)}", flush=True)
    if descriptor := os.environ.get("DESCRIPTOR"):
        os.write(int(descriptor), b"written")
    if status := os.environ.get("STATUS"):
        return int(status)
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main())
