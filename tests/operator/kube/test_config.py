import re

import pytest

from faasmoe_operator.env_settings import OperatorConfigError
from faasmoe_operator.kube.config import OperatorConfig

ENV = {
    "FAASMOE_OPERATOR_ROUTER_IMAGE": "registry/router:1",
    "FAASMOE_OPERATOR_EXPERT_IMAGE": "registry/expert:1",
}


def test_only_the_images_are_required() -> None:
    config = OperatorConfig.from_env(ENV)
    assert config.namespace == "faasmoe-system"
    assert config.watch_namespaces == ()
    assert config.control.url == "http://faasmoe-operator.faasmoe-system.svc:8090"
    assert config.control.pod_labels == {"app.kubernetes.io/name": "faasmoe-operator"}
    assert config.images.router == "registry/router:1"
    assert not config.leader_election


def test_reads_every_variable() -> None:
    values = {
        "NAMESPACE": "ops",
        "POD_NAME": "operator-0",
        "WATCH_NAMESPACES": "b, a,,b",
        "HOST": "127.0.0.1",
        "PORT": "9000",
        "CONTROL_URL": "https://control/",
        "POD_LABELS": "app=op, tier=x",
        "IMAGE_PULL_POLICY": "Always",
        "IMAGE_PULL_SECRETS": "one,two.three",
        "ROOT_KEY_SECRET": "key",
        "LEADER_ELECTION": "true",
        "WORKERS": "3",
        "LOG_FORMAT": "json",
        "LOG_LEVEL": "DEBUG",
    }
    env = {f"FAASMOE_OPERATOR_{name}": value for name, value in values.items()}
    config = OperatorConfig.from_env({**ENV, **env})
    assert (config.namespace, config.identity, config.host) == ("ops", "operator-0", "127.0.0.1")
    assert config.watch_namespaces == ("a", "b")
    assert (config.control.url, config.control.port) == ("https://control", 9000)
    assert config.control.pod_labels == {"app": "op", "tier": "x"}
    assert config.images.pull_policy == "Always"
    assert config.images.pull_secrets == ("one", "two.three")
    assert config.root_key_secret == "key"
    assert config.leader_election
    assert (config.workers, config.log_format, config.log_level) == (3, "json", "DEBUG")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ROUTER_IMAGE", "", "not set, expected an image"),
        ("NAMESPACE", "Ops", "got 'Ops', expected a name of lower case letters"),
        ("WATCH_NAMESPACES", "a,B", "got 'B', expected names of lower case"),
        ("PORT", "0", "got '0', expected an integer from 1 to 65535"),
        ("WORKERS", "many", "got 'many', expected an integer from 1 to 64"),
        ("POD_LABELS", "app", "got 'app', expected KEY=VALUE"),
        ("LEADER_ELECTION", "yes", "got 'yes', expected one of false, true"),
        ("LOG_FORMAT", "xml", "got 'xml', expected one of text, json"),
        ("IMAGE_PULL_POLICY", "always", "got 'always', expected one of IfNotPresent"),
    ],
)
def test_an_invalid_value_is_reported_with_its_variable(
    name: str, value: str, message: str
) -> None:
    with pytest.raises(OperatorConfigError, match=re.escape(f"FAASMOE_OPERATOR_{name}: {message}")):
        OperatorConfig.from_env({**ENV, f"FAASMOE_OPERATOR_{name}": value})


TLS = {**ENV, "FAASMOE_OPERATOR_TLS": "true"}


def test_with_tls_the_operator_issues_certificates_unless_another_issuer_does() -> None:
    own = OperatorConfig.from_env(TLS)
    assert own.control.url == "https://faasmoe-operator.faasmoe-system.svc:8090"
    assert (own.models_tls_secret, own.gateway_tls_secret) == ("faasmoe-models-tls", None)
    with_gateways = OperatorConfig.from_env({**TLS, "FAASMOE_OPERATOR_GATEWAY_PORT": "8092"})
    assert with_gateways.gateway_tls_secret == "faasmoe-gateway-tls"
    other = OperatorConfig.from_env(
        {
            **TLS,
            "FAASMOE_OPERATOR_TLS_FOLDER": "/etc/faasmoe/tls",
            "FAASMOE_OPERATOR_TLS_MODELS_SECRET": "issued",
            "FAASMOE_OPERATOR_GATEWAY_PORT": "8092",
        }
    )
    assert (other.models_tls_secret, other.gateway_tls_secret) == ("issued", None)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TLS": "", "TLS_FOLDER": "/x"}, "TLS_FOLDER: got /x, expected none without"),
        ({"TLS_FOLDER": "/x"}, "TLS_MODELS_SECRET: got none, expected the name of a Secret"),
        ({"TLS_MODELS_SECRET": "x"}, "TLS_MODELS_SECRET: got 'x', expected"),
        ({"CONTROL_URL": "http://c"}, "CONTROL_URL: got http://c, expected https"),
    ],
)
def test_settings_of_tls_that_do_not_fit_are_refused(
    variables: dict[str, str], message: str
) -> None:
    env = {f"FAASMOE_OPERATOR_{name}": value for name, value in variables.items()}
    with pytest.raises(OperatorConfigError, match=re.escape(f"FAASMOE_OPERATOR_{message}")):
        OperatorConfig.from_env({**TLS, **env})
