"""The `faasmoe` command with a fake router and a fake zygote, neither of which needs torch."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

from faasmoe_operator.cli import main, router
from faasmoe_operator.platforms import zygote

HERE = Path(__file__).parent
ZYGOTE = HERE.parents[1] / "expert_fn" / "fake_zygote.py"

if __name__ == "__main__":
    with (
        patch.object(router, "ZYGOTE_COMMAND", (sys.executable, str(HERE / "fake_router.py"))),
        patch.object(zygote, "ZYGOTE_COMMAND", (sys.executable, str(ZYGOTE))),
    ):
        sys.exit(main())
