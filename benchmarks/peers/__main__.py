"""Entry point of `python -m benchmarks.peers`."""

import sys

from benchmarks.peers.command import measure, parse_arguments

sys.exit(measure(parse_arguments()))
