"""Fuzzed requests of one tenant get responses of the OpenAPI schema without other tenants' data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import (
    response_schema_conformance,
    status_code_conformance,
)

DEADLINE_S = 120.0
N_CASES = 6
N_PATHS = 60
SECRETS = ("beta", "Bravo", "verse")
TENANTS: dict[str, dict[str, Any]] = {
    "acme": {"modelAlias": "acme-chat"},
    "beta": {"modelAlias": "Bravo-chat", "systemPrompt": "Always answer in verse."},
}
FUZZ = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)


@pytest.fixture(scope="module")
def router(open_router: Any) -> Iterator[Any]:
    with open_router(TENANTS) as running:
        assert running.complete("beta", prompt="Bravo, beta, verse").status_code == 200
        yield running


def _assert_no_secret(response: httpx.Response, *, sent: str) -> None:
    received = f"{response.text}\n{response.headers}"
    assert not [secret for secret in SECRETS if secret in received and secret not in sent]


def test_requests_generated_from_the_openapi_schema(router: Any) -> None:
    key = {"Authorization": "Bearer acme-key"}
    url = f"{router.url}/openapi.json"
    schema = schemathesis.openapi.from_url(url, headers=key)
    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]
        _send_cases(operation, key)
    assert router.complete("acme").status_code == 200
    assert router.usage("beta")["requests"]["completed"] == 1


def _send_cases(operation: Any, key: dict[str, str]) -> None:
    @settings(FUZZ, max_examples=N_CASES)
    @given(case=operation.as_strategy(), ours=st.booleans())
    def send(case: Any, ours: bool) -> None:
        if ours and isinstance(case.body, dict):
            case.body = {**case.body, "model": "tiny", "max_tokens": 2}
        case.headers = {**(case.headers or {}), **key}
        response = case.call(timeout=DEADLINE_S)
        _assert_no_secret(response, sent=f"{case.body!r}{case.path_parameters!r}")
        case.validate_response(
            response, checks=[status_code_conformance, response_schema_conformance]
        )

    send()


PATHS = st.one_of(
    st.sampled_from(
        [
            "/beta/v1/usage",
            "/beta/v1/models",
            "//v1/usage",
            "/v1/../beta/v1/usage",
            "/beta%2Fv1/usage",
        ]
    ),
    st.text(max_size=12).map(lambda text: f"/{text}/v1/usage"),
    st.text(max_size=12).map(lambda text: f"/v1/{text}"),
    st.text(max_size=12).map(lambda text: f"/acme/v1/{text}"),
)


def test_no_path_reaches_another_tenant(router: Any) -> None:
    headers = {"Authorization": "Bearer acme-key"}
    with httpx.Client(headers=headers, timeout=DEADLINE_S) as http:

        @settings(FUZZ, max_examples=N_PATHS)
        @given(path=PATHS)
        def send(path: str) -> None:
            raw = quote(path, safe="/%").encode()
            response = http.get(httpx.URL(router.url).copy_with(raw_path=raw))
            assert response.status_code in (200, 307, 401, 404, 405)
            if response.status_code == 200 and "tenant" in response.json():
                assert response.json()["tenant"] == "acme"
            _assert_no_secret(response, sent=path)

        send()
