"""Connections end by themselves when the other machine is gone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from faasmoe_contracts.socket_address import open_connection, write


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


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_writing_to_a_lost_connection_says_so_on_every_event_loop(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a Unix socket must be short

    async def lose() -> None:
        path = Path("listener")
        with socket.socket(socket.AF_UNIX) as listener:  # accepts nothing before it is closed
            listener.bind(str(path))
            listener.listen()
            reader, writer = await asyncio.open_unix_connection(path)
            write(writer, b"a")
        with pytest.raises(ConnectionResetError):
            await reader.read()
        with pytest.raises(ConnectionResetError):
            write(writer, b"b")

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(lose())
