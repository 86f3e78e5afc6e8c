"""The MoEModel: what a user asks for, its defaults and its rules."""

from faasmoe_operator.api.v1alpha1.moemodel import MoEModel, load_moemodel
from faasmoe_operator.errors import MoEModelError

__all__ = ["MoEModel", "MoEModelError", "load_moemodel"]
