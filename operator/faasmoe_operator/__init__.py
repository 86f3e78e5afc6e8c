"""FaaSMoE's control plane: the MoEModel, the plans made from it, the platforms, the command line.

Imports neither torch nor model code; of the data plane it knows only torch-free contract modules.
"""
