"""The control plane's HTTP API for routers, `faasmoe top` and the live page."""

from faasmoe_operator.control.api.app import make_machine_app, make_model_app, make_models_app
from faasmoe_operator.control.api.live_page import LivePage
from faasmoe_operator.control.api.status import render_models_metrics

__all__ = [
    "LivePage",
    "make_machine_app",
    "make_model_app",
    "make_models_app",
    "render_models_metrics",
]
