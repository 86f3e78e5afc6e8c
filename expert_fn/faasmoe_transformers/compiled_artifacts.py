"""Lets vLLM load compiled code that it has saved for a CPU.

Code that vLLM has loaded finishes by a method of vLLM's own class of compiled code. On a CPU vLLM
saves torch's class, which is complete once it is loaded and has no such method: without one, vLLM
compiles again at each start.
"""

from __future__ import annotations

from typing import Any

from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable

_FINISH = "finalize_loading"


def make_loadable() -> None:
    """Give torch's class of compiled code the method that vLLM calls, unless it has one."""
    kind: Any = BundledAOTAutogradSerializableCallable
    if _FINISH not in vars(kind):
        setattr(kind, _FINISH, _finish_loading)


def _finish_loading(_: object, __: object) -> None:
    """Do nothing: the code is complete."""
