"""The Tenant: who may call which models, how much, and with which keys.

The same types parse documents of `faasmoe up` and objects of the Kubernetes API. `spec.tenants` of
a MoEModel is the short form, for one model; `Tenant.from_short_form` is what it stands for, and
`Tenant.for_model` the reverse: what one model's routers need to know of a tenant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, BeforeValidator, Field, ValidationError, model_validator

from faasmoe_operator.api.v1alpha1.base import (
    KUBERNETES_ONLY,
    LIST_TYPE_SET,
    PROCESS_ONLY,
    ApiModel,
    cel_rule,
    list_type_map,
    model_validations,
    validate_unique,
    validation_error,
)
from faasmoe_operator.api.v1alpha1.field_types import (
    DNSLabel,
    Labels,
    LocalObjectReference,
    SecretKey,
)
from faasmoe_operator.api.v1alpha1.networking import HostName
from faasmoe_operator.api.v1alpha1.tenants import (
    MaxTokens,
    ModelAlias,
    PerMinuteLimit,
    TenantLimitsSpec,
    TenantSpec,
)
from faasmoe_operator.api.v1alpha1.validation import format_validation_errors
from faasmoe_operator.errors import MoEModelError

TENANT_KIND = "Tenant"
_METADATA_FIELDS = ("name", "namespace", "labels", "annotations")
SystemPrompt = Annotated[str, Field(min_length=1, max_length=8192)]
Amount = Annotated[float, Field(ge=0, le=1e15, strict=False)]
MAX_MODELS = 256


def _parse_time(value: Any) -> Any:
    """Accept a time as YAML and JSON have it: parsed already, or as text."""
    if not isinstance(value, str):
        return value
    try:
        return datetime.fromisoformat(value)
    except ValueError:
        return value


class TenantKeySpec(ApiModel):
    """What is known of one API key, by the name of its file or of its key in the Secret."""

    name: SecretKey = Field(description="Name of the file, or of the key in the Secret's data.")
    expires_at: Annotated[AwareDatetime, BeforeValidator(_parse_time)] | None = Field(
        None,
        description="When the key ends to be accepted, such as 2027-01-31T00:00:00Z; never if "
        "omitted.",
    )


class TenantModelSpec(ApiModel):
    """A model that a tenant may use."""

    name: DNSLabel = Field(description="Name of the MoEModel.")
    alias: ModelAlias | None = Field(
        None, description="An additional name of the model for this tenant."
    )
    system_prompt: SystemPrompt | None = Field(
        None, description="System prompt that precedes the messages of each chat."
    )
    max_output_tokens: MaxTokens | None = Field(
        None, description="Maximum tokens of a completion of this model."
    )


class ModelSelectorSpec(ApiModel):
    """Selects MoEModels by their labels."""

    match_labels: Labels = Field(description="Labels that a MoEModel has, all of them.")


class TenantLimits(TenantLimitsSpec):
    """Limits over all models of a tenant; an omitted field is no limit."""

    input_tokens_per_minute: PerMinuteLimit | None = Field(None, description="Tokens of prompts.")
    output_tokens_per_minute: PerMinuteLimit | None = Field(
        None, description="Tokens of completions."
    )


class BudgetSpec(ApiModel):
    """What a tenant may use of something in each calendar day or month, in UTC."""

    unit: Literal["inputTokens", "outputTokens", "money"] = Field(
        description="What is limited; money is in the currency of the prices."
    )
    period: Literal["day", "month"] = Field(description="When it begins anew.")
    limit: Amount = Field(description="How much; requests are refused once it is used.")
    soft_percent: int = Field(
        80, ge=1, le=100, description="Percentage of the limit from which on responses say so."
    )


class PricesSpec(ApiModel):
    """Prices of tokens."""

    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$", max_length=3)] = Field(
        "USD", description="Code of the currency, by ISO 4217."
    )
    input_per_million_tokens: Amount = Field(description="Of a million tokens of prompts.")
    output_per_million_tokens: Amount = Field(description="Of a million generated tokens.")


class TenantResourceSpec(ApiModel):
    """Who a tenant is and what it may use."""

    model_config = model_validations(
        cel_rule(
            "has(self.apiKeysSecretRef)",
            "expected apiKeysSecretRef: {name: SECRET}, a Secret whose every value is an API key",
            field=".apiKeysSecretRef",
            reason="FieldValueRequired",
        ),
        cel_rule(
            "(has(self.models) && size(self.models) > 0) || has(self.modelSelector)",
            "expected a model, or a modelSelector",
            field=".models",
            reason="FieldValueRequired",
        ),
        cel_rule(
            "has(self.prices) || !has(self.budgets) || "
            "self.budgets.all(budget, budget.unit != 'money')",
            "expected prices, as there is a budget in money",
            field=".prices",
            reason="FieldValueRequired",
        ),
    )

    api_keys_secret_ref: LocalObjectReference | None = Field(
        None,
        description="Secret in the tenant's namespace; the value of each of its keys is an API "
        "key.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    api_keys_path: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        None,
        description="Folder, relative to the file; each file in it is an API key.",
        json_schema_extra=PROCESS_ONLY,
    )
    keys: tuple[TenantKeySpec, ...] = Field(
        (),
        strict=False,
        max_length=100,
        description="Keys that expire. Others are accepted until they are removed.",
        json_schema_extra=list_type_map("name"),
    )
    weight: int = Field(
        1, ge=1, le=1000, description="Relative share of the tokens under contention."
    )
    priority: int = Field(
        0, ge=-10, le=10, description="Tenants of higher priority are served first."
    )
    models: tuple[TenantModelSpec, ...] = Field(
        (),
        strict=False,
        max_length=MAX_MODELS,
        description="Models that the tenant may use.",
        json_schema_extra=list_type_map("name"),
    )
    model_selector: ModelSelectorSpec | None = Field(
        None, description="Further models that the tenant may use, by their labels."
    )
    share_prefix_cache_with: tuple[DNSLabel, ...] = Field(
        (),
        strict=False,
        max_length=16,
        description="Tenants with which it shares cached prefixes, in both directions.",
        json_schema_extra=LIST_TYPE_SET,
    )
    host: HostName | None = Field(
        None,
        description="Host name that requests of this tenant alone may have; without it, its key or "
        "the path /NAME/v1 says whose a request is.",
    )
    limits: TenantLimits = Field(
        default_factory=lambda: TenantLimits.model_validate({}),
        description="Limits over all models; an omitted field is no limit.",
    )
    budgets: tuple[BudgetSpec, ...] = Field(
        (),
        strict=False,
        max_length=6,
        description="Budgets over all models.",
        json_schema_extra=list_type_map("unit", "period"),
    )
    prices: PricesSpec | None = Field(
        None, description="Prices for this tenant, on which budgets in money depend."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.api_keys_secret_ref is None and self.api_keys_path is None:
            expected = "a Secret; for `faasmoe up` a folder in apiKeysPath"
            raise validation_error("apiKeysSecretRef", got=None, expected=expected)
        if not self.models and self.model_selector is None:
            raise validation_error("models", got=None, expected="a model, or a modelSelector")
        validate_unique("models", [model.name for model in self.models], key="name")
        validate_unique("keys", [key.name for key in self.keys], key="name")
        validate_unique("sharePrefixCacheWith", self.share_prefix_cache_with)
        budgets = [f"{budget.unit} per {budget.period}" for budget in self.budgets]
        validate_unique("budgets", budgets, key="unit")
        if self.prices is None:
            for index, budget in enumerate(self.budgets):
                if budget.unit == "money":
                    raise validation_error(
                        f"budgets.{index}.unit", got="money", expected="spec.prices beside it"
                    )
        return self


class TenantMeta(ApiModel):
    """Metadata of the object; `name` is the first segment of the tenant's URL."""

    name: DNSLabel
    namespace: DNSLabel | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class Tenant(ApiModel):
    """A tenant, over any number of models."""

    api_version: Literal["faasmoe.dev/v1alpha1"]
    kind: Literal["Tenant"]
    metadata: TenantMeta
    spec: TenantResourceSpec

    @classmethod
    def from_object(cls, obj: Mapping[str, Any]) -> Self:
        """Parse an object of the Kubernetes API.

        Args:
            obj: the object; its status and other metadata fields are ignored.

        Raises:
            MoEModelError: the object is invalid, or names no Secret.
        """
        raw = obj.get("metadata", {})
        metadata = {name: raw[name] for name in _METADATA_FIELDS if name in raw}
        value = {name: obj[name] for name in ("apiVersion", "kind", "spec") if name in obj}
        object_name = f"{raw.get('namespace', 'default')}/{raw.get('name', '')}"
        try:
            tenant = cls.model_validate({**value, "metadata": metadata})
        except ValidationError as error:
            raise MoEModelError(object_name, format_validation_errors(error, cls)) from error
        if tenant.spec.api_keys_secret_ref is None:
            expected = "{name: SECRET}, a Secret whose every value is an API key"
            raise MoEModelError(
                object_name, [f"spec.apiKeysSecretRef: missing, expected {expected}"]
            )
        return tenant

    @classmethod
    def from_short_form(cls, tenant: TenantSpec, *, model: str) -> Self:
        """Return what an entry of a model's spec.tenants stands for."""
        served = {
            "name": model,
            "alias": tenant.model_alias,
            "systemPrompt": tenant.system_prompt,
        }
        spec = tenant.model_dump(
            mode="json",
            by_alias=True,
            exclude_none=True,
            exclude={"name", "model_alias", "system_prompt"},
        )
        models = [{name: value for name, value in served.items() if value is not None}]
        return cls.model_validate(
            {
                "apiVersion": "faasmoe.dev/v1alpha1",
                "kind": TENANT_KIND,
                "metadata": {"name": tenant.name},
                "spec": {**spec, "models": models},
            }
        )

    def models_among(self, labels: Mapping[str, Mapping[str, str]]) -> dict[str, TenantModelSpec]:
        """Return the models that the tenant may use, by name.

        Args:
            labels: labels of all models by name.
        """
        models = {model.name: model for model in self.spec.models if model.name in labels}
        if self.spec.model_selector is not None:
            wanted = self.spec.model_selector.match_labels.items()
            for name, own in labels.items():
                if name not in models and wanted <= own.items():
                    models[name] = TenantModelSpec.model_validate({"name": name})
        return models

    def for_model(self, model: TenantModelSpec, *, tenants: Iterable[str]) -> TenantSpec:
        """Return the short form for one of its models, without limits over several models.

        Args:
            model: the model.
            tenants: names of all tenants that may use it.
        """
        limits = self.spec.limits
        outputs = [n for n in (limits.max_output_tokens, model.max_output_tokens) if n is not None]
        kept = {
            "maxConcurrentRequests": limits.max_concurrent_requests,
            "maxQueuedRequests": limits.max_queued_requests,
            "maxModelLen": limits.max_model_len,
            "maxOutputTokens": min(outputs, default=None),
        }
        sharing = [n for n in self.spec.share_prefix_cache_with if n in set(tenants)]
        secret = self.spec.api_keys_secret_ref
        fields: dict[str, Any] = {
            "name": self.metadata.name,
            "apiKeysSecretRef": None if secret is None else secret.to_object(),
            "apiKeysPath": self.spec.api_keys_path,
            "weight": self.spec.weight,
            "priority": self.spec.priority,
            "limits": {name: value for name, value in kept.items() if value is not None},
            "modelAlias": model.alias,
            "systemPrompt": model.system_prompt,
            "sharePrefixCacheWith": sharing,
        }
        return TenantSpec.model_validate(
            {name: value for name, value in fields.items() if value is not None}
        )
