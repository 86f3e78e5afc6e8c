"""The keys in Secrets: digests only, read again and again."""

from __future__ import annotations

import asyncio
import base64

from fake_kube_api import FakeKubeApi
from kube_objects import make_object

from faasmoe_contracts.api_keys import key_digest
from faasmoe_operator.kube.errors import Forbidden
from faasmoe_operator.kube.tenants.secret_keys import READ_INTERVAL_S, SecretKeys, parse_secret
from faasmoe_operator.kube.types import SECRET, Object

REFERENCE = ("llm", "keys")


def secret(**values: str) -> Object:
    data = {name: base64.b64encode(value.encode()).decode() for name, value in values.items()}
    return make_object(SECRET, "keys", data=data)


def test_keys_are_digests_without_line_breaks() -> None:
    state = parse_secret(secret(first="sk-1\n", second="sk-2"))
    assert state.digests == {
        "first": key_digest("sk-1").hex(),
        "second": key_digest("sk-2").hex(),
    }
    assert "sk-1" not in repr(state)


def test_bad_entries_are_named_and_others_stay() -> None:
    state = parse_secret(secret(empty="", good="sk-1", long="x" * 9000))
    assert sorted(state.digests) == ["good"]
    assert [problem.partition(":")[0] for problem in state.problems] == ["empty", "long"]
    assert parse_secret(secret(**{f"k{n}": "x" for n in range(101)})).problems
    assert parse_secret(None).is_missing


def test_secrets_are_read_at_once_and_then_now_and_then() -> None:
    async def work() -> None:
        api = FakeKubeApi()
        keys = SecretKeys(api)
        await keys.refresh({REFERENCE}, 0.0)
        assert keys.states[REFERENCE].is_missing
        api.write(secret(a="sk-1"))
        await keys.refresh({REFERENCE}, 1.0)
        assert keys.states[REFERENCE].is_missing  # not due yet
        await keys.refresh({REFERENCE}, READ_INTERVAL_S)
        assert sorted(keys.states[REFERENCE].digests) == ["a"]
        await keys.refresh((), 2 * READ_INTERVAL_S)
        assert keys.states == {}

    asyncio.run(work())


def test_a_secret_that_cannot_be_read_keeps_its_keys() -> None:
    async def work() -> None:
        api = FakeKubeApi()
        api.write(secret(a="sk-1"))
        keys = SecretKeys(api)
        await keys.refresh({REFERENCE}, 0.0)
        api.errors["get", SECRET] = Forbidden("no", status=403, reason="Forbidden")
        await keys.refresh({REFERENCE}, READ_INTERVAL_S)
        state = keys.states[REFERENCE]
        assert sorted(state.digests) == ["a"]
        assert state.problems == ("cannot be read (Forbidden)",)

    asyncio.run(work())
