"""The command line: `faasmoe COMMAND`. Starts the data plane as processes, imports none of it."""

from faasmoe_operator.cli.command import main

__all__ = ["main"]
