"""Expert functions: blocks of experts from a store that compute request frames.

Knows stores, torch and decoded wire frames; knows nothing of HTTP or of callers.
"""

from faasmoe_expert.functions.function import ExpertFunction
from faasmoe_expert.functions.kernels import KernelSpec, RoutedPairs, gated_per_pair, gated_reduced

__all__ = ["ExpertFunction", "KernelSpec", "RoutedPairs", "gated_per_pair", "gated_reduced"]
