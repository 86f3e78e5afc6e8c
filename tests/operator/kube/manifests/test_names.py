import re

import pytest

from faasmoe_operator.kube.manifests.names import (
    Component,
    Pool,
    control_name,
    model_labels,
    pod_selector,
    pod_selector_text,
    router_name,
    sandbox_name,
    service_name,
    store_name,
    tenant_service_name,
    truncate_name,
)

LONG = "m" * 63


def test_names_start_with_the_model() -> None:
    assert store_name("qwen") == "qwen-store"
    assert router_name("qwen") == "qwen-router"
    assert sandbox_name("qwen") == "qwen-sandbox"
    assert sandbox_name("qwen", "x7k2p") == "qwen-sandbox-x7k2p"
    assert control_name("qwen", "0123456789abcdef") == "qwen-control-01234567"
    assert service_name("qwen") == "qwen"
    assert tenant_service_name("qwen", "acme") == "qwen-tenant-acme"


@pytest.mark.parametrize("length", [1, 62, 63])
def test_keeps_a_short_name(length: int) -> None:
    assert truncate_name("a" * length) == "a" * length


def test_truncated_names_are_unique() -> None:
    names = {truncate_name("a" * 64 + end) for end in ("", "b", "c")}
    assert len(names) == 3
    assert all(re.fullmatch("a{54}-[0-9a-f]{8}", name) for name in names)


def test_a_truncated_name_has_no_double_dash() -> None:
    assert re.fullmatch("a{53}-[0-9a-f]{8}", truncate_name("a" * 53 + "-" + "b" * 40))


def test_truncation_keeps_the_suffix_of_a_sandbox() -> None:
    name = sandbox_name(LONG, "x7k2p")
    assert len(name) == 63
    assert name.endswith("-x7k2p")


def test_service_names_start_with_a_letter() -> None:
    assert service_name("7b") == "moe-7b"
    assert tenant_service_name("7b", "acme") == "moe-7b-tenant-acme"


def test_pod_selector_is_a_subset_of_the_labels() -> None:
    chosen = pod_selector("qwen", Component.ROUTER)
    assert chosen == {"faasmoe.dev/model": "qwen", "app.kubernetes.io/component": "router"}
    assert model_labels("qwen", Component.ROUTER).items() > chosen.items()
    assert pod_selector_text("qwen", Component.ROUTER) == (
        "faasmoe.dev/model=qwen,app.kubernetes.io/component=router"
    )


def test_label_values() -> None:
    components = ["router", "sandbox", "store", "store-server", "control"]
    assert [component.value for component in Component] == components
    assert [pool.value for pool in Pool] == ["warm", "assigned"]
