"""A MoEModel file on this machine: resolves its paths, opens its store, plans its functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import MANIFEST_NAME, Manifest, QuantizationEntry, Store
from faasmoe_contracts.store.referenced_files import FilePlace
from faasmoe_operator.api.v1alpha1 import MoEModel, MoEModelError, load_moemodel
from faasmoe_operator.api.v1alpha1.storage import FILE_SCHEME, HUB_SCHEME
from faasmoe_operator.api.v1alpha1.tenants import TenantSpec
from faasmoe_operator.api.v1alpha1.validation import process_platform_problems
from faasmoe_operator.control.functions import partitioning_of
from faasmoe_operator.errors import PlanError
from faasmoe_operator.plan.functions import plan_functions
from faasmoe_operator.platforms.base import ProcessSandboxTemplate

_COMMIT = re.compile(r"[0-9a-f]{40}")  # unlike a commit, a branch or tag may have moved


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A MoEModel and its files on this machine.

    Attributes:
        file: path of the MoEModel file; relative paths in it are relative to its folder.
        model: the parsed MoEModel.
        label: its name in error messages; None for `file`.
        options: the command-line options that set fields, by field, for error messages.
        is_modified: whether `model` is not what `file` holds: options changed it or there is none.
    """

    file: Path
    model: MoEModel
    label: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    is_modified: bool = False

    @classmethod
    def load(cls, file: Path) -> LocalModel:
        """Read a MoEModel file.

        Raises:
            MoEModelError: the file is invalid or needs the Kubernetes platform.
        """
        model = load_moemodel(file)
        if problems := process_platform_problems(model):
            raise MoEModelError(str(file), problems)
        return cls(file, model)

    @property
    def source(self) -> str:
        """The checkpoint: hf://ORG/NAME, or file:///PATH with an absolute path."""
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
        """The folder of state that survives restarts, next to the store, which is read-only."""
        return self.store_path.with_name(f"{self.store_path.name}.state")

    @property
    def served_model_name(self) -> str:
        """The name by which requests address the model."""
        return self.model.spec.router.served_model_name or self.model.metadata.name

    @property
    def is_prepared(self) -> bool:
        """Whether the store exists and is complete."""
        return (self.store_path / MANIFEST_NAME).is_file()

    @property
    def dtype(self) -> str | None:
        """The requested data type; None for the checkpoint's own."""
        dtype = self.model.spec.model.dtype
        return None if dtype == "auto" else dtype

    @property
    def quantization(self) -> QuantizationEntry:
        """What the store is to quantise."""
        spec = self.model.spec
        return QuantizationEntry(spec.experts.quantization, spec.router.quantization)

    @property
    def template(self) -> ProcessSandboxTemplate:
        """The template of the model's sandboxes."""
        experts = self.model.spec.experts
        return ProcessSandboxTemplate(
            experts.functions_per_sandbox, experts.device, experts.threads
        )

    def api_keys_path(self, tenant: TenantSpec) -> Path:
        """Return the folder of a tenant's API keys; raises MoEModelError if it does not exist."""
        path = (self.file.parent / (tenant.api_keys_path or "")).resolve()
        if tenant.api_keys_path is None or not path.is_dir():
            index = self.model.spec.tenants.index(tenant)
            what = f"got {path}, expected a folder with one file for each API key"
            self._raise_error(f"spec.tenants.{index}.apiKeysPath", what)
        return path

    def check_api_keys(self) -> None:
        """Raise MoEModelError if the folder of a tenant's API keys does not exist."""
        for tenant in self.model.spec.tenants:
            self.api_keys_path(tenant)

    def _check_mode(self, manifest: Manifest) -> None:
        checkpoint, mode = manifest.checkpoint, self.model.spec.store.mode
        refers = checkpoint is not None and checkpoint.bytes_in(FilePlace.CHECKPOINT) > 0
        stored = "reference" if refers else "copy"
        if mode not in (None, "auto", stored):
            what = f"got {mode}, expected auto or {stored}, as the store {self.store_path} is"
            self._raise_error("spec.store.mode", f"{what}; `faasmoe prepare --force` replaces it")

    def open_store(self) -> Store:
        """Open the store and check that it was prepared from this model.

        Raises:
            MoEModelError: there is no store, or it does not match the model.
            StoreError: the store is damaged.
        """
        if not self.is_prepared:
            what = f"got {self.store_path}, which holds no prepared store"
            self._raise_error(
                "spec.store.path", f"{what}; `faasmoe up` or `faasmoe prepare` creates one"
            )
        store = Store.open(self.store_path)
        self._check_store(store.manifest)
        return store

    def functions(self, manifest: Manifest, *, key: bytes) -> tuple[FunctionSpec, ...]:
        """Return the model's planned functions.

        Args:
            manifest: the store's manifest.
            key: secret key that makes the function ids opaque.

        Raises:
            MoEModelError: the model cannot be partitioned as requested.
        """
        partitioning = partitioning_of(self.model.spec.granularity)
        try:
            return plan_functions(
                manifest.layers, partitioning, model_digest=manifest.digest, key=key
            )
        except PlanError as error:
            raise self.error(str(error)) from error

    def error(self, *problems: str) -> MoEModelError:
        """Return an error that names fields by the options that set them."""
        return MoEModelError(
            self.label or str(self.file), name_options(problems, options=self.options)
        )

    def _check_store(self, manifest: Manifest) -> None:
        self._check_mode(manifest)
        stored = manifest.model
        if self.dtype not in (None, stored.dtype):
            expected = f"auto or {stored.dtype}, which the store {self.store_path} holds"
            self._raise_error("spec.model.dtype", f"got {self.dtype}, expected {expected}")
        self._check_quantization(manifest.quantization)
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

    def _check_quantization(self, stored: QuantizationEntry) -> None:
        for name, got, held in (
            ("spec.experts.quantization", self.quantization.experts, stored.experts),
            ("spec.router.quantization", self.quantization.router, stored.router),
        ):
            if got != held:
                expected = f"{held}, which the store {self.store_path} holds"
                self._raise_error(
                    name, f"got {got}, expected {expected}, or another spec.store.path"
                )

    def _raise_error(self, name: str, what: str) -> None:
        raise self.error(f"{name}: {what}")


def name_options(problems: Iterable[str], *, options: Mapping[str, str]) -> list[str]:
    """Return problems, each `FIELD: TEXT`, with the option of a field instead of the field."""
    parts = (problem.partition(": ") for problem in problems)
    return [f"{options.get(name, name)}{colon}{what}" for name, colon, what in parts]


def is_same_source(requested: str, stored: str) -> bool:
    """Return whether a manifest's source (path, URI or hub id) is the requested `source` URI."""
    if stored.startswith(FILE_SCHEME):
        return Path(unquote(urlsplit(stored).path)).resolve().as_uri() == requested
    if Path(stored).is_absolute():
        return Path(stored).resolve().as_uri() == requested
    if "://" in stored:
        return requested == stored
    return requested == f"{HUB_SCHEME}{stored}"
