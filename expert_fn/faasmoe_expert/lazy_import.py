"""Modules that are imported by others but not needed: made when something first looks into them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

META_REGISTRATIONS = "torch._meta_registrations"
"""Imported by torch: its decompositions, and a Python kernel for each operation on meta tensors.

18 MB and a fourth of the import's time. Computing a frame never sees a meta tensor; building a
family's own module does.
"""

_MODULE_GETATTR = "__getattr__"


class _LazyLoader(Loader):
    """Leaves a module empty, but for the answers, until another attribute of it is asked for."""

    def __init__(self, loader: Loader, preset_attributes: Mapping[str, object]) -> None:
        self._loader = loader
        self._preset_attributes = preset_attributes

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        def load_and_get(name: str) -> Any:
            # What looks at every module, as `inspect` does, asks for such names only.
            if not name.startswith("__"):
                self.load(module)
            if name not in vars(module):
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return vars(module)[name]

        vars(module).update({**self._preset_attributes, _MODULE_GETATTR: load_and_get})

    def load(self, module: ModuleType) -> None:
        """Run the module's code, unless that was done."""
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


def defer_import(name: str, preset_attributes: Mapping[str, object] | None = None) -> None:
    """Make a module late from now on; has no effect if it is imported already.

    A package should be deferred only with answers for all that its own modules ask of it: else it
    is made in the middle of one of them, and finds that half made.

    Args:
        name: the module.
        answers: attributes that it has meanwhile.
    """
    if not any(isinstance(finder, _LazyFinder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _LazyFinder(name, preset_attributes or {}))


def load_deferred(name: str) -> None:
    """Make a module if it was left out until now."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if spec is not None and isinstance(spec.loader, _LazyLoader):
        spec.loader.load(sys.modules[name])
