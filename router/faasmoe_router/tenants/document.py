"""The tenants file: who the tenants of this model are and what each is entitled to.

The operator or `faasmoe up` writes it; it is read strictly, and refused as a whole if anything in
it is wrong. It names folders with keys and holds none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from faasmoe_router.tenants.errors import DocumentError
from faasmoe_router.tenants.fairness import Share

MAX_TENANTS = 64
MAX_SHOWN_LENGTH = 80
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
Count = Annotated[int, Field(ge=1, le=1 << 40)]


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, alias_generator=to_camel, validate_by_alias=True
    )


class TenantLimits(_Part):
    """What a tenant may ask for; None is no limit.

    Attributes:
        requests_per_minute: requests that are let in.
        tokens_per_minute: their tokens, prompt and output together.
        max_concurrent_requests: sequences that are computed at once.
        max_queued_requests: sequences that may wait beyond those.
        max_model_len: tokens of one request, prompt and output together.
        max_output_tokens: tokens that one choice of a request may generate.
    """

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    max_concurrent_requests: Count | None = None
    max_queued_requests: Annotated[int, Field(ge=0, le=1 << 40)] | None = None
    max_model_len: Count | None = None
    max_output_tokens: Count | None = None


class Tenant(_Part):
    """One tenant.

    Attributes:
        name: stands in its endpoint's path.
        keys_path: folder whose files are its API keys.
        weight: its part of the service when there is not enough.
        priority: tenants of a higher one go first.
        model_alias: what its requests may call the model, beside the model's own name.
        system_prompt: stands before conversations that have no system message.
        share_prefix_cache_with: tenants that it lets see, by timing, what its prompts begin with;
            only if they let it too.
        limits: what it may ask for.
    """

    name: Name
    keys_path: Annotated[str, Field(min_length=1, max_length=4096)]
    weight: Annotated[int, Field(ge=1, le=1000)] = 1
    priority: Annotated[int, Field(ge=-10, le=10)] = 0
    model_alias: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    system_prompt: Annotated[str, Field(min_length=1, max_length=1 << 16)] | None = None
    share_prefix_cache_with: Annotated[list[Name], Field(max_length=MAX_TENANTS)] = []
    limits: TenantLimits = TenantLimits()

    @property
    def keys_folder(self) -> Path:
        """The folder with its keys."""
        return Path(self.keys_path)

    def share(self, *, n_routers: int = 1) -> Share:
        """Return what the tenant is entitled to in one of several routers: its part, rounded up."""
        return Share(
            weight=self.weight,
            priority=self.priority,
            max_running=_part(self.limits.max_concurrent_requests, n_routers),
            max_queued=_part(self.limits.max_queued_requests, n_routers),
        )


class TenantsDocument(_Part):
    """The whole file.

    Attributes:
        version: of the format.
        model: the model's name.
        tenants: the tenants, in the file's order.
        router_replicas: routers that share the limits, if the file tells.
    """

    version: Literal[1]
    model: Annotated[str, Field(min_length=1, max_length=253)]
    tenants: Annotated[list[Tenant], Field(max_length=MAX_TENANTS)]
    router_replicas: Annotated[int, Field(ge=1, le=1024)] | None = None

    @model_validator(mode="after")
    def _check_names(self) -> TenantsDocument:
        names = [tenant.name for tenant in self.tenants]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"tenants: got the name {twice!r} twice, expected each once")
        return self

    @classmethod
    def loads(cls, content: bytes) -> TenantsDocument:
        """Read the file's content; raises DocumentError that names the field."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            raise DocumentError(_told(error.errors(include_url=False)[0])) from None


def _part(limit: int | None, n_routers: int) -> int | None:
    return None if limit is None else -(-limit // n_routers)


def _told(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in fault["loc"]).lstrip(".")
    if fault["type"] == "json_invalid":
        return f"not JSON: {fault['ctx']['error']}"
    if fault["type"] == "missing":
        return f"{path}: missing"
    if fault["type"] == "extra_forbidden":
        return f"{path}: got a field that is not known here"
    shown = repr(fault["input"])[:MAX_SHOWN_LENGTH]
    return f"{path or 'tenants file'}: got {shown}, {_expected(str(fault['msg']))}"


def _expected(message: str) -> str:
    return "expected " + message.removeprefix("Input should be ").removeprefix("Input should ")
