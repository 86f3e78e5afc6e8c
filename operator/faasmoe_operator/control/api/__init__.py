"""The control API: function table, load reports, wakes and status over HTTP."""

from faasmoe_operator.control.api.app import make_app

__all__ = ["make_app"]
