"""The MoEModel API, version v1alpha1: its fields, defaults and validation rules."""

from faasmoe_operator.api.v1alpha1.moemodel import MoEModel, load_moemodel
from faasmoe_operator.errors import MoEModelError

__all__ = ["MoEModel", "MoEModelError", "load_moemodel"]
