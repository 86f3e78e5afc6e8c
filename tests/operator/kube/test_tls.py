"""TLS of the operator: its control API, the link of gateways, and the Secrets that it writes."""

from __future__ import annotations

import asyncio
import base64
import ssl
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from faasmoe_up import free_port
from fake_kube_api import FakeKubeApi
from kube_objects import make_object
from kubernetes_schemas import check_schema
from tls_folders import NAMESPACE, ROOT_KEY, tls_peer, write_tls_folder

from faasmoe_contracts.gateway_hello import GatewayHello
from faasmoe_contracts.tls import (
    GATEWAY_NAME,
    OPERATOR_NAME,
    TlsFolder,
    TlsPeer,
    models_name,
    peer_names,
)
from faasmoe_gateway.control_link import ControlLink
from faasmoe_operator.control.gateway_links import GatewayLinks
from faasmoe_operator.control.lease_book import LeaseBook
from faasmoe_operator.control.lease_server import LeaseServer
from faasmoe_operator.control.tenant_ledger import TenantLedger
from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.certificates import CERTIFICATE_PERIOD_S
from faasmoe_operator.kube.config import OperatorConfig
from faasmoe_operator.kube.errors import Unavailable
from faasmoe_operator.kube.manifests.names import MODELS_TLS_SECRET
from faasmoe_operator.kube.operator import Operator, TlsFolderError
from faasmoe_operator.kube.server import (
    HealthRoutes,
    Readiness,
    require_models_certificate,
    start_server,
)
from faasmoe_operator.kube.tenants import link_server
from faasmoe_operator.kube.tenants.link_server import GatewayLinkServer
from faasmoe_operator.kube.tls_secrets import REWRITE_S, SECRET_TYPE, TlsSecrets
from faasmoe_operator.kube.types import MOEMODEL, SECRET, Object
from faasmoe_router.control.client import ControlClient, ControlTimeouts
from faasmoe_router.errors import ControlRejected, ControlUnreachable

TIMEOUT_S = 120.0
PATIENT = ControlTimeouts(TIMEOUT_S, TIMEOUT_S, TIMEOUT_S)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await work()

    asyncio.run(bounded())


@pytest.fixture
def operator(tmp_path: Path) -> TlsFolder:
    return TlsFolder(write_tls_folder(tmp_path / "operator", OPERATOR_NAME))


async def start_control_api(tls: TlsFolder) -> web.AppRunner:
    async def usage(request: web.Request) -> web.Response:
        return web.json_response({})

    app = web.Application(middlewares=[require_models_certificate])
    app.router.add_post("/models/{namespace}/{name}/v1/load", usage)
    app.add_routes(HealthRoutes(Readiness(""), lambda: b"").routes())
    return await start_server(app, host="127.0.0.1", port=0, tls=tls)


def port_of(runner: web.AppRunner) -> int:
    return int(runner.addresses[0][1])


def test_routers_reach_the_control_api_of_their_namespace(
    operator: TlsFolder, tmp_path: Path
) -> None:
    router = tls_peer(tmp_path / "router", models_name(NAMESPACE), server=OPERATOR_NAME)

    async def work() -> None:
        runner = await start_control_api(operator)
        url = f"https://127.0.0.1:{port_of(runner)}/models"
        own = ControlClient(f"{url}/{NAMESPACE}/chat", tls=router, timeouts=PATIENT)
        other = ControlClient(f"{url}/other/chat", tls=router, timeouts=PATIENT)
        try:
            await own._post("/v1/load", {})
            with pytest.raises(ControlRejected, match=r"expected one of other\.models"):
                await other._post("/v1/load", {})
            write_tls_folder(tmp_path / "operator", OPERATOR_NAME, "rotated.faasmoe.internal")
            write_tls_folder(tmp_path / "router", models_name(NAMESPACE), "r.faasmoe.internal")
            await own._post("/v1/load", {})
        finally:
            await own.close()
            await other.close()
            await runner.cleanup()

    run(work)


def test_probes_reach_the_operator_and_nobody_else_does(
    operator: TlsFolder, tmp_path: Path
) -> None:
    kubelet = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    kubelet.check_hostname, kubelet.verify_mode = False, ssl.CERT_NONE
    gateway = tls_peer(tmp_path / "gateway", GATEWAY_NAME, server="another.faasmoe.internal")

    async def work() -> None:
        runner = await start_control_api(operator)
        url = f"https://127.0.0.1:{port_of(runner)}"
        misled = ControlClient(url, tls=gateway, timeouts=PATIENT)
        try:
            async with aiohttp.ClientSession() as http:
                for path in ("/healthz", "/readyz"):
                    async with http.get(url + path, ssl=kubelet) as response:
                        assert response.status == 200
                load = f"{url}/models/{NAMESPACE}/chat/v1/load"
                async with http.post(load, json={}, ssl=kubelet) as response:
                    assert response.status == 403
                with pytest.raises(aiohttp.ClientError):
                    await http.get(f"http://127.0.0.1:{port_of(runner)}/healthz")
            with pytest.raises(ControlUnreachable, match="Hostname mismatch"):
                await misled._post("/v1/load", {})
        finally:
            await misled.close()
            await runner.cleanup()

    run(work)


async def read_file(link: ControlLink) -> bytes:
    """Return the first line that the operator sends; nothing if it ends the connection."""
    reader, writer = await link.open(limit=1 << 16)
    try:
        return await reader.readline()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def test_gateways_are_known_by_token_and_certificate(
    operator: TlsFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_server, "HELLO_TIMEOUT_S", TIMEOUT_S)
    hello = GatewayHello("token", "gateway-a", "config")
    gateway = tls_peer(tmp_path / "gateway", GATEWAY_NAME, server=OPERATOR_NAME)
    models = tls_peer(tmp_path / "models", models_name(NAMESPACE), server=OPERATOR_NAME)

    async def save(_: object) -> None:
        return

    async def work() -> None:
        leases = LeaseServer(LeaseBook((), 0.0, ledger=TenantLedger()), save)
        server = GatewayLinkServer("token", leases, GatewayLinks(), tls=operator)
        server.publish(b"{}")
        port = free_port()
        async with server.listening("127.0.0.1", port):
            address = f"127.0.0.1:{port}"
            assert await read_file(ControlLink(address, hello, tls=gateway)) == b"{}\n"
            assert await read_file(ControlLink(address, hello, tls=models)) == b""
            assert await read_file(ControlLink(address, hello)) == b""  # without TLS
            with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
                await ControlLink(address, hello, tls=TlsPeer(gateway.folder, "x")).open(limit=9)

    run(work)


class Cluster:
    """Certificates of an operator with gateways, in front of an API server in memory.

    Attributes:
        api: the API server.
        cache: the operator's cache of it.
        secrets: what writes them.
        now_s: Unix time, in seconds.
        clock_s: the monotonic clock.
    """

    def __init__(self, folder: Path) -> None:
        self.now_s, self.clock_s = time.time(), 0.0
        self.cache = ObjectCache()
        self.api = FakeKubeApi(self.cache)
        self.secrets = TlsSecrets(
            self.api,
            self.cache,
            ROOT_KEY,
            folder=folder,
            namespace="faasmoe-system",
            gateway_secret="faasmoe-gateway-tls",
            clock=lambda: self.clock_s,
            wall_clock=lambda: self.now_s,
        )

    def sync(self) -> bool:
        return asyncio.run(self.secrets.sync())

    def add_model(self, name: str, namespace: str) -> Object:
        model = make_object(MOEMODEL, name, namespace=namespace)
        self.cache.update(MOEMODEL, model)
        return model

    def written(self) -> dict[str, Object]:
        """Return the Secrets by namespace."""
        return {
            o["metadata"]["namespace"]: o
            for (k, _, _), o in self.api.objects.items()
            if k == SECRET
        }

    def n_writes(self) -> int:
        return sum(verb == "apply" for verb, _, _ in self.api.requests)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def save_files(secret: Object, folder: Path) -> TlsFolder:
    """Write what a kubelet would mount."""
    folder.mkdir()
    for name, content in secret["data"].items():
        (folder / name).write_bytes(base64.b64decode(content))
    return TlsFolder(folder)


def test_every_namespace_with_models_has_a_secret(cluster: Cluster, tmp_path: Path) -> None:
    first, second = cluster.add_model("a", "llm"), cluster.add_model("b", "llm")
    cluster.add_model("c", "other")
    assert cluster.sync()
    written = cluster.written()
    assert written.keys() == {"faasmoe-system", "llm", "other"}
    for applied in cluster.secrets._secrets():
        check_schema(applied)
    secret = written["llm"]
    assert secret["metadata"]["name"] == MODELS_TLS_SECRET
    assert secret["type"] == SECRET_TYPE
    assert secret["data"].keys() == {"tls.crt", "tls.key", "ca.crt"}
    owners = {reference["uid"] for reference in secret["metadata"]["ownerReferences"]}
    assert owners == {first["metadata"]["uid"], second["metadata"]["uid"]}
    assert "controller" not in secret["metadata"]["ownerReferences"][0]
    models, gateway = (save_files(written[ns], tmp_path / ns) for ns in ("llm", "faasmoe-system"))
    names = _names(models, TlsPeer(gateway, models_name("llm")))
    assert names == (frozenset({models_name("llm")}), frozenset({GATEWAY_NAME}))
    assert _names(TlsFolder(tmp_path), TlsPeer(models, OPERATOR_NAME))[0] == {OPERATOR_NAME}


def _names(server: TlsFolder, client: TlsPeer) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of server and client that a handshake shows."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    contexts = client.context(), server.server_context()
    one = contexts[0].wrap_bio(to_client, to_server, server_hostname=client.name)
    other = contexts[1].wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for end in (one, other):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return peer_names(one), peer_names(other)


def test_nothing_is_written_twice_until_it_is_due(cluster: Cluster) -> None:
    cluster.add_model("a", "llm")
    cluster.sync()
    before = cluster.written()["llm"]["data"]
    cluster.sync()
    assert cluster.n_writes() == 2
    cluster.now_s += CERTIFICATE_PERIOD_S
    cluster.sync()
    assert cluster.n_writes() == 4
    after = cluster.written()["llm"]["data"]
    assert after["tls.crt"] != before["tls.crt"]


def test_a_deleted_secret_is_written_again_after_a_while(cluster: Cluster) -> None:
    cluster.add_model("a", "llm")
    cluster.sync()
    cluster.api.objects.clear()
    cluster.clock_s += REWRITE_S
    cluster.sync()
    assert cluster.written().keys() == {"faasmoe-system", "llm"}


def test_models_that_are_added_and_deleted_change_the_owners(cluster: Cluster) -> None:
    first, second = cluster.add_model("a", "llm"), cluster.add_model("b", "llm")
    cluster.sync()
    cluster.cache.delete(MOEMODEL, first)
    cluster.sync()
    [owner] = cluster.written()["llm"]["metadata"]["ownerReferences"]
    assert owner["uid"] == second["metadata"]["uid"]


def test_a_namespace_that_refuses_keeps_no_other_from_its_secret(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.add_model("a", "llm")
    cluster.api.errors["apply", SECRET] = Unavailable("is away", status=503)
    assert not cluster.sync()
    assert "Secret llm/faasmoe-models-tls: not written: is away" in caplog.text
    cluster.api.errors.clear()
    assert cluster.sync()
    assert cluster.written().keys() == {"faasmoe-system", "llm"}


def test_the_operators_own_certificate_is_renewed_in_its_folder(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.secrets.write_folder()
    first = (tmp_path / "tls.crt").read_bytes()
    assert (tmp_path / "tls.key").stat().st_mode & 0o077 == 0
    cluster.now_s += CERTIFICATE_PERIOD_S
    cluster.sync()
    assert (tmp_path / "tls.crt").read_bytes() != first


IMAGES = {
    "FAASMOE_OPERATOR_ROUTER_IMAGE": "registry/router:1",
    "FAASMOE_OPERATOR_EXPERT_IMAGE": "registry/expert:1",
}


async def open_tls(api: FakeKubeApi, folders: AsyncExitStack, **settings: str) -> Any:
    env = {f"FAASMOE_OPERATOR_{name}": value for name, value in settings.items()}
    operator = Operator(OperatorConfig.from_env({**IMAGES, **env}))
    return await operator._open_tls(api, folders)  # type: ignore[arg-type]


def test_the_operator_issues_its_own_certificate_before_it_serves() -> None:
    async def work() -> None:
        api = FakeKubeApi()
        async with AsyncExitStack() as folders:
            first = await open_tls(api, folders, TLS="true")
            second = await open_tls(api, folders, TLS="true")  # another replica
            peer = TlsPeer(second.folder, OPERATOR_NAME)
            expected = frozenset({OPERATOR_NAME})
            assert _names(first.folder, peer) == (expected, expected)
            assert first.secrets is not None
            assert (await open_tls(api, folders)).folder is None

    run(work)


def test_the_operator_takes_the_certificate_of_another_issuer(tmp_path: Path) -> None:
    files = write_tls_folder(tmp_path / "issued", OPERATOR_NAME)
    settings = {"TLS": "true", "TLS_MODELS_SECRET": "issued"}

    async def work() -> None:
        async with AsyncExitStack() as folders:
            found = await open_tls(FakeKubeApi(), folders, **settings, TLS_FOLDER=str(files))
            assert found.secrets is None
            missing = str(tmp_path / "none")
            with pytest.raises(TlsFolderError, match=f"FAASMOE_OPERATOR_TLS_FOLDER: {missing}"):
                await open_tls(FakeKubeApi(), folders, **settings, TLS_FOLDER=missing)

    run(work)
