"""Installs the emulated device in FaaSMoE processes that have this folder in PYTHONPATH."""

import sys

COMPUTING = ("faasmoe_router", "faasmoe_expert", "benchmarks", "multiprocessing.spawn")

if any(name in word for name in COMPUTING for word in sys.orig_argv):
    from emulated.cuda import install

    install()
