"""FaaSMoE's control plane: API types, planning, autoscaling, platforms, operator and command line.

Imports neither torch nor model code. It shares only `faasmoe_contracts` with the data plane.
"""
