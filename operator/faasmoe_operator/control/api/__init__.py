"""The control API: function table, load reports, wakes and status over HTTP."""

from faasmoe_operator.control.api.app import make_app, models_app
from faasmoe_operator.control.api.exposition import models_metrics

__all__ = ["make_app", "models_app", "models_metrics"]
