"""`python -m faasmoe_operator.kube`: the operator, configured by FAASMOE_OPERATOR_* variables."""

from __future__ import annotations

import asyncio
import sys

from faasmoe_operator.errors import FaasmoeError
from faasmoe_operator.kube.config import OperatorConfig
from faasmoe_operator.kube.operator import configure_logging, run_operator


def main() -> int:
    """Reconcile MoEModels until SIGTERM; return the exit status."""
    try:
        config = OperatorConfig.from_env()
        configure_logging(config.log_format, config.log_level)
        asyncio.run(run_operator(config))
    except (FaasmoeError, OSError) as error:
        return _fail(error)
    except ExceptionGroup as group:
        known, others = group.split((FaasmoeError, OSError))
        if known is None or others is not None:
            raise
        return _fail(known)
    return 0


def _fail(error: Exception) -> int:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    print(f"faasmoe_operator.kube: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
