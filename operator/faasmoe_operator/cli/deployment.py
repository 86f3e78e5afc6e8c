"""Models and tenants that are served together: the files of `faasmoe up -f A -f B`.

Inline `spec.tenants` are short forms of Tenants, so that everything after this module knows only
those. What concerns one tenant's keys is a warning, so that it keeps nobody else from being served.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from faasmoe_contracts.api_keys import KeyReadError, read_named_digests
from faasmoe_contracts.gateway_file import GatewayFile, ModelEntry, RouterEntry, TenantEntry
from faasmoe_operator.api.v1alpha1 import MoEModel, MoEModelError
from faasmoe_operator.api.v1alpha1.documents import load_documents
from faasmoe_operator.api.v1alpha1.tenant import Tenant
from faasmoe_operator.api.v1alpha1.tenants import TenantSpec
from faasmoe_operator.api.v1alpha1.validation import process_platform_problems
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.control.tenant_entries import tenant_entry
from faasmoe_operator.errors import CommandError

SUFFIXES = (".yaml", ".yml", ".json")
STATE_FOLDER = ".faasmoe/gateway.state"


@dataclass(frozen=True, slots=True)
class LocalTenant:
    """A Tenant of a file on this machine.

    Attributes:
        file: the file; the path of its keys is relative to its folder.
        tenant: the parsed Tenant.
        field: where it was given, for messages.
    """

    file: Path
    tenant: Tenant
    field: str

    @property
    def name(self) -> str:
        """Its name."""
        return self.tenant.metadata.name

    @property
    def keys_path(self) -> Path:
        """The folder of its API keys, whether it exists or not."""
        return (self.file.parent / (self.tenant.spec.api_keys_path or "")).resolve()

    def error(self, field: str, what: str) -> MoEModelError:
        """Return the error of a field."""
        return MoEModelError(str(self.file), [f"{self.field}: {field}: {what}"])


@dataclass(frozen=True, slots=True)
class Deployment:
    """Models and tenants that are served together.

    Attributes:
        models: the models, by name; without tenants, which are in `tenants`.
        tenants: the tenants; empty if everyone may use every model.
        state_path: folder of what the gateway keeps over restarts.
    """

    models: Mapping[str, LocalModel]
    tenants: tuple[LocalTenant, ...]
    state_path: Path

    @classmethod
    def load(cls, paths: Sequence[Path]) -> Deployment:
        """Read files, and all files of folders.

        Raises:
            CommandError: a path does not exist, or there is no model.
            MoEModelError: an object is invalid, or does not fit the others.
        """
        models: dict[str, LocalModel] = {}
        tenants: list[LocalTenant] = []
        for file in _files(paths):
            for document in load_documents(file):
                if isinstance(document, Tenant):
                    field = f"Tenant {document.metadata.name}"
                    tenants.append(LocalTenant(file, document, field))
                else:
                    model = _local_model(file, document, models)
                    models[model.model.metadata.name] = model
                    tenants += _inline_tenants(model)
        if not models:
            raise CommandError("-f: got no MoEModel, expected one or more", exit_status=2)
        deployment = cls(models, tuple(tenants), _state_path(paths))
        deployment.check()
        bare = {name: _without_tenants(model) for name, model in models.items()}
        return replace(deployment, models=bare)

    @property
    def labels(self) -> dict[str, dict[str, str]]:
        """Labels of all models by name."""
        return {name: local.model.metadata.labels for name, local in self.models.items()}

    def check(self) -> None:
        """Raise MoEModelError if models or tenants contradict each other."""
        self._check_models()
        names = [tenant.name for tenant in self.tenants]
        hosts: dict[str, str] = {}
        for index, tenant in enumerate(self.tenants):
            if tenant.name in names[:index]:
                expected = "each tenant once; a Tenant may use several models"
                raise tenant.error(
                    "metadata.name", f"got {tenant.name!r} twice, expected {expected}"
                )
            self._check_tenant(tenant, names)
            if (host := tenant.tenant.spec.host) is not None:
                other = hosts.setdefault(host, tenant.name)
                if other != tenant.name:
                    what = f"got {host!r}, which is {other}'s already, expected another"
                    raise tenant.error("spec.host", what)
        if self.tenants:
            self._check_all_used()

    def warnings(self) -> list[str]:
        """Return what keeps single tenants from calling."""
        owners: dict[bytes, str] = {}
        found = []
        for tenant in self.tenants:
            try:
                digests = read_named_digests(tenant.keys_path)
            except KeyReadError as error:
                found.append(f"tenant {tenant.name}: {error}")
                continue
            if not digests:
                expected = "a folder with one file for each API key; the tenant cannot call"
                found.append(f"tenant {tenant.name}: got {tenant.keys_path}, expected {expected}")
            for name, digest in digests.items():
                other = owners.setdefault(digest, tenant.name)
                if other != tenant.name:
                    found.append(
                        f"tenant {tenant.name}: the key {name} is also one of {other}'s; neither "
                        "can call with it"
                    )
        return found

    def with_key_tenant(self, tenant: str, keys_path: Path) -> Deployment:
        """Return the deployment with one tenant, without limits, that may use every model."""
        spec = {"apiKeysPath": str(keys_path), "models": [{"name": name} for name in self.models]}
        document = {
            "apiVersion": "faasmoe.dev/v1alpha1",
            "kind": "Tenant",
            "metadata": {"name": tenant},
            "spec": spec,
        }
        parsed = Tenant.model_validate(document)
        return replace(self, tenants=(LocalTenant(keys_path, parsed, "--api-key"),))

    def tenants_of(self, model: str) -> list[tuple[TenantSpec, Path]]:
        """Return the short forms of a model's tenants, each with the folder of its keys."""
        among = [(t, t.tenant.models_among(self.labels).get(model)) for t in self.tenants]
        names = [tenant.name for tenant, terms in among if terms is not None]
        return [
            (tenant.tenant.for_model(terms, tenants=names), tenant.keys_path)
            for tenant, terms in among
            if terms is not None
        ]

    def gateway_file(
        self, sockets: Mapping[str, Sequence[Path]], max_model_lens: Mapping[str, int]
    ) -> GatewayFile:
        """Return what the gateway reads.

        Args:
            sockets: the sockets of each model's routers.
            max_model_lens: tokens of a prompt and its completion, by model.
        """
        models = [
            ModelEntry(
                name,
                local.served_model_name,
                max_model_lens[name],
                tuple(RouterEntry(str(i), str(path)) for i, path in enumerate(sockets[name])),
            )
            for name, local in sorted(self.models.items())
        ]
        return GatewayFile(tuple(models), tuple(map(self._tenant_entry, self.tenants)))

    def _tenant_entry(self, tenant: LocalTenant) -> TenantEntry:
        served = tenant.tenant.models_among(self.labels).values()
        return tenant_entry(tenant.tenant, served, keys_path=str(tenant.keys_path))

    def _check_models(self) -> None:
        served: dict[str, str] = {}
        stores: dict[Path, str] = {}
        for name, local in self.models.items():
            other = served.setdefault(local.served_model_name, name)
            if other != name:
                raise local.error(
                    f"spec.router.servedModelName: got {local.served_model_name!r}, expected "
                    f"another name than that of the MoEModel {other}"
                )
            other = stores.setdefault(local.store_path, name)
            if other != name:
                raise local.error(
                    f"spec.store.path: got {local.store_path}, expected another folder than that "
                    f"of the MoEModel {other}"
                )

    def _check_tenant(self, tenant: LocalTenant, tenants: Iterable[str]) -> None:
        spec = tenant.tenant.spec
        if spec.api_keys_path is None:
            raise tenant.error(
                "spec.apiKeysPath",
                "missing: `faasmoe up` reads no Secret; set the path of a "
                "folder with one file for each API key, relative to this file",
            )
        for index, model in enumerate(spec.models):
            if model.name not in self.models:
                expected = f"one of the MoEModels {', '.join(sorted(self.models))}"
                what = f"got {model.name!r}, expected {expected}"
                raise tenant.error(f"spec.models.{index}.name", what)
        for index, other in enumerate(spec.share_prefix_cache_with):
            if other == tenant.name or other not in set(tenants):
                what = f"got {other!r}, expected the name of another tenant"
                raise tenant.error(f"spec.sharePrefixCacheWith.{index}", what)
        self._check_names(tenant)

    def _check_names(self, tenant: LocalTenant) -> None:
        """Check that no name means two models to a tenant."""
        meanings: dict[str, str] = {}
        for name, terms in tenant.tenant.models_among(self.labels).items():
            for text in filter(None, (self.models[name].served_model_name, terms.alias)):
                other = meanings.setdefault(text, name)
                if other != name:
                    what = f"got {text!r} for {name}, which is {other} already, expected another"
                    raise tenant.error("spec.models: alias", what)

    def _check_all_used(self) -> None:
        used = {name for t in self.tenants for name in t.tenant.models_among(self.labels)}
        for name, local in self.models.items():
            if name not in used:
                raise local.error(
                    "spec.tenants: got none, expected a tenant that may use the model, as there "
                    "are tenants of others"
                )


def _files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
            if not found:
                raise CommandError(f"-f: {path} holds no YAML file, expected some", exit_status=2)
            files += found
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def _state_path(paths: Sequence[Path]) -> Path:
    first = paths[0]
    return (first if first.is_dir() else first.parent).resolve() / STATE_FOLDER


def _local_model(file: Path, model: MoEModel, models: Mapping[str, LocalModel]) -> LocalModel:
    name = model.metadata.name
    if problems := process_platform_problems(model):
        raise MoEModelError(str(file), problems)
    if name in models:
        what = f"got {name!r}, which {models[name].file} has already, expected another"
        raise MoEModelError(str(file), [f"metadata.name: {what}"])
    return LocalModel(file, model, label=f"{file} ({name})")


def _inline_tenants(local: LocalModel) -> list[LocalTenant]:
    name = local.model.metadata.name
    return [
        LocalTenant(
            local.file, Tenant.from_short_form(tenant, model=name), f"{name}: spec.tenants.{index}"
        )
        for index, tenant in enumerate(local.model.spec.tenants)
    ]


def _without_tenants(local: LocalModel) -> LocalModel:
    spec = local.model.spec.model_copy(update={"tenants": ()})
    model = local.model.model_copy(update={"spec": spec})
    return replace(local, model=model, is_modified=True)
