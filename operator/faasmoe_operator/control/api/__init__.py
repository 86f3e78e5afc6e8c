"""The control API: function table, load reports, wakes and status over HTTP."""

from faasmoe_operator.control.api.app import make_model_app, make_models_app
from faasmoe_operator.control.api.status import render_models_metrics

__all__ = ["make_model_app", "make_models_app", "render_models_metrics"]
