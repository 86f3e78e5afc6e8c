"""The gateway over several models: who may call which, within which limits and budgets."""

from __future__ import annotations

import asyncio
import gzip
import json
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.gateway.fake_router import Answer, FakeRouter, die, reply, stream

from faasmoe_contracts.gateway_file import (
    BudgetEntry,
    GatewayFile,
    LimitsEntry,
    ModelEntry,
    PricesEntry,
    RouterEntry,
    TenantEntry,
    TenantModelEntry,
)
from faasmoe_contracts.stream_records import EVENT, pack_record
from faasmoe_contracts.tenant_usage import Usage
from faasmoe_gateway.accounts import Accounts
from faasmoe_gateway.front import Front
from faasmoe_gateway.metrics import FAILED, GATEWAY_ERROR, GatewayMetrics
from faasmoe_gateway.tenant_directory import TenantDirectory

NOON = 1_795_608_000.0
ANSWER = reply(b'{"ok":1}', x_faasmoe_input_tokens=10, x_faasmoe_output_tokens=5)


class System:
    """Two models, a and b, each with a router, and tenants; the clock stands still.

    Attributes:
        now_s: the time of both clocks.
        metrics: what is counted.
        before_body: called before a body is there.
    """

    def __init__(self, folder: Path, *tenants: TenantEntry, answers: tuple[Answer, ...]) -> None:
        self.now_s = NOON
        self.folder = folder
        self.routers = {n: FakeRouter(folder / f"{n}.sock", *answers) for n in ("a", "b")}
        models = tuple(
            ModelEntry(n, f"org/{n}", 100, (RouterEntry("r", str(folder / f"{n}.sock")),))
            for n in self.routers
        )
        file = GatewayFile.loads(GatewayFile(models, tenants).dumps())
        assert file == GatewayFile(models, tenants)
        self.directory = TenantDirectory(file, NOON)
        self.accounts = Accounts(file.tenants, folder / "usage.json", 0.0)
        self.metrics = GatewayMetrics()
        self.before_body: Callable[[], None] = lambda: None
        self.front = Front(
            self.directory,
            self.accounts,
            front_token="secret",
            hold_timeout_s=0.1,
            metrics=self.metrics,
            clock=lambda: self.now_s - NOON,
            wall_clock=lambda: self.now_s,
        )

    async def call(
        self, body: Any = None, *, key: str = "", path: str = "/v1/completions", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent: list[dict[str, Any]] = []
        incoming = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if incoming:
                self.before_body()
            return incoming.pop(0) if incoming else await asyncio.Future()

        async def send(message: Any) -> None:
            sent.append(dict(message))

        fields = {"content-length": str(len(content)), "authorization": f"Bearer {key}", **headers}
        scope = {
            "type": "http",
            "method": "GET" if body is None else "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(n.replace("_", "-").encode(), v.encode()) for n, v in fields.items()],
        }
        await self.front(scope, receive, send)
        seen = {n.decode(): v.decode() for n, v in sent[0]["headers"]}
        return sent[0]["status"], seen, b"".join(m.get("body", b"") for m in sent)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gw-") as name:  # tmp_path may be too long
        yield Path(name)


def tenant(folder: Path, name: str, *models: TenantModelEntry, **fields: Any) -> TenantEntry:
    keys = folder / f"keys-{name}"
    keys.mkdir()
    (keys / "first").write_text(f"key-{name}\n")
    return TenantEntry(name, str(keys), models, **fields)


def run(system: System, work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(120), AsyncExitStack() as stack:
            for router in system.routers.values():
                await stack.enter_async_context(router)
            await work()

    asyncio.run(bounded())


def error(body: bytes) -> dict[str, Any]:
    return dict(json.loads(body)["error"])


A, B = TenantModelEntry("a", alias="mine"), TenantModelEntry("b")


def test_model_chooses_the_router_which_gets_the_tenant_instead_of_its_key(folder: Path) -> None:
    system = System(folder, tenant(folder, "acme", A, B), answers=(ANSWER,))

    async def work() -> None:
        for name in ("org/a", "mine", "org/b"):
            status, _, body = await system.call({"model": name, "prompt": "x"}, key="key-acme")
            assert (status, body) == (200, b'{"ok":1}')
        assert [len(router.requests) for router in system.routers.values()] == [2, 1]
        request = system.routers["a"].requests[0]
        assert b"x-faasmoe-tenant: acme\r\n" in request
        assert b"key-acme" not in request

    run(system, work)


def test_host_of_a_tenant_is_for_its_keys_alone(folder: Path) -> None:
    acme = tenant(folder, "acme", A, host="acme.example.com")
    system = System(folder, acme, tenant(folder, "beta", A), answers=(ANSWER,))

    async def work() -> None:
        seen = {}
        for key in ("acme", "beta"):
            for host in ("Acme.example.com:8000", "other.example.com", "[::1]:8000"):
                call = system.call({"model": "org/a"}, key=f"key-{key}", host=host)
                seen[key, host[:5]] = (await call)[0]
        assert seen == {
            **{("acme", host): 200 for host in ("Acme.", "other", "[::1]")},
            **{("beta", host): 200 for host in ("other", "[::1]")},
            ("beta", "Acme."): 401,
        }

    run(system, work)


def test_path_of_a_tenant_is_taken_off(folder: Path) -> None:
    system = System(folder, tenant(folder, "acme", A), answers=(ANSWER,))

    async def work() -> None:
        status, _, _ = await system.call(
            {"model": "mine"}, key="key-acme", path="/acme/v1/completions"
        )
        assert status == 200
        assert system.routers["a"].requests[0].startswith(b"POST /v1/completions HTTP/1.1\r\n")
        status, _, _ = await system.call(
            {"model": "mine"}, key="key-acme", path="/other/v1/completions"
        )
        assert status == 401

    run(system, work)


def test_tenants_see_their_models_only(folder: Path) -> None:
    beta = tenant(folder, "beta", B)
    system = System(folder, tenant(folder, "acme", A, B), beta, answers=(ANSWER,))

    async def work() -> None:
        for key, names in (("key-acme", ["org/a", "mine", "org/b"]), ("key-beta", ["org/b"])):
            _, _, body = await system.call(key=key, path="/v1/models")
            assert [card["id"] for card in json.loads(body)["data"]] == names
        unknown = await system.call({"model": "nothing"}, key="key-beta")
        forbidden = await system.call({"model": "org/a"}, key="key-beta")
        assert unknown[0] == forbidden[0] == 404
        assert (
            error(unknown[2])["message"].replace("nothing", "org/a")
            == (error(forbidden[2])["message"])
        )
        assert (await system.call(key="key-beta", path="/v1/models/org/a"))[0] == 404
        assert not system.routers["a"].requests

    run(system, work)


@pytest.mark.parametrize("key", ["", "wrong", "key-acme "[:-2]])
def test_wrong_key_is_refused(folder: Path, key: str) -> None:
    system = System(folder, tenant(folder, "acme", A), answers=(ANSWER,))

    async def work() -> None:
        status, headers, body = await system.call({"model": "mine"}, key=key)
        assert (status, error(body)["code"]) == (401, "invalid_api_key")
        assert headers["www-authenticate"] == "Bearer"

    run(system, work)


def test_key_expires_and_new_ones_are_found(folder: Path) -> None:
    acme = tenant(folder, "acme", A, key_expiry={"first": NOON + 10})
    system = System(folder, acme, answers=(ANSWER,))

    async def work() -> None:
        assert (await system.call({"model": "mine"}, key="key-acme"))[0] == 200
        (folder / "keys-acme" / "second").write_text("new")
        system.directory.refresh(NOON + 10)
        assert (await system.call({"model": "mine"}, key="key-acme"))[0] == 401
        assert (await system.call({"model": "mine"}, key="new"))[0] == 200

    run(system, work)


def test_tenant_without_a_key_leaves_others_alone(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = TenantEntry("gone", str(folder / "nowhere"), (A,))
    system = System(folder, gone, tenant(folder, "acme", A), answers=(ANSWER,))
    assert "gone: no key in" in caplog.text

    async def work() -> None:
        assert (await system.call({"model": "mine"}, key="key-acme"))[0] == 200

    run(system, work)


def test_key_of_two_tenants_is_nobodys(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    acme, beta = tenant(folder, "acme", A), tenant(folder, "beta", B)
    (folder / "keys-beta" / "copy").write_text("key-acme")
    system = System(folder, acme, beta, answers=(ANSWER,))
    assert "1 keys belong to several tenants" in caplog.text

    async def work() -> None:
        assert (await system.call({"model": "mine"}, key="key-acme"))[0] == 401
        assert (await system.call({"model": "org/b"}, key="key-beta"))[0] == 200

    run(system, work)


def test_without_tenants_everyone_may_use_every_model(folder: Path) -> None:
    system = System(folder, answers=(ANSWER,))

    async def work() -> None:
        assert (await system.call({"model": "org/b"}))[0] == 200
        assert b"x-faasmoe-tenant" not in system.routers["b"].requests[0]
        assert (await system.call({"prompt": "x"}))[0] == 400  # which of the two?

    run(system, work)


def test_limits_hold_over_all_models(folder: Path) -> None:
    acme = tenant(folder, "acme", A, B, limits=LimitsEntry(requests=3))
    system = System(folder, acme, answers=(ANSWER,))

    async def work() -> None:
        statuses = [
            (await system.call({"model": name}, key="key-acme"))[0]
            for name in ("mine", "org/b", "mine", "org/b")
        ]
        assert statuses == [200, 200, 200, 429]
        system.now_s += 20
        assert (await system.call({"model": "org/b"}, key="key-acme"))[0] == 200

    run(system, work)


def test_tokens_are_held_and_unused_ones_returned(folder: Path) -> None:
    acme = tenant(folder, "acme", A, limits=LimitsEntry(tokens=200))
    system = System(folder, acme, answers=(ANSWER,))
    body = {"model": "mine", "max_tokens": 50}

    async def work() -> None:
        _, headers, _ = await system.call(body, key="key-acme")
        held = 50 + len(json.dumps(body))
        assert headers["x-ratelimit-limit-tokens"] == "200"
        assert headers["x-ratelimit-remaining-tokens"] == str(200 - held)
        _, headers, _ = await system.call(body, key="key-acme")
        assert headers["x-ratelimit-remaining-tokens"] == str(200 - 15 - held)

    run(system, work)


@pytest.mark.parametrize(
    ("path", "fields", "n_output"),
    [
        ("/v1/chat/completions", {"max_completion_tokens": 50}, 50),
        ("/v1/responses", {"max_output_tokens": 50}, 50),
        ("/v1/messages", {"max_tokens": 50}, 50),
        ("/v1/completions", {}, 16),  # its default
        ("/v1/chat/completions", {}, 100),  # the context
    ],
)
def test_tokens_of_every_api_are_held_and_counted(
    folder: Path, path: str, fields: dict[str, Any], n_output: int
) -> None:
    acme = tenant(folder, "acme", A, limits=LimitsEntry(tokens=300))
    system = System(folder, acme, answers=(ANSWER,))
    body = {"model": "mine", **fields}

    async def work() -> None:
        _, headers, _ = await system.call(body, key="key-acme", path=path)
        held = n_output + len(json.dumps(body))
        assert headers["x-ratelimit-remaining-tokens"] == str(300 - held)
        (day,) = system.accounts.of("acme").usage.days.values()
        assert day == {"a": Usage(1, 10, 5, 0.0)}

    run(system, work)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_limit_is_refused_in_the_form_of_the_api(folder: Path, path: str) -> None:
    acme = tenant(folder, "acme", A, limits=LimitsEntry(requests=1))
    system = System(folder, acme, tenant(folder, "beta", B), answers=(ANSWER,))

    async def work() -> None:
        assert (await system.call({"model": "mine"}, key="key-acme", path=path))[0] == 200
        status, headers, body = await system.call({"model": "mine"}, key="key-acme", path=path)
        assert (status, headers["retry-after"]) == (429, "60")
        kind = {"/v1/responses": "rate_limit_error", "/v1/messages": "rate_limit_error"}[path]
        assert error(body)["type"] == kind
        assert ("type" in json.loads(body)) == (path == "/v1/messages")
        status, _, body = await system.call({"model": "mine"}, key="key-beta", path=path)
        assert status == 404

    run(system, work)


def test_tokens_of_a_refused_request_come_back(folder: Path) -> None:
    acme = tenant(folder, "acme", A, limits=LimitsEntry(tokens=200, output_tokens=100))
    system = System(folder, acme, answers=(reply(b"{}", status=400),))

    async def work() -> None:
        for _ in range(5):
            status, _, _ = await system.call({"model": "mine", "max_tokens": 90}, key="key-acme")
            assert status == 400
        status, _, body = await system.call(
            {"model": "mine", "max_tokens": 90, "n": 2}, key="key-acme"
        )
        assert error(body)["param"] == "max_tokens"
        assert len(system.routers["a"].requests) == 5

    run(system, work)


def test_stream_counts_its_tokens_once_though_its_router_dies(folder: Path) -> None:
    first = pack_record(EVENT, b"origin\n", b"data: 1\n\n", 3)
    second = pack_record(EVENT, b"more\n", b"data: 2\n\n", 4)
    prices = PricesEntry("EUR", 1e6, 1e5)
    system = System(
        folder,
        tenant(folder, "acme", A, prices=prices),
        answers=(stream(first, is_whole=False, n_input=7), die, stream(second, n_input=7)),
    )

    async def work() -> None:
        status, headers, body = await system.call({"model": "mine", "stream": True}, key="key-acme")
        assert (status, body) == (200, b"data: 1\n\ndata: 2\n\n")
        assert not any(name.startswith("x-faasmoe") for name in headers)
        (day,) = system.accounts.of("acme").usage.days.values()
        assert day == {"a": Usage(1, 7, 7, day["a"].money)}
        assert day["a"].money == pytest.approx(7.7)

    run(system, work)


def test_usage_is_told_and_survives_a_restart(folder: Path) -> None:
    acme = tenant(folder, "acme", A)
    system = System(folder, acme, answers=(ANSWER,))

    async def work() -> None:
        await system.call({"model": "mine"}, key="key-acme")
        _, _, body = await system.call(key="key-acme", path="/v1/usage")
        used = {"requests": 1, "input_tokens": 10, "output_tokens": 5, "cost": 0.0}
        assert json.loads(body) == {
            "object": "usage",
            "tenant": "acme",
            "day": used,
            "month": used,
        }
        content = system.accounts.changed(NOON)
        assert content is not None
        system.accounts.write(content)
        assert system.accounts.changed(NOON) is None

    run(system, work)
    again = Accounts([acme], folder / "usage.json", 0.0)
    assert again.of("acme").usage.in_period(NOON, "day").input_tokens == 10


def test_budget_warns_and_then_refuses_until_its_period_ends(folder: Path) -> None:
    acme = tenant(folder, "acme", A, budgets=(BudgetEntry("outputTokens", "day", 10, 50),))
    system = System(folder, acme, answers=(ANSWER,))

    async def work() -> None:
        seen = [await system.call({"model": "mine"}, key="key-acme") for _ in range(3)]
        assert [status for status, _, _ in seen] == [200, 200, 429]
        assert "x-faasmoe-budget" not in seen[0][1]
        assert seen[1][1]["x-faasmoe-budget"] == "50% of 10 outputTokens per day"
        assert error(seen[2][2])["code"] == "budget_exceeded"
        system.now_s += float(seen[2][1]["retry-after"])
        assert (await system.call({"model": "mine"}, key="key-acme"))[0] == 200

    run(system, work)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        pytest.param(b"[]", {}, 400, id="no-object"),
        pytest.param(b'{"model": 1}', {}, 400, id="model-is-no-text"),
        pytest.param(b"{}", {"content_encoding": "br"}, 415, id="encoding"),
        pytest.param(b"{}", {"content_encoding": "gzip"}, 400, id="not-in-its-encoding"),
        pytest.param(gzip.compress(b" " * (9 << 20)), {"content_encoding": "gzip"}, 413, id="bomb"),
        pytest.param(b" " * (9 << 20), {}, 413, id="too-large"),
        pytest.param(
            gzip.compress(b'{"model":"mine"}'), {"content_encoding": "gzip"}, 200, id="compressed"
        ),
    ],
)
def test_bodies_are_checked(
    folder: Path, body: bytes, headers: dict[str, str], status: int
) -> None:
    system = System(folder, tenant(folder, "acme", A, B), answers=(ANSWER,))

    async def work() -> None:
        assert (await system.call(body, key="key-acme", **headers))[0] == status

    run(system, work)


def test_refusals_of_messages_have_anthropics_form(folder: Path) -> None:
    system = System(folder, tenant(folder, "acme", A), answers=(ANSWER,))

    async def work() -> None:
        _, _, body = await system.call({"model": "x"}, x_api_key="key-acme", path="/v1/messages")
        assert json.loads(body)["error"]["type"] == "authentication_error"

    run(system, work)


def test_router_that_does_not_know_a_tenant_yet_is_no_wrong_key(folder: Path) -> None:
    unknown = reply(b'{"error":{"code":"invalid_api_key"}}', status=401)
    system = System(folder, tenant(folder, "acme", A), answers=(unknown,))

    async def work() -> None:
        status, headers, body = await system.call({"model": "mine"}, key="key-acme")
        assert (status, headers["retry-after"]) == (503, "1")
        assert b"does not know this tenant yet" in body

    run(system, work)


def test_fault_of_the_gateway_is_no_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = System(folder, tenant(folder, "acme", A), answers=(ANSWER,))

    def fail(_: str) -> None:
        raise RuntimeError

    monkeypatch.setattr(system.accounts, "of", fail)

    async def work() -> None:
        with pytest.raises(RuntimeError):
            await system.call({"model": "mine"}, key="key-acme")

    run(system, work)
    labels = {"tenant": "acme", "outcome": FAILED, "reason": GATEWAY_ERROR}
    name = "faasmoe_gateway_tenant_requests_total"
    assert system.metrics.registry.get_sample_value(name, labels) == 1


def test_models_and_tenants_are_replaced_while_it_runs(folder: Path) -> None:
    limits = LimitsEntry(requests=60)
    acme = tenant(folder, "acme", A, limits=limits)
    beta = tenant(folder, "beta", B)
    system = System(folder, acme, answers=(ANSWER,))
    models = tuple(system.directory.models.values())

    async def work() -> None:
        async def status(key: str, model: str) -> int:
            found, _, _ = await system.call({"model": model, "prompt": "x"}, key=f"key-{key}")
            return found

        assert [await status("acme", "mine"), await status("beta", "org/b")] == [200, 401]
        account = system.accounts.of("acme")
        system.front.configure(GatewayFile(models, (acme, beta)))
        assert [await status("acme", "mine"), await status("beta", "org/b")] == [200, 200]
        assert system.accounts.of("acme") is account  # with what it has used
        assert account.limiter.buckets["requests"].available(0.0) == 58
        system.front.configure(GatewayFile(models[1:], (beta,)))
        assert [await status("acme", "mine"), await status("beta", "org/b")] == [401, 200]
        closed = GatewayFile(models, (), is_closed=True)
        system.before_body = partial(system.front.configure, closed)
        assert await status("beta", "org/b") == 401  # its key was valid when the request began
        assert await status("", "org/b") == 401  # nobody may call, not everybody

    run(system, work)
