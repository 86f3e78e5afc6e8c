from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from pydantic import BaseModel

from faasmoe_router.api.documented_routes import (
    DocumentedRoute,
    add_routes,
    documented_routes,
    new_router,
)


class Answer(BaseModel):
    text: str


def new_app() -> FastAPI:
    app, router = FastAPI(openapi_url=None), new_router()

    @router.get(
        "/answer/{number}", response_model=None, status_code=202, responses={202: {"model": Answer}}
    )
    async def answer(number: int) -> dict[str, str]:
        """Tell the answer."""
        return {"text": f"{number + 1}"}

    add_routes(app, [router])
    return app


def test_answers_without_having_prepared_the_documentation() -> None:
    app = new_app()
    (route,) = (r for r in app.routes if isinstance(r, APIRoute))
    assert isinstance(route, DocumentedRoute)
    with TestClient(app) as client:
        response = client.get("/answer/41")
    assert (response.status_code, response.json()) == (202, {"text": "42"})
    assert route.response_fields == {}


def test_documents_the_models_of_responses_when_asked() -> None:
    app = new_app()
    schema = get_openapi(title="", version="0", routes=documented_routes(app.routes))
    operation = schema["paths"]["/answer/{number}"]["get"]
    assert operation["description"] == "Tell the answer."
    content = operation["responses"]["202"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/Answer"}
    assert "text" in schema["components"]["schemas"]["Answer"]["properties"]


def test_an_app_with_documented_routes_has_them_in_its_schema_and_serves_them() -> None:
    app = FastAPI()
    app.router.routes.extend(documented_routes(new_app().routes))
    assert "Answer" in app.openapi()["components"]["schemas"]
    with TestClient(app) as client:
        assert client.get("/answer/1").json() == {"text": "2"}
