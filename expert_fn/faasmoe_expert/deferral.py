"""Modules of torch that a sandbox does not need: made when something first looks into them.

`import torch` runs `torch._meta_registrations`, which imports torch's decompositions and registers
a Python kernel for each operation on meta tensors: 18 MB and a fourth of the import's time.
Computing a frame never sees a meta tensor; building a family's own module does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Leaves only: a package that is made late may find itself half made by its own submodules.
DEFERRED = ("torch._meta_registrations",)
_HOOK = "__getattr__"


class _LateLoader(Loader):
    """Leaves a module empty until an attribute of it is asked for."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        def make_and_get(name: str) -> Any:
            # What looks at every module, as `inspect` does, asks for such names only.
            if not name.startswith("__"):
                self.make(module)
            if name not in vars(module):
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return vars(module)[name]

        setattr(module, _HOOK, make_and_get)

    def make(self, module: ModuleType) -> None:
        """Run the module's code, unless that was done."""
        if vars(module).pop(_HOOK, None) is not None:
            self._loader.exec_module(module)


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in DEFERRED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _LateLoader(spec.loader)
        return spec


def defer_imports() -> None:
    """Leave out what is DEFERRED from now on; has no effect on what is imported already."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def import_deferred() -> None:
    """Make the modules that were left out until now."""
    for module in (sys.modules[name] for name in DEFERRED if name in sys.modules):
        if module.__spec__ is not None and isinstance(module.__spec__.loader, _LateLoader):
            module.__spec__.loader.make(module)
