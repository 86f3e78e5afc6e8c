"""A MoEModel file on this machine: its paths resolved, its store opened, its functions planned."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import MANIFEST_NAME, Manifest, Store
from faasmoe_operator.api.v1alpha1 import MoEModel, MoEModelError, load_moemodel
from faasmoe_operator.api.v1alpha1.storage import FILE_SCHEME, HUB_SCHEME
from faasmoe_operator.api.v1alpha1.tenants import TenantSpec
from faasmoe_operator.api.v1alpha1.validation import process_platform_problems
from faasmoe_operator.control.functions import partitioning_of
from faasmoe_operator.errors import PlanError
from faasmoe_operator.plan.functions import plan_functions
from faasmoe_operator.platforms.base import ProcessSandboxTemplate

_COMMIT = re.compile(r"[0-9a-f]{40}")  # a branch or tag may have moved, a commit never does


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A MoEModel and where its parts lie on this machine.

    Attributes:
        file: the MoEModel file.
        model: what it says.
    """

    file: Path
    model: MoEModel

    @classmethod
    def load(cls, file: Path) -> LocalModel:
        """Read a MoEModel file; raises MoEModelError, also of what only Kubernetes can serve."""
        model = load_moemodel(file)
        if problems := process_platform_problems(model):
            raise MoEModelError(str(file), problems)
        return cls(file, model)

    @property
    def source(self) -> str:
        """The checkpoint: hf://ORG/NAME, or file:///PATH with nothing left relative."""
        source = self.model.spec.model.source
        if not source.startswith(FILE_SCHEME):
            return source
        path = Path(unquote(source.removeprefix(FILE_SCHEME)))
        return (self.file.parent / path).resolve().as_uri()

    @property
    def store_path(self) -> Path:
        """The store's folder."""
        path = self.model.spec.store.path or f".faasmoe/{self.model.metadata.name}"
        return (self.file.parent / path).resolve()

    @property
    def state_path(self) -> Path:
        """The folder of what is kept across restarts, beside the store, which never changes."""
        return self.store_path.with_name(f"{self.store_path.name}.state")

    @property
    def is_prepared(self) -> bool:
        """Whether there is a complete store."""
        return (self.store_path / MANIFEST_NAME).is_file()

    @property
    def dtype(self) -> str | None:
        """The number format asked for, None for the checkpoint's."""
        dtype = self.model.spec.model.dtype
        return None if dtype == "auto" else dtype

    @property
    def template(self) -> ProcessSandboxTemplate:
        """What the sandboxes are like."""
        experts = self.model.spec.experts
        return ProcessSandboxTemplate(
            experts.functions_per_sandbox, experts.device, experts.threads
        )

    def api_keys_path(self, tenant: TenantSpec) -> Path:
        """Return the folder of a tenant's API keys; raises MoEModelError if there is none."""
        path = (self.file.parent / (tenant.api_keys_path or "")).resolve()
        if tenant.api_keys_path is None or not path.is_dir():
            index = self.model.spec.tenants.index(tenant)
            what = f"got {path}, expected a folder with one file for each API key"
            self._raise_error(f"spec.tenants.{index}.apiKeysPath", what)
        return path

    def check_api_keys(self) -> None:
        """Raise MoEModelError of a tenant whose folder of API keys is not there."""
        for tenant in self.model.spec.tenants:
            self.api_keys_path(tenant)

    def open_store(self) -> Store:
        """Open the store and check that it is the model's; raises StoreError or MoEModelError."""
        if not self.is_prepared:
            what = f"got {self.store_path}, which holds no prepared store"
            self._raise_error(
                "spec.store.path", f"{what}; `faasmoe up` or `faasmoe prepare` makes one"
            )
        store = Store.open(self.store_path)
        self._check_store(store.manifest)
        return store

    def functions(self, manifest: Manifest, *, key: bytes) -> tuple[FunctionSpec, ...]:
        """Return the functions that the model is cut into; raises MoEModelError.

        Args:
            manifest: the store's.
            key: secret that makes the function ids opaque.
        """
        partitioning = partitioning_of(self.model.spec.granularity)
        try:
            return plan_functions(
                manifest.layers, partitioning, model_digest=manifest.digest, key=key
            )
        except PlanError as error:
            raise MoEModelError(str(self.file), [str(error)]) from error

    def _check_store(self, manifest: Manifest) -> None:
        stored = manifest.model
        if self.dtype not in (None, stored.dtype):
            expected = f"auto or {stored.dtype}, which the store {self.store_path} holds"
            self._raise_error("spec.model.dtype", f"got {self.dtype}, expected {expected}")
        if not is_same_source(self.source, stored.source):
            expected = f"{stored.source}, which the store {self.store_path} was prepared from"
            self._raise_error("spec.model.source", f"got {self.source}, expected {expected}")
        revision = self.model.spec.model.revision
        if revision and _COMMIT.fullmatch(revision) and revision != stored.revision:
            expected = f"{stored.revision}, which the store {self.store_path} was prepared from"
            self._raise_error("spec.model.revision", f"got {revision}, expected {expected}")
        max_model_len = self.model.spec.router.max_model_len
        if max_model_len is not None and max_model_len > stored.max_position_embeddings:
            expected = f"at most {stored.max_position_embeddings}, the model's context"
            self._raise_error(
                "spec.router.maxModelLen", f"got {max_model_len}, expected {expected}"
            )

    def _raise_error(self, field: str, what: str) -> None:
        raise MoEModelError(str(self.file), [f"{field}: {what}"])


def is_same_source(requested: str, stored: str) -> bool:
    """Compare a source in full form with what a manifest calls it: a path, a URI or a hub id."""
    if stored.startswith(FILE_SCHEME):
        return Path(unquote(urlsplit(stored).path)).resolve().as_uri() == requested
    if Path(stored).is_absolute():
        return Path(stored).resolve().as_uri() == requested
    return requested == (stored if stored.startswith(HUB_SCHEME) else f"{HUB_SCHEME}{stored}")
