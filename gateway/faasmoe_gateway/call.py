"""A request whose caller and model are known: what it asks for, and on which terms."""

from __future__ import annotations

from dataclasses import dataclass

from faasmoe_contracts.gateway_file import ModelEntry, TenantEntry, TenantModelEntry
from faasmoe_gateway.accounts import TenantAccount
from faasmoe_gateway.refusal import Refusal, invalid_api_key, model_not_found
from faasmoe_gateway.request_body import RequestedWork, body_too_large, read_work
from faasmoe_gateway.router_choice import affinity_key
from faasmoe_gateway.tenant_directory import TenantDirectory

COMPLETIONS_PATH = "/v1/completions"
DEFAULT_COMPLETION_TOKENS = 16  # as the router's
GENERATING_PATHS = (COMPLETIONS_PATH, "/v1/chat/completions", "/v1/responses", "/v1/messages")


@dataclass(slots=True)
class Call:
    """A request whose caller and model are known.

    Attributes:
        path: its path, without a tenant's name.
        tenant: whose it is; None if everyone may use every model.
        account: the tenant's account.
        model: the model.
        terms: on which terms the tenant may use it.
        work: what it asks for.
    """

    path: str
    tenant: TenantEntry | None
    account: TenantAccount | None
    model: ModelEntry
    terms: TenantModelEntry
    work: RequestedWork

    @property
    def generates(self) -> bool:
        """Whether tokens are generated."""
        return self.path in GENERATING_PATHS

    @property
    def max_input_tokens(self) -> int:
        """The most tokens that its prompts may have."""
        return min(self.work.n_bytes, self.work.n_choices * self.model.max_model_len)

    @property
    def max_output_tokens(self) -> int:
        """The most tokens that it may generate."""
        asked = self.work.max_output_tokens
        if asked is None and self.path == COMPLETIONS_PATH:
            asked = DEFAULT_COMPLETION_TOKENS
        bounds = [asked, self.terms.max_output_tokens]
        known = [bound for bound in bounds if bound is not None]
        return min([*known, self.model.max_model_len]) * self.work.n_choices

    @property
    def affinity(self) -> bytes:
        """What it shares with requests that a router's KV cache may know."""
        name = "" if self.tenant is None else self.tenant.name
        return affinity_key(name, session=self.work.session, prefix=self.work.prefix)


async def read_call(
    body: bytes | None,
    path: str,
    tenant: TenantEntry | None,
    account: TenantAccount | None,
    *,
    encoding: str,
    directory: TenantDirectory,
) -> Call:
    """Return the call that a body makes; raises Refusal.

    Args:
        body: as it was sent; None for one that is too large.
        path: its path, without a tenant's name.
        tenant: who calls; None for anybody.
        account: the tenant's account.
        encoding: the body's Content-Encoding; empty for none.
        directory: models and tenants, as they are once the body is there.
    """
    if body is None:
        raise body_too_large()
    work = await read_work(body, encoding=encoding)
    if tenant is not None and tenant.name not in directory.tenants:  # removed while it came
        raise invalid_api_key()
    names = directory.names_for(tenant)
    name = work.model
    if name is None:
        models = {model.name for model, _ in names.values()}
        if len(models) != 1:
            raise Refusal(
                "model: got nothing, expected the name of a model; GET /v1/models lists them",
                status=400,
                code="missing_required_parameter",
                param="model",
            )
        name = next(iter(names))
    if name not in names:
        raise model_not_found(name)
    return Call(path, tenant, account, *names[name], work)
