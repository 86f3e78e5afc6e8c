"""Expert functions: a block of experts, mapped from a store, that computes frames.

Knows stores, torch and the wire's values; knows nothing of HTTP or of who calls.
"""

from faasmoe_expert.functions.function import ExpertFunction
from faasmoe_expert.functions.kernels import KernelSpec, run_gated, sum_gated
from faasmoe_expert.functions.pairs import Pairs

__all__ = ["ExpertFunction", "KernelSpec", "Pairs", "run_gated", "sum_gated"]
