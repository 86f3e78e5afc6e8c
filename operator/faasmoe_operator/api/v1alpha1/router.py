"""The router: serves the OpenAI API and computes everything but the routed experts."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from faasmoe_operator.api.v1alpha1.base import (
    KUBERNETES_ONLY,
    LIST_TYPE_SET,
    ApiModel,
    cel_rule,
    model_validations,
    validation_error,
    validations,
)
from faasmoe_operator.api.v1alpha1.field_types import ByteQuantity, quantity_to_bytes
from faasmoe_operator.api.v1alpha1.patterns import CORS_ORIGIN, MODEL_NAME
from faasmoe_operator.api.v1alpha1.pod_template import (
    ENV_LIST_TYPE,
    MAX_ENV_VARS,
    LiteralEnvVar,
    PodTemplateSpec,
    validate_env_names,
)

API_PORT = 8000  # on Kubernetes
MAX_REPLICAS = 64
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
PARSER_NAME = "^[a-z0-9_.-]+$"
QUANTIZATION_IMMUTABLE = validations(
    cel_rule(
        "self == oldSelf",
        "immutable: create another MoEModel for another quantization",
        reason="FieldValueForbidden",
    )
)


class EngineArgsSpec(ApiModel):
    """Arguments of vLLM's engine, under vLLM's names."""

    enforce_eager: bool | None = Field(
        None,
        description="Leaves the model uncompiled; if omitted, only on a CPU, where compiling takes "
        "minutes at each start.",
    )
    enable_prefix_caching: bool | None = Field(
        None, description="Shares the KV cache of equal prefixes; vLLM's default if omitted."
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Part of the GPU's memory for model and KV cache."
    )
    max_logprobs: Annotated[int, Field(ge=0, le=1000)] | None = Field(
        None, description="Most log-probabilities that a request may ask for with a token."
    )
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None,
        description="Devices, or on a CPU groups of cores, that compute each layer together; the "
        "first calls functions.",
    )
    tool_call_parser: Annotated[str, Field(pattern=PARSER_NAME, max_length=64)] | None = Field(
        None,
        description="vLLM's parser of tool calls, instead of the one of the model's family; none "
        "for none: requests with tools then get 400.",
    )
    reasoning_parser: Annotated[str, Field(pattern=PARSER_NAME, max_length=64)] | None = Field(
        None,
        description="vLLM's parser of reasoning, instead of the one of the model's family; none "
        "for none.",
    )


class RouterScalingSpec(ApiModel):
    """How many routers run, by the requests that wait or run."""

    model_config = model_validations(
        cel_rule(
            "self.maxReplicas >= self.minReplicas",
            "expected at least minReplicas",
            field=".maxReplicas",
        )
    )

    min_replicas: int = Field(
        0,
        ge=0,
        le=MAX_REPLICAS,
        description="Routers that always run; 0 lets the last one end, and the next request starts "
        "it.",
    )
    max_replicas: int = Field(
        1, ge=1, le=MAX_REPLICAS, description="Routers that run at most; at least minReplicas."
    )
    target_concurrency: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None,
        description="Requests that wait or run for each router, above which another one starts; "
        "maxNumSeqs if omitted.",
    )
    idle_seconds: int = Field(
        300,
        ge=10,
        le=3600,
        description="How long no request has run or waited before the last router ends, and the "
        "window over which requests are averaged.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_replicas < self.min_replicas:
            expected = f"minReplicas ({self.min_replicas}) or more"
            raise validation_error("maxReplicas", got=self.max_replicas, expected=expected)
        return self


class RouterSpec(ApiModel):
    """The router, which serves the OpenAI API and computes everything but the routed experts."""

    model_config = model_validations(
        cel_rule(
            "self.maxNumBatchedTokens >= self.maxNumSeqs",
            "expected at least maxNumSeqs: each request decodes one token per step",
            field=".maxNumBatchedTokens",
        ),
        cel_rule(
            "!has(self.scaling) || self.replicas == 1",
            "expected none with scaling, whose maxReplicas says how many may run",
            field=".replicas",
        ),
        cel_rule(
            "!has(self.engineArgs) || self.engine != 'transformers'",
            "expected none with engine transformers: they are vLLM's arguments",
            field=".engineArgs",
        ),
        cel_rule(
            "self.engine != 'vllm' || self.compute == 'auto'",
            "expected auto with engine vllm, which computes the model itself",
            field=".compute",
        ),
        cel_rule(
            "!has(self.kvCacheMemory) || !has(self.engineArgs) || "
            "!has(self.engineArgs.gpuMemoryUtilization)",
            "expected only one of engineArgs.gpuMemoryUtilization and kvCacheMemory",
            field=".kvCacheMemory",
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
        description="Number of routers that share the load; `suspend` deletes all of them.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    scaling: RouterScalingSpec | None = Field(
        None,
        description="How many routers run, by the requests that gateways have: those of `faasmoe "
        "up`, or of the chart (`gateway.enabled`), without which at least one always runs. If "
        "omitted, `faasmoe up` runs one, and Kubernetes `replicas`.",
    )
    engine: Literal["auto", "transformers", "vllm"] = Field(
        "auto",
        description="What runs the model: transformers is the router's own engine, vllm is vLLM's, "
        "with the routed experts as functions; auto is vllm where it is installed and serves the "
        "model's architecture.",
    )
    engine_args: EngineArgsSpec | None = Field(
        None, description="Arguments of vLLM's engine; not with engine transformers."
    )
    device: Device = Field(
        "auto", description="Compute device; auto selects a CUDA device if there is one."
    )
    dtype: Dtype = Field(
        "auto",
        description="Dtype that the router computes in; functions use that of the store. auto is "
        "the store's dtype, except on CPUs without fast products in it (x86 without AVX-512 for "
        "bfloat16, without AVX512-FP16 for float16), where it is float32. The operator does not "
        "know the nodes' CPUs: with auto it reserves memory for float32 unless `device` is cuda.",
    )
    compute: Literal["auto", "modules", "torch"] = Field(
        "auto",
        description="What computes the router's part of the model on a CPU in float32: auto is one "
        "call of the kernel library for all decoder layers, where that computes what transformers' "
        "modules do; modules is these with the library's linear layers and attention; torch leaves "
        "the library unused. Elsewhere torch computes.",
    )
    quantization: Literal["none", "int8", "int4"] = Field(
        "none",
        description="Scheme that the weights of the router's linear layers are stored in; "
        "embeddings, norms and gates are not quantised, and with int4 the LM head is int8.",
        json_schema_extra=QUANTIZATION_IMMUTABLE,
    )
    max_model_len: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None,
        description="Maximum tokens of a prompt and its completion; the model's context length if "
        "omitted.",
    )
    max_num_seqs: int = Field(
        32, ge=1, le=4096, description="Maximum number of requests in one batch."
    )
    max_num_batched_tokens: int = Field(
        512, ge=1, le=1_000_000, description="Maximum number of tokens in one step."
    )
    max_waiting: int = Field(
        1024,
        ge=0,
        le=1_000_000,
        description="Maximum number of queued requests; further ones get status 429.",
    )
    keep_alive_seconds: Annotated[int, Field(ge=1, le=3600)] | None = Field(
        None,
        description="How long an unused connection of a client is kept, in seconds; more than the "
        "load balancer in front keeps it. 75 if omitted.",
    )
    metrics_port: Annotated[int, Field(ge=1024, le=65535)] | None = Field(
        None,
        description="Port of /metrics alone, which clients of the API cannot reach; 8001 on "
        "Kubernetes if omitted, the port of the API on one machine.",
    )
    termination_grace_period_seconds: int = Field(
        60,
        ge=30,
        le=3600,
        description="Time that a router pod has to end, in seconds; running responses get all of "
        "it but 20 s, and are then ended with an error.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    kv_cache_memory: ByteQuantity | None = Field(
        None,
        description="Memory of the KV cache; if omitted, 2Gi or what one request of full length "
        "needs.",
    )
    served_model_name: Annotated[str, Field(pattern=MODEL_NAME, max_length=256)] | None = Field(
        None,
        description="Name by which requests address the model, such as ORG/NAME; the MoEModel's "
        "own name if omitted.",
    )
    cors_origins: tuple[Annotated[str, Field(pattern=CORS_ORIGIN, max_length=256)], ...] = Field(
        (),
        strict=False,
        max_length=64,
        description="Origins of web pages that may call the API, such as https://chat.example.com; "
        "* is any.",
        json_schema_extra=LIST_TYPE_SET,
    )
    generation_config: Literal["auto", "none"] = Field(
        "auto",
        description="auto takes sampling defaults (temperature, top_p, ...) from the checkpoint's "
        "generation_config.json, as vLLM does; none ignores them.",
    )
    env: tuple[LiteralEnvVar, ...] = Field(
        (),
        strict=False,
        max_length=MAX_ENV_VARS,
        description="Additional environment variables.",
        json_schema_extra=ENV_LIST_TYPE,
    )
    template: PodTemplateSpec = Field(
        default_factory=lambda: PodTemplateSpec.model_validate({}),
        description="Settings of the router's pods.",
        json_schema_extra=KUBERNETES_ONLY,
    )

    @property
    def kv_cache_bytes(self) -> int | None:
        """Memory of the KV cache in bytes; None for the router's default."""
        return None if self.kv_cache_memory is None else quantity_to_bytes(self.kv_cache_memory)

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        arguments = self.engine_args
        if arguments is not None and self.engine == "transformers":
            raise validation_error(
                "engineArgs",
                got=arguments.to_object(),
                expected="none with engine transformers: they are vLLM's arguments",
            )
        if self.engine == "vllm" and self.compute != "auto":
            raise validation_error(
                "compute",
                got=self.compute,
                expected="auto with engine vllm, which computes the model itself",
            )
        if (
            self.kv_cache_memory is not None
            and arguments is not None
            and arguments.gpu_memory_utilization is not None
        ):
            raise validation_error(
                "kvCacheMemory",
                got=self.kv_cache_memory,
                expected="only one of engineArgs.gpuMemoryUtilization and kvCacheMemory",
            )
        return self

    @property
    def engine_arguments(self) -> str | None:
        """The arguments of vLLM's engine as JSON, under vLLM's names; None without any."""
        if self.engine_args is None:
            return None
        return self.engine_args.model_dump_json(exclude_none=True)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scaling is not None and self.replicas != 1:
            raise validation_error(
                "replicas",
                got=self.replicas,
                expected="none with scaling, whose maxReplicas says how many may run",
            )
        if self.metrics_port == API_PORT:
            raise validation_error(
                "metricsPort", got=API_PORT, expected="another port than that of the API"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise validation_error(
                "maxNumBatchedTokens",
                got=self.max_num_batched_tokens,
                expected=f"at least maxNumSeqs ({self.max_num_seqs}), as each request decodes one "
                "token per step",
            )
        validate_env_names([variable.name for variable in self.env])
        template_names = {variable.name for variable in self.template.env}
        for index, variable in enumerate(self.env):
            if variable.name in template_names:
                expected = "each name once in env and template.env together"
                raise validation_error(f"env.{index}.name", got=variable.name, expected=expected)
        return self
