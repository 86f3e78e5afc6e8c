"""The control plane's HTTP API: routing table, load and usage reports, activation, status."""

from faasmoe_operator.control.api.app import make_model_app, make_models_app
from faasmoe_operator.control.api.status import render_models_metrics

__all__ = ["make_model_app", "make_models_app", "render_models_metrics"]
