"""The router: the process, or the pods, that keep all but the routed experts."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from faasmoe_operator.spec.base import Part, rule_broken
from faasmoe_operator.spec.environment import (
    MAX_VARIABLES,
    VARIABLES,
    EnvironmentVariable,
    check_variables,
)
from faasmoe_operator.spec.extensions import KUBERNETES_ONLY, cel, rules
from faasmoe_operator.spec.pod_template import PodTemplate
from faasmoe_operator.spec.quantity import ByteQuantity, to_bytes

Device = Literal["auto", "cpu", "cuda"]


class Router(Part):
    """The process that keeps all but the routed experts and answers the OpenAI API."""

    model_config = rules(
        cel(
            "self.maxNumBatchedTokens >= self.maxNumSeqs",
            "expected at least maxNumSeqs: each request decodes a token a step",
            field=".maxNumBatchedTokens",
        ),
        cel(
            "!has(self.env) || !has(self.template) || !has(self.template.env) || "
            "self.env.all(own, !self.template.env.exists(other, other.name == own.name))",
            "expected each name once in env and template.env together",
            field=".env",
            reason="FieldValueDuplicate",
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
    env: tuple[EnvironmentVariable, ...] = Field(
        (),
        strict=False,
        max_length=MAX_VARIABLES,
        description="Additions to its environment.",
        json_schema_extra=VARIABLES,
    )
    template: PodTemplate = Field(
        default_factory=lambda: PodTemplate.model_validate({}),
        description="What its pods are like.",
        json_schema_extra=KUBERNETES_ONLY,
    )

    @property
    def kv_cache_bytes(self) -> int | None:
        """What the KV cache may take; None for the router's own default."""
        return None if self.kv_cache_memory is None else to_bytes(self.kv_cache_memory)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise rule_broken(
                "maxNumBatchedTokens",
                got=self.max_num_batched_tokens,
                expected=f"at least maxNumSeqs ({self.max_num_seqs}): each decodes a token a step",
            )
        check_variables([variable.name for variable in self.env])
        others = {variable.name for variable in self.template.env}
        for index, variable in enumerate(self.env):
            if variable.name in others:
                expected = "each name once in env and template.env together"
                raise rule_broken(f"env.{index}.name", got=variable.name, expected=expected)
        return self
