"""Examples for other tools name what the operator creates and the routers export.

Accepted by the CRDs of KEDA, Gateway API and its Inference Extension (`kubectl apply
--dry-run=server`); their schemas are not part of this repository.
"""

import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from kubernetes_schemas import check_schema
from model_contexts import make_context
from prometheus_client import generate_latest

from faasmoe_operator.api.v1alpha1.crd import GROUP, VERSION, build_crd
from faasmoe_operator.kube.manifests import serving_objects
from faasmoe_router.metrics import EngineMetrics, new_registry

EXAMPLES = Path(__file__).parents[2] / "examples" / "kubernetes"


def load(name: str) -> list[Any]:
    return list(yaml.safe_load_all((EXAMPLES / name).read_text()))


def exported_names() -> set[str]:
    registry = new_registry()
    EngineMetrics(registry, "qwen")
    return set(re.findall(r"^# TYPE (\S+)", generate_latest(registry).decode(), flags=re.M))


@pytest.mark.parametrize("name", ["hpa.yaml", "keda.yaml"])
def test_autoscalers_target_the_scale_of_a_moemodel(name: str) -> None:
    [autoscaler] = load(name)
    target = autoscaler["spec"]["scaleTargetRef"]
    crd = build_crd()
    assert target["apiVersion"] == f"{GROUP}/{VERSION}"
    assert target["kind"] == crd["spec"]["names"]["kind"]
    assert "scale" in crd["spec"]["versions"][0]["subresources"]
    replicas = autoscaler["spec"].get("minReplicas", autoscaler["spec"].get("minReplicaCount"))
    assert replicas >= 1  # the CRD allows no 0


def test_hpa_is_valid_and_scales_by_an_exported_metric() -> None:
    [hpa] = load("hpa.yaml")
    check_schema(hpa)
    [metric] = hpa["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name.replace("_", ":", 1) in exported_names()


def test_keda_queries_an_exported_metric() -> None:
    [scaled] = load("keda.yaml")
    [trigger] = scaled["spec"]["triggers"]
    query: Any = promql_parser.parse(trigger["metadata"]["query"])
    assert query.expr.name in exported_names()


def test_inference_pool_selects_the_routers_of_the_model() -> None:
    pool, route = load("inference-pool.yaml")
    ctx = make_context({}, name="qwen-moe")
    [template] = [
        obj["spec"]["template"] for obj in serving_objects(ctx) if obj["kind"] == "Deployment"
    ]
    selector = pool["spec"]["selector"]["matchLabels"]
    assert template["metadata"]["labels"].items() >= selector.items()
    [port] = pool["spec"]["targetPorts"]
    ports = template["spec"]["containers"][0]["ports"]
    assert port["number"] in [entry["containerPort"] for entry in ports if entry["name"] == "http"]
    [backend] = route["spec"]["rules"][0]["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", pool["metadata"]["name"])


def test_routers_export_what_the_inference_extension_demands() -> None:
    page = Path(__file__).parents[2] / "docs" / "kubernetes" / "ecosystem.md"
    documented = set(re.findall(r"`(vllm:[a-z_]+)`", page.read_text()))
    assert {"vllm:kv_cache_usage_perc", "vllm:cache_config_info"} <= documented
    assert documented <= exported_names()
