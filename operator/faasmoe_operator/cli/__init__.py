"""The `faasmoe` command line.

The CLI starts the router and the sandboxes as child processes and never imports their packages, so
it runs without torch.
"""

from faasmoe_operator.cli.command import main

__all__ = ["main"]
