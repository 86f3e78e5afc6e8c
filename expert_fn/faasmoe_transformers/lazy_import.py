"""Defers the execution of modules that torch imports but that a process may never use.

A deferred module is created empty and executed when an attribute of it is first accessed. This
module imports only the standard library, so that it can run before torch is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

META_REGISTRATIONS = "torch._meta_registrations"
"""Imported by torch: its decompositions, and a Python kernel for each operation on meta tensors.

18 MB and a quarter of the import time. Computing a frame uses no meta tensor; building a family's
own module does.
"""

_MODULE_GETATTR = "__getattr__"


def defer_import(name: str, preset_attributes: Mapping[str, object] | None = None) -> None:
    """Defer a module from now on; has no effect if it is already imported.

    A package should be deferred only with preset attributes for all that its own submodules access:
    otherwise it is executed in the middle of one of them, which is then only half executed.

    Args:
        name: name of the module.
        preset_attributes: attributes available before the module is executed.
    """
    if not any(isinstance(finder, _LazyFinder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _LazyFinder(name, preset_attributes or {}))


def load_deferred(name: str) -> None:
    """Execute a module if it was deferred and has not been executed."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if spec is not None and isinstance(spec.loader, _LazyLoader):
        spec.loader.load(sys.modules[name])


class _LazyLoader(Loader):
    """Creates a module with preset attributes only, until another attribute is accessed."""

    def __init__(self, loader: Loader, preset_attributes: Mapping[str, object]) -> None:
        self._loader = loader
        self._preset_attributes = preset_attributes

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        def load_and_get(name: str) -> Any:
            # Code that visits every module, such as `inspect`, accesses only dunder names.
            if not name.startswith("__"):
                self.load(module)
            if name not in vars(module):
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return vars(module)[name]

        vars(module).update({**self._preset_attributes, _MODULE_GETATTR: load_and_get})

    def load(self, module: ModuleType) -> None:
        """Execute the module's code on the first call."""
        if vars(module).pop(_MODULE_GETATTR, None) is not None:
            for name in self._preset_attributes:
                del vars(module)[name]
            self._loader.exec_module(module)


class _LazyFinder(MetaPathFinder):
    def __init__(self, name: str, preset_attributes: Mapping[str, object]) -> None:
        self.name = name
        self._preset_attributes = preset_attributes

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _LazyLoader(spec.loader, self._preset_attributes)
        return spec
