"""`python -m faasmoe_expert.blocks` serves the blocks of a store, set by FAASMOE_* variables.

FAASMOE_STORE             the store's folder
FAASMOE_HOST, _PORT       address to listen on (127.0.0.1, 9092)
FAASMOE_TOKEN             bearer token of clients; none if empty
FAASMOE_MAX_CONNECTIONS   maximum number of open connections (64)
FAASMOE_BYTES_PER_SECOND  maximum rate of all connections together; no limit if not set
FAASMOE_TLS_FOLDER        certificate, key and authorities for TLS; none if not set
FAASMOE_TLS_NAMESPACE     namespace of the model, which its sandboxes show (default)
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from faasmoe_contracts.store import Store, StoreError
from faasmoe_contracts.tls import DEFAULT_NAMESPACE, models_name
from faasmoe_expert.blocks.index import BlockIndex
from faasmoe_expert.blocks.server import BlockServer
from faasmoe_expert.config import (
    SandboxConfigError,
    env_int,
    env_optional_int,
    open_tls_folder,
)

logger = logging.getLogger("faasmoe_expert.blocks")


@dataclass(frozen=True, slots=True)
class BlockServerConfig:
    """Settings of a block server; see the module."""

    store: Path
    host: str
    port: int
    token: str
    max_connections: int
    bytes_per_s: int | None
    tls_folder: Path | None
    tls_namespace: str

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Self:
        """Read FAASMOE_* variables; raises SandboxConfigError naming the variable."""
        if not (store := env.get("FAASMOE_STORE", "")):
            raise SandboxConfigError("FAASMOE_STORE: got none, expected the folder of a store")
        config = cls(
            store=Path(store),
            host=env.get("FAASMOE_HOST", "127.0.0.1"),
            port=env_int(env, "FAASMOE_PORT", 9092),
            token=env.get("FAASMOE_TOKEN", ""),
            max_connections=env_int(env, "FAASMOE_MAX_CONNECTIONS", 64),
            bytes_per_s=env_optional_int(env, "FAASMOE_BYTES_PER_SECOND"),
            tls_folder=Path(path) if (path := env.get("FAASMOE_TLS_FOLDER")) else None,
            tls_namespace=env.get("FAASMOE_TLS_NAMESPACE") or DEFAULT_NAMESPACE,
        )
        for name, value in (
            ("FAASMOE_MAX_CONNECTIONS", config.max_connections),
            ("FAASMOE_BYTES_PER_SECOND", config.bytes_per_s),
        ):
            if value is not None and value < 1:
                raise SandboxConfigError(f"{name}: got {value}, expected 1 or more")
        if not 0 <= config.port < 65536:
            raise SandboxConfigError(f"FAASMOE_PORT: got {config.port}, expected 0 to 65535")
        return config


def main() -> int:
    """Serve until SIGTERM; return 0, or 2 for invalid settings or a store that is not complete."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        config = BlockServerConfig.from_env(os.environ)
        index = BlockIndex(Store.open(config.store))
        server = BlockServer(
            (config.host, config.port),
            index,
            token=config.token,
            max_connections=config.max_connections,
            bytes_per_s=config.bytes_per_s,
            tls=open_tls_folder(config.tls_folder),
            peers={models_name(config.tls_namespace)},
        )
    except (SandboxConfigError, StoreError, OSError) as error:
        print(f"faasmoe_expert.blocks: {error}", file=sys.stderr)
        return 2
    with server:
        for number in (signal.SIGTERM, signal.SIGINT):
            # `shutdown` waits for the loop that this thread runs.
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        host, port = server.server_address[:2]
        logger.info("store %s served on %s:%s", config.store, host, port)
        server.serve_forever(poll_interval=0.1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
