"""CPU kernels for weights as they lie in a store: a C++ library behind ctypes, without torch.

Compiled when the package is installed, if a C++ compiler is present (`kernels/hatch_build.py`).
`load` returns the library, or raises KernelsUnavailable with the reason; callers then use torch,
which is slower.
"""

from faasmoe_kernels.library import (
    ABI_VERSION,
    MATRIX_BYTES,
    Activation,
    Gating,
    KernelDtype,
    KernelError,
    KernelLibrary,
    KernelsUnavailable,
    MappingGuard,
    Matrix,
    ParameterDtype,
    Scheme,
    describe_cpu_kernels,
    load,
    matrix_table,
)

__all__ = [
    "ABI_VERSION",
    "MATRIX_BYTES",
    "Activation",
    "Gating",
    "KernelDtype",
    "KernelError",
    "KernelLibrary",
    "KernelsUnavailable",
    "MappingGuard",
    "Matrix",
    "ParameterDtype",
    "Scheme",
    "describe_cpu_kernels",
    "load",
    "matrix_table",
]
