"""The MoEModel: what a user asks for, its defaults and its rules."""

from faasmoe_operator.spec.document import MoEModelError, load_moemodel
from faasmoe_operator.spec.moemodel import MoEModel

__all__ = ["MoEModel", "MoEModelError", "load_moemodel"]
