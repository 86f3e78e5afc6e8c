"""The app's OpenAPI schema documents OpenAI-shaped errors and none of FastAPI's 422 responses."""

from typing import Any

import httpx
import pytest

ERROR = {"$ref": "#/components/schemas/ErrorResponse"}


@pytest.fixture(scope="module")
def schema(server: tuple[str, Any]) -> dict[str, Any]:
    response: dict[str, Any] = httpx.get(f"{server[0]}/openapi.json", timeout=60).json()
    return response


def _operations(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method} {path}": operation
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    }


def test_every_error_has_openai_schema(schema: dict[str, Any]) -> None:
    operations = _operations(schema)
    assert len(operations) > 12
    for operation in operations.values():
        errors = {s: r for s, r in operation["responses"].items() if int(s) >= 400}
        assert "500" in errors
        assert "422" not in errors
        assert all(r["content"]["application/json"]["schema"] == ERROR for r in errors.values())
    assert not [name for name in schema["components"]["schemas"] if "Validation" in name]


def test_completion_documents_all_responses(schema: dict[str, Any]) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        responses = _operations(schema)[f"post {path}"]["responses"]
        assert set(responses) == {"200", "400", "404", "413", "429", "500", "503"}
        assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
        assert all("Retry-After" in responses[status]["headers"] for status in ("429", "503"))


def test_unimplemented_endpoint_documents_no_success(schema: dict[str, Any]) -> None:
    responses = _operations(schema)["post /v1/embeddings"]["responses"]
    assert set(responses) == {"413", "500", "501", "503"}


def test_schema_has_no_security_without_tenants(schema: dict[str, Any]) -> None:
    operations = _operations(schema).values()
    assert not any("401" in operation["responses"] for operation in operations)
    assert "securitySchemes" not in schema["components"]
