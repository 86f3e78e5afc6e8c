"""Read by every Python with this folder in PYTHONPATH: FaaSMoE's have the emulated device then."""

import sys

COMPUTING = ("faasmoe_router", "faasmoe_expert", "benchmarks")

if any(word.startswith(COMPUTING) for word in sys.orig_argv):
    from emulated.cuda import install

    install()
