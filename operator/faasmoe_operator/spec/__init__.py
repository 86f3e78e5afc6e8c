"""The MoEModel: what a user asks for, its defaults and its rules."""

from faasmoe_operator.errors import MoEModelError
from faasmoe_operator.spec.document import load_moemodel
from faasmoe_operator.spec.moemodel import MoEModel

__all__ = ["MoEModel", "MoEModelError", "load_moemodel"]
