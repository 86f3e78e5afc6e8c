"""The gateway's file is read as it was written, and errors name the field."""

import pytest

from faasmoe_contracts.gateway_file import GatewayFile, ModelEntry, RouterEntry
from faasmoe_contracts.json_reader import ContractError


def file_of(*addresses: str) -> bytes:
    routers = tuple(RouterEntry(f"router-{i}", address) for i, address in enumerate(addresses))
    return GatewayFile((ModelEntry("mixtral", "m", 64, routers),), ()).dumps()


def test_addresses_are_sockets_or_hosts_with_a_port() -> None:
    addresses = ("/run/router.sock", "10.0.0.1:8000", "[::1]:65535", "router.svc:1")
    (model,) = GatewayFile.loads(file_of(*addresses)).models
    assert tuple(router.address for router in model.routers) == addresses


@pytest.mark.parametrize("address", ["router.sock", "10.0.0.1", ":80", "host:0", "host:65536"])
def test_another_address_is_an_error_of_its_field(address: str) -> None:
    with pytest.raises(ContractError, match=r"^models\.0\.routers\.1\.address: got ") as caught:
        GatewayFile.loads(file_of("/run/router.sock", address))
    assert repr(address) in str(caught.value)
