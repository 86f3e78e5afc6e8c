"""Routes that make their documentation when the schema is asked for.

FastAPI prepares the models of a route's responses when it is added, and again when its router is
included: 30 ms for all of this API, which a router that starts for a waiting request cannot spare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute


class DocumentedRoute(APIRoute):
    """A route that knows no models of its responses until `documented` is called.

    Args:
        path: its path.
        endpoint: its handler.
        responses: the documentation of its responses, with their models.
        settings: all other settings of a route.
    """

    def __init__(
        self,
        path: str,
        endpoint: Callable[..., Any],
        *,
        responses: dict[int | str, dict[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(path, endpoint, **settings)
        self._settings = {**settings, "responses": responses}

    def documented(self) -> APIRoute:
        """Return the same route with the models of its responses."""
        return APIRoute(self.path, self.endpoint, **self._settings)


def new_router() -> APIRouter:
    """Return a router for documented routes."""
    return APIRouter(route_class=DocumentedRoute)


def add_routes(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Add the routes of routers without prefix or dependencies to an app, as they are."""
    for router in routers:
        app.router.routes.extend(router.routes)


def documented_routes(routes: Iterable[BaseRoute]) -> list[BaseRoute]:
    """Return routes with the models of their responses."""
    return [r.documented() if isinstance(r, DocumentedRoute) else r for r in routes]
