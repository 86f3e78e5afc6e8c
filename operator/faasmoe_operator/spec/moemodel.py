"""The MoEModel: one Mixture-of-Experts model and how it is served.

The same models read a file for `faasmoe up` and are the source of the CRD. Only what is honoured
is here: an unknown key is refused, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from faasmoe_operator.spec.base import Part, rule_broken
from faasmoe_operator.spec.scaling import Scaling

API_VERSION = "faasmoe.dev/v1alpha1"
KIND = "MoEModel"
LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
SOURCE = r"^(hf://[\w.-]+/[\w.-]+|file://.+)$"
RESERVED_ENV_PREFIX = "FAASMOE_"

Label = Annotated[str, Field(pattern=LABEL, max_length=63)]
Device = Literal["auto", "cpu", "cuda"]


class Metadata(Part):
    """What Kubernetes calls the object; `name` is also the model's name in the OpenAI API."""

    name: Label
    namespace: Label | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class ModelSource(Part):
    """Where the checkpoint comes from."""

    source: Annotated[str, Field(pattern=SOURCE, max_length=4096)] = Field(
        description="hf://ORG/NAME, file:///PATH, or file://PATH relative to the MoEModel file."
    )
    revision: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="Branch, tag or commit of a hub model; the hub's default if left out."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Number format to serve in; auto keeps the checkpoint's."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.revision is not None and not self.source.startswith("hf://"):
            raise rule_broken("revision", got=self.revision, expected="none unless source is hf://")
        return self


class StoreLocation(Part):
    """Where the prepared checkpoint lies."""

    path: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        None,
        description="Folder, relative to the MoEModel file; .faasmoe/NAME beside it if left out.",
    )


class Granularity(Part):
    """How the experts are cut into functions."""

    experts_per_function: Annotated[int, Field(ge=1, le=10_000)] | Literal["auto"] = Field(
        "auto", description="Experts of a layer in one function; auto makes about 3 blocks a layer."
    )
    layers_per_function: int = Field(
        1, ge=1, le=1000, description="Layers whose block is in the same function."
    )


class EnvironmentVariable(Part):
    """A variable in the environment of a process."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256)]
    value: Annotated[str, Field(max_length=32_768)] = ""


class Router(Part):
    """The process that keeps all but the routed experts and answers the OpenAI API."""

    device: Device = Field("auto", description="auto takes a CUDA device if there is one.")
    max_model_len: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None, description="Tokens of a prompt and its answer; the model's context if left out."
    )
    max_num_seqs: int = Field(32, ge=1, le=4096, description="Requests in one batch.")
    max_num_batched_tokens: int = Field(512, ge=1, le=1_000_000, description="Tokens in one step.")
    env: tuple[EnvironmentVariable, ...] = Field(
        (), strict=False, max_length=256, description="Additions to its environment."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise rule_broken(
                "maxNumBatchedTokens",
                got=self.max_num_batched_tokens,
                expected=f"at least maxNumSeqs ({self.max_num_seqs}): each decodes a token a step",
            )
        self._check_env()
        return self

    def _check_env(self) -> None:
        names = [variable.name for variable in self.env]
        for index, name in enumerate(names):
            if name.startswith(RESERVED_ENV_PREFIX):
                raise rule_broken(
                    f"env.{index}.name",
                    got=name,
                    expected=f"a name without the prefix {RESERVED_ENV_PREFIX}",
                )
            if name in names[:index]:
                raise rule_broken(f"env.{index}.name", got=name, expected="each name once")


class Experts(Part):
    """The sandboxes, and how the functions in them scale."""

    device: Device = Field("auto", description="auto takes a CUDA device if there is one.")
    threads: int = Field(1, ge=1, le=256, description="Compute threads of a sandbox.")
    functions_per_sandbox: int = Field(1, ge=1, le=10_000, description="Capacity of a sandbox.")
    warm_pool: int = Field(1, ge=0, le=1000, description="Generic sandboxes kept ready.")
    scaling: Scaling = Field(default_factory=lambda: Scaling.model_validate({}))


def _auto(value: Any) -> Any:
    return {} if value == "auto" else value


class ModelSpec(Part):
    """What is asked for."""

    model: ModelSource
    store: StoreLocation = Field(default_factory=lambda: StoreLocation.model_validate({}))
    granularity: Annotated[Granularity, BeforeValidator(_auto)] = Field(
        default_factory=lambda: Granularity.model_validate({})
    )
    router: Router = Field(default_factory=lambda: Router.model_validate({}))
    experts: Experts = Field(default_factory=lambda: Experts.model_validate({}))


class MoEModel(Part):
    """One model and how it is served."""

    api_version: Literal["faasmoe.dev/v1alpha1"]
    kind: Literal["MoEModel"]
    metadata: Metadata
    spec: ModelSpec
