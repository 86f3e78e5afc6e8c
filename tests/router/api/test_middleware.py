import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from faasmoe_router.api.middleware import RequestContextMiddleware


def _get(app: FastAPI, path: str) -> httpx.Response:
    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            return await client.get(path)

    return asyncio.run(get())


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    app.add_middleware(RequestContextMiddleware, max_body_bytes=10)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("an internal detail")

    @app.get("/half")
    async def half() -> StreamingResponse:
        async def body() -> Any:
            yield b"half"
            raise RuntimeError("an internal detail")

        return StreamingResponse(body())

    return app


def test_exception_becomes_a_500_without_internals(
    app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    response = _get(app, "/broken")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "internal detail" not in response.text
    assert response.headers["x-request-id"] in caplog.text
    assert "an internal detail" in caplog.text


def test_exception_after_the_response_started_propagates(app: FastAPI) -> None:
    with pytest.raises(RuntimeError, match="an internal detail"):
        _get(app, "/half")
