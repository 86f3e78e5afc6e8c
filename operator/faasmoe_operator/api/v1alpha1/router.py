"""The router: the process, or the pods, that keep all but the routed experts."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from faasmoe_operator.api.v1alpha1.base import (
    KUBERNETES_ONLY,
    ApiModel,
    cel_rule,
    model_validations,
    validation_error,
)
from faasmoe_operator.api.v1alpha1.field_types import ByteQuantity, quantity_to_bytes
from faasmoe_operator.api.v1alpha1.pod_template import (
    ENV_LIST_TYPE,
    MAX_ENV_VARS,
    LiteralEnvVar,
    PodTemplateSpec,
    validate_env_names,
)

Device = Literal["auto", "cpu", "cuda"]


class RouterSpec(ApiModel):
    """The process that keeps all but the routed experts and answers the OpenAI API."""

    model_config = model_validations(
        cel_rule(
            "self.maxNumBatchedTokens >= self.maxNumSeqs",
            "expected at least maxNumSeqs: each request decodes a token a step",
            field=".maxNumBatchedTokens",
        ),
        cel_rule(
            "!has(self.env) || !has(self.template) || !has(self.template.env) || "
            "self.env.all(own, !self.template.env.exists(other, other.name == own.name))",
            "expected each name once in env and template.env together",
            field=".env",
        ),
    )

    replicas: int = Field(
        1,
        ge=1,
        le=64,
        description="Routers that share the load; `suspend` takes all away.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    device: Device = Field("auto", description="auto takes a CUDA device if there is one.")
    max_model_len: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None, description="Tokens of a prompt and its answer; the model's context if left out."
    )
    max_num_seqs: int = Field(32, ge=1, le=4096, description="Requests in one batch.")
    max_num_batched_tokens: int = Field(512, ge=1, le=1_000_000, description="Tokens in one step.")
    max_waiting: int = Field(
        1024, ge=0, le=1_000_000, description="Requests that wait beyond those; more get a 429."
    )
    kv_cache_memory: ByteQuantity | None = Field(
        None,
        description="What the KV cache may take; 2Gi, or what one request of full length needs, "
        "if left out.",
    )
    env: tuple[LiteralEnvVar, ...] = Field(
        (),
        strict=False,
        max_length=MAX_ENV_VARS,
        description="Additions to its environment.",
        json_schema_extra=ENV_LIST_TYPE,
    )
    template: PodTemplateSpec = Field(
        default_factory=lambda: PodTemplateSpec.model_validate({}),
        description="What its pods are like.",
        json_schema_extra=KUBERNETES_ONLY,
    )

    @property
    def kv_cache_bytes(self) -> int | None:
        """What the KV cache may take; None for the router's own default."""
        return None if self.kv_cache_memory is None else quantity_to_bytes(self.kv_cache_memory)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise validation_error(
                "maxNumBatchedTokens",
                got=self.max_num_batched_tokens,
                expected=f"at least maxNumSeqs ({self.max_num_seqs}): each decodes a token a step",
            )
        validate_env_names([variable.name for variable in self.env])
        template_names = {variable.name for variable in self.template.env}
        for index, variable in enumerate(self.env):
            if variable.name in template_names:
                expected = "each name once in env and template.env together"
                raise validation_error(f"env.{index}.name", got=variable.name, expected=expected)
        return self
