"""The operator's settings, read once from its environment."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from faasmoe_operator.control.config import OperatorConfigError
from faasmoe_operator.kube.manifests import ControlEndpoint, Images

PREFIX = "FAASMOE_OPERATOR_"
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
MAX_WORKERS = 64

LogFormat = Literal["json", "text"]


@dataclass(frozen=True, slots=True)
class OperatorConfig:
    """What an operator is started with; the variables are named beside the fields.

    Attributes:
        namespace: where the operator runs (NAMESPACE).
        identity: name of this process, unique among operators (POD_NAME).
        watch_namespaces: where it looks after MoEModels; empty for everywhere (WATCH_NAMESPACES).
        host: address that the control API listens on (HOST).
        control: the control API as models' pods reach it (CONTROL_URL, PORT, POD_LABELS).
        images: what models' pods run (ROUTER_IMAGE, EXPERT_IMAGE, IMAGE_PULL_POLICY,
            IMAGE_PULL_SECRETS).
        root_key_secret: name of the root key's Secret (ROOT_KEY_SECRET).
        leader_election: whether several operators may run, one of which leads (LEADER_ELECTION).
        workers: models that are visited at the same time (WORKERS).
        log_format: json or text (LOG_FORMAT).
        log_level: the least that is logged (LOG_LEVEL).
    """

    namespace: str
    identity: str
    watch_namespaces: tuple[str, ...]
    host: str
    control: ControlEndpoint
    images: Images
    root_key_secret: str
    leader_election: bool
    workers: int
    log_format: LogFormat
    log_level: str

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> OperatorConfig:
        """Read the settings; raises ConfigError that names the variable."""
        read = _EnvReader(env)
        namespace = read.dns_label("NAMESPACE", "faasmoe-system")
        return cls(
            namespace=namespace,
            identity=read.text("POD_NAME", socket.gethostname()),
            watch_namespaces=tuple(sorted(set(read.dns_labels("WATCH_NAMESPACES")))),
            host=read.text("HOST", "0.0.0.0"),
            control=_control_endpoint(read, namespace),
            images=_images(read),
            root_key_secret=read.text("ROOT_KEY_SECRET", "faasmoe-root-key"),
            leader_election=read.choice("LEADER_ELECTION", ("false", "true")) == "true",
            workers=read.integer("WORKERS", 8, maximum=MAX_WORKERS),
            log_format="json" if read.choice("LOG_FORMAT", ("text", "json")) == "json" else "text",
            log_level=read.choice("LOG_LEVEL", ("INFO", "DEBUG", "WARNING", "ERROR")),
        )


def _control_endpoint(read: _EnvReader, namespace: str) -> ControlEndpoint:
    port = read.integer("PORT", 8090, maximum=65535)
    return ControlEndpoint(
        url=read.text("CONTROL_URL", f"http://faasmoe-operator.{namespace}.svc:{port}").rstrip("/"),
        namespace=namespace,
        pod_labels=read.key_value_pairs("POD_LABELS", "app.kubernetes.io/name=faasmoe-operator"),
        port=port,
    )


def _images(read: _EnvReader) -> Images:
    return Images(
        router=read.required("ROUTER_IMAGE", "an image"),
        expert=read.required("EXPERT_IMAGE", "an image"),
        pull_policy=read.choice("IMAGE_PULL_POLICY", ("IfNotPresent", "Always", "Never")),
        pull_secrets=tuple(read.dns_labels("IMAGE_PULL_SECRETS")),
    )


@dataclass(frozen=True, slots=True)
class _EnvReader:
    """Reads variables by their names without the prefix; an empty one counts as not set."""

    env: Mapping[str, str]

    def text(self, name: str, default: str) -> str:
        return self.env.get(PREFIX + name) or default

    def required(self, name: str, expected: str) -> str:
        if not (value := self.text(name, "")):
            raise OperatorConfigError(f"{PREFIX}{name}: not set, expected {expected}")
        return value

    def dns_label(self, name: str, default: str) -> str:
        value = self.text(name, default)
        if not DNS_LABEL.fullmatch(value):
            raise _invalid_value(name, value, "a name of lower case letters, digits and dashes")
        return value

    def dns_labels(self, name: str) -> list[str]:
        values = [value.strip() for value in self.text(name, "").split(",") if value.strip()]
        for value in values:
            if not all(DNS_LABEL.fullmatch(part) for part in value.split(".")):
                raise _invalid_value(name, value, "names of lower case letters, digits and dashes")
        return values

    def key_value_pairs(self, name: str, default: str) -> dict[str, str]:
        text = self.text(name, default)
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        if not pairs or not all(key.strip() and equals for key, equals, _ in pairs):
            raise _invalid_value(name, text, "KEY=VALUE, several with commas between")
        return {key.strip(): value.strip() for key, _, value in pairs}

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """Return one of the choices, of which the first is the default."""
        value = self.text(name, choices[0])
        if value not in choices:
            raise _invalid_value(name, value, f"one of {', '.join(choices)}")
        return value

    def integer(self, name: str, default: int, *, maximum: int) -> int:
        text = self.text(name, str(default))
        if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= maximum:
            raise _invalid_value(name, text, f"1 to {maximum}")
        return int(text)


def _invalid_value(name: str, got: str, expected: str) -> OperatorConfigError:
    return OperatorConfigError(f"{PREFIX}{name}: got {got!r}, expected {expected}")
