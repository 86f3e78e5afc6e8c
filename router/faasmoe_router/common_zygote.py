"""`python -m faasmoe_router.common_zygote`: imports what both zygotes need, and forks them.

The zygote of sandboxes and that of routers each hold torch; as forks of one process they share its
pages. They become children of the launcher, have the environment that it sends, and survive this
process, which holds no token and no model. What libraries read when they are loaded is of this
process's environment: the launcher has it fork only zygotes that have the same.
"""

from __future__ import annotations

import gc
import importlib
import linecache
import os
import sys

from faasmoe_contracts.command_line import show_command
from faasmoe_contracts.fork_server import FORK_MODULE_ENV, ForkServer, ForkServerError
from faasmoe_contracts.parent_death import ParentDeathError, die_with_parent
from faasmoe_expert.file_pages import release_unchanged_pages
from faasmoe_expert.malloc import HOLES, apply_malloc_variables
from faasmoe_transformers.fast_import import prepare_fast_import

EXIT_FAILED = 2
PROCESS_NAME = "faasmoe_zygote"
MODULES = ("faasmoe_expert.zygote", "faasmoe_router.zygote")


def main() -> int:
    """Serve until the launcher is gone; a forked child becomes a zygote. Returns its status."""
    gc.disable()  # hundreds of thousands of objects are created now and stay
    try:
        die_with_parent()
        import_shared()
        server = ForkServer.from_environment(process_name=PROCESS_NAME, gives_away=True)
    except (ParentDeathError, ForkServerError) as error:
        print(f"faasmoe_router.common_zygote: {error}", file=sys.stderr)
        return EXIT_FAILED
    linecache.clearcache()  # sources that torch has looked at
    gc.collect()
    HOLES.fill()
    release_unchanged_pages()
    gc.freeze()
    if not server.run():
        return 0
    return run_zygote()


def import_shared() -> None:
    """Import what sandboxes and routers both need; starts no thread."""
    prepare_fast_import()
    import faasmoe_expert.server.server  # noqa: F401


def run_zygote() -> int:
    """Become the zygote that the environment names; return its status."""
    module = os.environ.pop(FORK_MODULE_ENV, "")
    if module not in MODULES:
        expected = " or ".join(MODULES)
        print(f"{FORK_MODULE_ENV}: got {module!r}, expected {expected}", file=sys.stderr)
        return EXIT_FAILED
    apply_malloc_variables(os.environ)
    show_command((sys.executable, "-m", module))
    status: int = importlib.import_module(module).main()
    return status


if __name__ == "__main__":
    sys.exit(main())
