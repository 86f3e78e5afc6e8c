import os
import socket

import pytest

from faasmoe_gateway.server import inherited_listeners


def test_an_inherited_socket_listens() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    listeners = inherited_listeners(listener.detach())
    assert listeners is not None
    with listeners[0] as inherited, socket.create_connection(address):
        assert inherited.getsockname() == address


def test_a_descriptor_that_is_no_socket_is_named() -> None:
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(ValueError, match=rf"FAASMOE_LISTEN_FD: got {read_end}, expected an"):
            inherited_listeners(read_end)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_without_a_descriptor_the_server_opens_its_own() -> None:
    assert inherited_listeners(None) is None
