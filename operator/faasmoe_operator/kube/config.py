"""Settings of the operator, read from its environment."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from faasmoe_contracts.environment import integer_between, split_at_commas, true_or_false
from faasmoe_operator.env_settings import EnvSettings
from faasmoe_operator.kube.manifests import ControlEndpoint, Images
from faasmoe_operator.kube.manifests.context import USER_ID, GatewayPods
from faasmoe_operator.kube.manifests.names import MODELS_TLS_SECRET

PREFIX = "FAASMOE_OPERATOR_"
MAX_WORKERS = 64
MAX_USER_ID = (1 << 31) - 1
ASSIGNED_USER = "platform"
DEFAULT_POD_LABELS = {"app.kubernetes.io/name": "faasmoe-operator"}
DEFAULT_GATEWAY_LABELS = {"app.kubernetes.io/name": "faasmoe-gateway"}
_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")

LogFormat = Literal["text", "json"]


def _check_dns_label(name: str) -> str:
    if not _DNS_LABEL.fullmatch(name):
        raise ValueError("a name of lower case letters, digits and dashes")
    return name


def _check_dns_subdomain(name: str) -> str:
    if not all(_DNS_LABEL.fullmatch(part) for part in name.split(".")):
        raise ValueError("names of lower case letters, digits and dashes")
    return name


def _check_optional_name(name: str) -> str:
    return _check_dns_subdomain(name) if name else name


def _sort_unique(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(set(names)))


def _parse_labels(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if not pairs or not all(key.strip() and equals for key, equals, _ in pairs):
        raise ValueError("KEY=VALUE, several with commas between")
    return {key.strip(): label.strip() for key, _, label in pairs}


def _parse_user_id(value: Any) -> Any:
    if value == ASSIGNED_USER:
        return None
    return integer_between(1, MAX_USER_ID)(value)


_Names = Annotated[
    tuple[Annotated[str, AfterValidator(_check_dns_subdomain)], ...],
    BeforeValidator(split_at_commas),
]


class OperatorConfig(EnvSettings):
    """Settings of an operator; each field is the variable FAASMOE_OPERATOR_FIELD.

    Attributes:
        namespace: the operator's namespace.
        pod_name: name of this process, unique among operators.
        watch_namespaces: namespaces whose MoEModels the operator manages, sorted; empty for all.
        host: address that the control API listens on.
        port: port that the control API listens on.
        metrics_port: port of /metrics alone; on the control API's port if not set.
        page_port: port on loopback of the live page, for `kubectl port-forward`; None for none.
        gateway_port: port that gateways connect to; None if no gateway runs, and Tenants are not
            served.
        gateway_secret: name of the gateways' Secret, which the operator writes.
        gateway_pod_labels: labels of the gateways' pods, for NetworkPolicies.
        control_url: URL of the control API for models' pods; by default the operator's Service.
        pod_labels: labels of the operator's pods, for NetworkPolicies.
        router_image: default image of routers and store Jobs.
        expert_image: default image of sandboxes.
        image_pull_policy: pull policy of these images.
        image_pull_secrets: names of image pull Secrets in the models' namespaces.
        run_as_user: user and group of models' pods; None ("platform") if the platform assigns them.
        root_key_secret: name of the Secret of the root key.
        leader_election: whether several operators may run, one of which is the leader.
        workers: models reconciled concurrently.
        tls: whether the operator's pods and models' speak TLS with each other.
        tls_folder: the operator's certificate, key and authorities of another issuer; None if the
            operator issues all certificates itself.
        tls_models_secret: with `tls_folder`, name of the Secrets of that issuer for models' pods,
            one in each of their namespaces.
        log_format: format of log lines.
        log_level: lowest level that is logged.
    """

    PREFIX: ClassVar[str] = PREFIX

    namespace: Annotated[str, AfterValidator(_check_dns_label)] = "faasmoe-system"
    pod_name: str = Field(default_factory=socket.gethostname)
    watch_namespaces: Annotated[_Names, AfterValidator(_sort_unique)] = ()
    host: str = "0.0.0.0"
    port: Annotated[int, BeforeValidator(integer_between(1, 65535))] = 8090
    metrics_port: Annotated[int, BeforeValidator(integer_between(1, 65535))] | None = None
    page_port: Annotated[int, BeforeValidator(integer_between(1, 65535))] | None = None
    gateway_port: Annotated[int, BeforeValidator(integer_between(1, 65535))] | None = None
    gateway_secret: str = "faasmoe-gateway"
    gateway_pod_labels: Annotated[dict[str, str], BeforeValidator(_parse_labels)] = (
        DEFAULT_GATEWAY_LABELS
    )
    control_url: str = ""
    pod_labels: Annotated[dict[str, str], BeforeValidator(_parse_labels)] = DEFAULT_POD_LABELS
    router_image: str = Field(description="an image")
    expert_image: str = Field(description="an image")
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    image_pull_secrets: _Names = ()
    run_as_user: Annotated[int | None, BeforeValidator(_parse_user_id)] = USER_ID
    root_key_secret: str = "faasmoe-root-key"
    leader_election: Annotated[bool, BeforeValidator(true_or_false)] = False
    workers: Annotated[int, BeforeValidator(integer_between(1, MAX_WORKERS))] = 8
    tls: Annotated[bool, BeforeValidator(true_or_false)] = False
    tls_folder: Path | None = None
    tls_models_secret: Annotated[str, AfterValidator(_check_optional_name)] = ""
    log_format: LogFormat = "text"
    log_level: Literal["INFO", "DEBUG", "WARNING", "ERROR"] = "INFO"

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if self.tls_folder is not None and not self.tls:
            raise ValueError(
                f"{PREFIX}TLS_FOLDER: got {self.tls_folder}, expected none without {PREFIX}TLS=true"
            )
        if (self.tls_folder is None) != (not self.tls_models_secret):
            got = repr(self.tls_models_secret) if self.tls_models_secret else "none"
            expected = f"the name of a Secret with {PREFIX}TLS_FOLDER, and none without"
            raise ValueError(f"{PREFIX}TLS_MODELS_SECRET: got {got}, expected {expected}")
        if self.tls and self.control_url and not self.control_url.startswith("https:"):
            raise ValueError(
                f"{PREFIX}CONTROL_URL: got {self.control_url}, expected https with {PREFIX}TLS=true"
            )
        return self

    @property
    def models_tls_secret(self) -> str | None:
        """Name of the Secret with the certificates of models' pods; None without TLS."""
        return (self.tls_models_secret or MODELS_TLS_SECRET) if self.tls else None

    @property
    def gateway_tls_secret(self) -> str | None:
        """Name of the gateways' Secret that the operator writes; None if it need not."""
        is_issuer = self.tls and self.tls_folder is None and self.gateway_port is not None
        return f"{self.gateway_secret}-tls" if is_issuer else None

    @property
    def identity(self) -> str:
        """Name of this process, unique among operators."""
        return self.pod_name

    @property
    def control(self) -> ControlEndpoint:
        """The control API for models' pods."""
        scheme = "https" if self.tls else "http"
        default_url = f"{scheme}://faasmoe-operator.{self.namespace}.svc:{self.port}"
        return ControlEndpoint(
            url=(self.control_url or default_url).rstrip("/"),
            namespace=self.namespace,
            pod_labels=self.pod_labels,
            port=self.port,
        )

    @property
    def gateways(self) -> GatewayPods | None:
        """The gateways' pods; None if no gateway runs."""
        if self.gateway_port is None:
            return None
        return GatewayPods(self.namespace, self.gateway_pod_labels)

    @property
    def images(self) -> Images:
        """Default images of models' pods."""
        return Images(
            router=self.router_image,
            expert=self.expert_image,
            pull_policy=self.image_pull_policy,
            pull_secrets=self.image_pull_secrets,
        )
