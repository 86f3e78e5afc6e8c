"""The registry of tenants: the tenants file and the folders of API keys, reloaded as they change.

The operator or `faasmoe up` writes the tenants file; it names folders of keys and contains none. It
is read strictly and rejected as a whole. An invalid file or folder keeps the last good version of
that part, because a damaged file must not lock all tenants out; removed keys are revoked at the
next reload. The module also derives which tenants share prefix-cached KV blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from faasmoe_contracts.api_keys import KeyReadError, KeyRing, read_key_digests
from faasmoe_contracts.control_messages import MAX_TENANTS
from faasmoe_router.engine.fair_queue import Share
from faasmoe_router.errors import RouterConfigError, TenantsConfigError

logger = logging.getLogger(__name__)

REFRESH_INTERVAL_S = 1.0
_KEEPING_LAST_GOOD = "keeping the last good version"
MAX_SHOWN_INPUT_LENGTH = 80
TenantName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
LimitValue = Annotated[int, Field(ge=1, le=1 << 40)]


class _TenantsFileModel(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, alias_generator=to_camel, validate_by_alias=True
    )


class TenantLimitsConfig(_TenantsFileModel):
    """Limits of one tenant over all routers; None means no limit.

    Attributes:
        requests_per_minute: requests admitted per minute.
        tokens_per_minute: tokens admitted per minute, prompt and output together.
        max_concurrent_requests: sequences computed concurrently.
        max_queued_requests: sequences that may wait in addition.
        max_model_len: tokens of one request, prompt and output together.
        max_output_tokens: tokens that one choice of a request may generate.
    """

    requests_per_minute: LimitValue | None = None
    tokens_per_minute: LimitValue | None = None
    max_concurrent_requests: LimitValue | None = None
    max_queued_requests: Annotated[int, Field(ge=0, le=1 << 40)] | None = None
    max_model_len: LimitValue | None = None
    max_output_tokens: LimitValue | None = None


class TenantConfig(_TenantsFileModel):
    """One tenant.

    Attributes:
        name: name, part of the path of its endpoint.
        keys_path: folder whose files are its API keys.
        weight: share of the engine under contention, relative to other tenants.
        priority: tenants of a higher priority are served first.
        model_alias: name by which it may address the model besides the model's own.
        system_prompt: prepended to conversations without a system message.
        share_prefix_cache_with: tenants with which it shares prefix-cached KV blocks if that is
            mutual; they can then infer prefixes of its prompts from response times.
        limits: its limits.
    """

    name: TenantName
    keys_path: Annotated[str, Field(min_length=1, max_length=4096)]
    weight: Annotated[int, Field(ge=1, le=1000)] = 1
    priority: Annotated[int, Field(ge=-10, le=10)] = 0
    model_alias: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    system_prompt: Annotated[str, Field(min_length=1, max_length=1 << 16)] | None = None
    share_prefix_cache_with: Annotated[list[TenantName], Field(max_length=MAX_TENANTS)] = []
    limits: TenantLimitsConfig = TenantLimitsConfig()

    @property
    def keys_folder(self) -> Path:
        """The folder of its API keys."""
        return Path(self.keys_path)

    def share(self, *, n_routers: int = 1) -> Share:
        """Return the tenant's share of one router's engine; limits are split and rounded up."""
        return Share(
            weight=self.weight,
            priority=self.priority,
            max_running=_per_router(self.limits.max_concurrent_requests, n_routers),
            max_queued=_per_router(self.limits.max_queued_requests, n_routers),
        )


class TenantsConfig(_TenantsFileModel):
    """The tenants file.

    Attributes:
        version: version of the format.
        model: name of the model.
        tenants: the tenants, in the order of the file.
        router_replicas: routers that share the limits; None leaves it to the router's settings.
    """

    version: Literal[1]
    model: Annotated[str, Field(min_length=1, max_length=253)]
    tenants: Annotated[list[TenantConfig], Field(max_length=MAX_TENANTS)]
    router_replicas: Annotated[int, Field(ge=1, le=1024)] | None = None

    @model_validator(mode="after")
    def _check_unique_names(self) -> TenantsConfig:
        names = [tenant.name for tenant in self.tenants]
        duplicate = next((name for name in names if names.count(name) > 1), None)
        if duplicate is not None:
            raise ValueError(f"tenants: got the name {duplicate!r} twice, expected each once")
        return self

    @classmethod
    def loads(cls, content: bytes) -> TenantsConfig:
        """Read the file's content; raises TenantsConfigError that names the field."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            raise TenantsConfigError(_error_message(error.errors(include_url=False)[0])) from None


def _per_router(limit: int | None, n_routers: int) -> int | None:
    return None if limit is None else -(-limit // n_routers)


def _error_message(error: Mapping[str, Any]) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error["loc"]).lstrip(".")
    if error["type"] == "json_invalid":
        return f"not JSON: {error['ctx']['error']}"
    if error["type"] == "missing":
        return f"{path}: missing"
    if error["type"] == "extra_forbidden":
        return f"{path}: got an unknown field"
    shown = repr(error["input"])[:MAX_SHOWN_INPUT_LENGTH]
    return f"{path or 'tenants file'}: got {shown}, {_expected(str(error['msg']))}"


def _expected(message: str) -> str:
    return "expected " + message.removeprefix("Input should be ").removeprefix("Input should ")


def prefix_cache_groups(tenants: Iterable[TenantConfig]) -> dict[str, str]:
    """Return the prefix cache group of each tenant, named after the group's members.

    The time to the first token reveals that a prefix is cached, so a group needs the mutual consent
    of all members. If a and b name each other and b and c do, but a and c do not, a block computed
    for b could reveal a to c, so each of the three is alone.
    """
    declared = {tenant.name: set(tenant.share_prefix_cache_with) for tenant in tenants}
    mutual = {
        name: {other for other in others if name in declared.get(other, ())} - {name}
        for name, others in declared.items()
    }
    groups = {}
    for name, others in mutual.items():
        group = others | {name}
        is_mutual = all(mutual[member] | {member} == group for member in group)
        groups[name] = ",".join(sorted(group)) if is_mutual else name
    return groups


def one_sided_sharing(
    tenants: Iterable[TenantConfig], groups: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Return the pairs of tenants of which the first names the second without being grouped."""
    return [
        (tenant.name, other)
        for tenant in tenants
        for other in tenant.share_prefix_cache_with
        if groups.get(other) != groups[tenant.name]
    ]


class TenantRegistry:
    """Current tenants and their API keys.

    Args:
        path: the tenants file.
        refresh_interval_s: least time between two reloads, in seconds.

    Attributes:
        config: content of the tenants file.
        key_ring: API keys of all tenants.

    Raises:
        RouterConfigError: the tenants file is invalid; after the start, an invalid file is ignored.
    """

    def __init__(self, path: Path, *, refresh_interval_s: float = REFRESH_INTERVAL_S) -> None:
        self._path = path
        self.refresh_interval_s = refresh_interval_s
        self._last_read_s = float("-inf")
        self._errors: Mapping[str, str] = {}
        self._digests: dict[str, frozenset[bytes]] = {}
        try:
            self.config = TenantsConfig.loads(path.read_bytes())
        except (TenantsConfigError, OSError) as error:
            raise RouterConfigError(f"FAASMOE_TENANTS_FILE: {path}: {error}") from error
        self._tenants = {tenant.name: tenant for tenant in self.config.tenants}
        self.key_ring = KeyRing({})
        errors: dict[str, str] = {}
        self._read_keys(errors)
        self._log_new_errors(errors)

    @property
    def tenants(self) -> Mapping[str, TenantConfig]:
        """The tenants by name."""
        return self._tenants

    def authenticate(self, api_key: str) -> TenantConfig | None:
        """Return the tenant of an API key, None for an unknown one, in constant time."""
        return self._tenants.get(self.key_ring.find_tenant(api_key) or "")

    def refresh(self, now_s: float) -> bool:
        """Reload everything if that is due; return whether the tenants file changed."""
        if now_s - self._last_read_s < self.refresh_interval_s:
            return False
        self._last_read_s = now_s
        errors: dict[str, str] = {}
        previous, self.config = self.config, self._read_config(errors)
        self._tenants = {tenant.name: tenant for tenant in self.config.tenants}
        self._read_keys(errors)
        self._log_new_errors(errors)
        return previous != self.config

    def _read_config(self, errors: dict[str, str]) -> TenantsConfig:
        try:
            return TenantsConfig.loads(self._path.read_bytes())
        except TenantsConfigError as error:
            errors[str(self._path)] = f"{error}; {_KEEPING_LAST_GOOD}"
        except OSError as error:
            errors[str(self._path)] = f"{error.strerror}; {_KEEPING_LAST_GOOD}"
        return self.config

    def _read_keys(self, errors: dict[str, str]) -> None:
        digests = {}
        for tenant in self.config.tenants:
            try:
                digests[tenant.name] = read_key_digests(tenant.keys_folder)
            except KeyReadError as error:
                digests[tenant.name] = self._digests.get(tenant.name, frozenset())
                errors[tenant.name] = f"{error}; {_KEEPING_LAST_GOOD}"
        if digests != self._digests:
            self._digests = digests
            self.key_ring = KeyRing(digests)
        if self.key_ring.n_shared_keys:
            errors["keys"] = (
                f"{self.key_ring.n_shared_keys} belong to several tenants and are ignored"
            )

    def _log_new_errors(self, errors: Mapping[str, str]) -> None:
        """Log the errors that the last reload did not have."""
        for source, message in errors.items():
            if self._errors.get(source) != message:
                logger.error("Tenants: %s: %s", source, message)
        self._errors = errors
