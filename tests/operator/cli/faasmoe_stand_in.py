"""`faasmoe` with a router and a zygote that need no torch."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from unittest.mock import patch

from faasmoe_operator.cli import main, router, up
from faasmoe_operator.platforms import ProcessPlatform

HERE = Path(__file__).parent
ZYGOTE = HERE.parents[1] / "expert_fn" / "zygote_stand_in.py"

if __name__ == "__main__":
    stand_in = functools.partial(ProcessPlatform, command=(sys.executable, str(ZYGOTE)))
    with (
        patch.object(router, "COMMAND", (sys.executable, str(HERE / "router_stand_in.py"))),
        patch.object(up, "ProcessPlatform", stand_in),
    ):
        sys.exit(main())
