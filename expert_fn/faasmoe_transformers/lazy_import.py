"""Defers the execution of modules that torch imports but that a process may never use.

A deferred module is created empty and executed when an attribute of it is first accessed. This
module imports only the standard library, so that it can run before torch is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
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


def defer_import(
    name: str,
    preset_attributes: Mapping[str, object] | None = None,
    *,
    independent_submodules: Collection[str] = (),
    load_first: Collection[str] = (),
    on_executed: Callable[[ModuleType], None] = lambda _: None,
) -> None:
    """Defer a module from now on; has no effect if it is already imported.

    A package should be deferred only with preset attributes for all that its own submodules access:
    otherwise it is executed in the middle of one of them, which is then only half executed.
    Importing a submodule executes the package, unless the submodule is independent of it.

    Args:
        name: name of the module.
        preset_attributes: attributes available before the module is executed.
        independent_submodules: names of submodules that do not need the package.
        load_first: names of deferred modules that have to be executed before this one.
        on_executed: called with the module after its code was executed.
    """
    if not any(isinstance(finder, _LazyFinder) and finder.name == name for finder in sys.meta_path):
        execution = _Execution(preset_attributes or {}, tuple(load_first), on_executed)
        sys.meta_path.insert(0, _LazyFinder(name, frozenset(independent_submodules), execution))


def load_deferred(name: str) -> None:
    """Execute a module if it was deferred and has not been executed."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if spec is not None and isinstance(spec.loader, _LazyLoader):
        spec.loader.load(sys.modules[name])


def is_deferred(name: str) -> bool:
    """Tell whether a module was deferred and has not been executed to its end."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec is not None and isinstance(spec.loader, _LazyLoader) and not spec.loader.is_executed


def call_after_import(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call a function with a module right after the module's code was executed.

    Args:
        name: name of a module that is not imported yet; otherwise nothing is called.
        callback: called once with the module.
    """
    sys.meta_path.insert(0, _CallbackFinder(name, callback))


@dataclass(frozen=True, slots=True)
class _Execution:
    """What surrounds the execution of a deferred module; see `defer_import`."""

    preset_attributes: Mapping[str, object]
    load_first: tuple[str, ...]
    on_executed: Callable[[ModuleType], None]


class _LazyLoader(Loader):
    """Creates a module with preset attributes only, until another attribute is accessed."""

    def __init__(self, loader: Loader, execution: _Execution) -> None:
        self.is_executed = False
        self._loader = loader
        self._execution = execution

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

        vars(module).update({**self._execution.preset_attributes, _MODULE_GETATTR: load_and_get})

    def load(self, module: ModuleType) -> None:
        """Execute the module's code on the first call."""
        if vars(module).pop(_MODULE_GETATTR, None) is not None:
            for name in self._execution.load_first:
                load_deferred(name)
            for name in self._execution.preset_attributes:
                del vars(module)[name]
            self._loader.exec_module(module)
            self.is_executed = True
            self._execution.on_executed(module)


class _LazyFinder(MetaPathFinder):
    def __init__(
        self, name: str, independent_submodules: frozenset[str], execution: _Execution
    ) -> None:
        self.name = name
        self._independent_submodules = independent_submodules
        self._execution = execution

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.startswith(f"{self.name}.") and name not in self._independent_submodules:
            load_deferred(self.name)
        if name != self.name:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _LazyLoader(spec.loader, self._execution)
        return spec


class _CallbackLoader(Loader):
    def __init__(self, loader: Loader, callback: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._callback = callback

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        module.__loader__ = spec.loader = self._loader  # from here on an ordinary module
        self._loader.exec_module(module)
        self._callback(module)


class _CallbackFinder(MetaPathFinder):
    def __init__(self, name: str, callback: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._callback = callback

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _CallbackLoader(spec.loader, self._callback)
        return spec
