"""Expert functions: a block of experts, mapped from a store, that computes frames.

Knows stores, torch and the wire's values; knows nothing of HTTP or of who calls.
"""

from faasmoe_expert.functions.function import ExpertFunction
from faasmoe_expert.functions.kernels import KernelSpec, RoutedPairs, gated_per_pair, gated_reduced

__all__ = ["ExpertFunction", "KernelSpec", "RoutedPairs", "gated_per_pair", "gated_reduced"]
