"""Read by every Python with this folder in PYTHONPATH: FaaSMoE's have the emulated device then."""

import sys

COMPUTING = ("faasmoe_router", "faasmoe_expert", "benchmarks", "multiprocessing.spawn")

if any(name in word for name in COMPUTING for word in sys.orig_argv):
    from emulated.cuda import install

    install()
