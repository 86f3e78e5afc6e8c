"""Connections end by themselves when the other machine is gone."""

from __future__ import annotations

import asyncio
import socket

from faasmoe_contracts.socket_address import open_connection


def test_a_machine_that_is_gone_is_noticed_within_a_minute() -> None:
    async def options() -> list[int]:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            _, writer = await open_connection(f"127.0.0.1:{port}", limit=64, ack_timeout_s=15.0)
            connection = writer.get_extra_info("socket")
            found = [connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
            for name in ("IDLE", "INTVL", "CNT"):
                option = getattr(socket, f"TCP_KEEP{name}")
                found.append(connection.getsockopt(socket.IPPROTO_TCP, option))
            found.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
            writer.close()
            return found

    is_kept_alive, idle_s, interval_s, n_probes, ack_timeout_ms = asyncio.run(options())
    assert is_kept_alive
    assert idle_s + interval_s * n_probes <= 60
    assert ack_timeout_ms == 15_000
