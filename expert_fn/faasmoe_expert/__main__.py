"""`python -m faasmoe_expert`: one sandbox, configured by FAASMOE_* variables."""

from __future__ import annotations

import logging
import sys

from faasmoe_expert.config import ConfigError, SandboxConfig
from faasmoe_expert.deferral import META_KERNELS, defer_import
from faasmoe_expert.errors import DeviceLost
from faasmoe_expert.lifeline import LifelineError, die_with_parent


def main() -> int:
    """Serve until SIGTERM; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        die_with_parent()
        config = SandboxConfig.from_env()
        defer_import(META_KERNELS)
        from faasmoe_expert.server import serve

        serve(config)
    except (ConfigError, LifelineError, OSError) as error:
        print(f"faasmoe_expert: {error}", file=sys.stderr)
        return 2
    except DeviceLost as error:
        print(f"faasmoe_expert: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
