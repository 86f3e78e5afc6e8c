"""`python -m faasmoe_expert` runs one sandbox, configured by FAASMOE_* variables."""

from __future__ import annotations

import logging
import sys

from faasmoe_contracts.parent_death import ParentDeathError, die_with_parent
from faasmoe_expert.config import SandboxConfig, SandboxConfigError
from faasmoe_expert.errors import SandboxDeviceLost
from faasmoe_transformers.errors import UnsupportedVersions
from faasmoe_transformers.lazy_import import META_REGISTRATIONS, defer_import
from faasmoe_transformers.version_check import SANDBOX_MODULES, check_private_names


def main() -> int:
    """Serve until SIGTERM; return 0, 1 if the device was lost, 2 for invalid settings."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        die_with_parent()
        config = SandboxConfig.from_env()
        defer_import(META_REGISTRATIONS)
        from faasmoe_expert.server.server import serve

        check_private_names(SANDBOX_MODULES, libraries=("torch",))
        serve(config)
    except (SandboxConfigError, ParentDeathError, UnsupportedVersions, OSError) as error:
        print(f"faasmoe_expert: {error}", file=sys.stderr)
        return 2
    except SandboxDeviceLost as error:
        print(f"faasmoe_expert: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
