"""`kubectl faasmoe`: what `kubectl get` does not tell of a MoEModel.

kubectl finds the executable `kubectl-faasmoe` on the PATH. It reads the cluster by running kubectl,
so contexts, plugins for credentials and permissions are the user's own. The control API is not
used: its tokens stay in the cluster.
"""

from __future__ import annotations

import argparse
import json
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from faasmoe_contracts.usage import USAGE_FIELDS
from faasmoe_operator.cli.formatting import format_bytes, format_table
from faasmoe_operator.control.usage_ledger import LEDGER_DECODE_ERRORS, decode_ledger
from faasmoe_operator.errors import CommandError, FaasmoeError

MODEL_LABEL = "faasmoe.dev/model"
COMPONENT_LABEL = "app.kubernetes.io/component"
FUNCTION_LABEL = "faasmoe.dev/function"
N_EVENTS = 10
CHAT_TIMEOUT_S = 600.0
_FORWARDING = re.compile(r"Forwarding from 127\.0\.0\.1:(\d+)")

Object = Mapping[str, Any]


def render_explanation(model: Object, pods: Sequence[Object], events: Sequence[Object]) -> str:
    """Return why a model is not ready: conditions that do not hold, pods, and warnings.

    Args:
        model: the MoEModel.
        pods: its pods.
        events: events of the model and its pods.
    """
    name = model["metadata"]["name"]
    conditions = model.get("status", {}).get("conditions", [])
    ready = next((c for c in conditions if c["type"] == "Ready"), None)
    if ready is None:
        return (
            f"{name}: no operator has seen it yet: is one running, and does it watch its namespace?"
        )
    lines = [f"{name}: Ready is {ready['status']} ({ready['reason']})"]
    for found in conditions:
        if found["status"] != "True" and found["type"] != "Ready":
            lines.append(f"  {found['type']}: {found['reason']}: {found['message']}")
    rows = [_pod_row(pod) for pod in pods if not _is_ready(pod)]
    if rows:
        lines += ["", format_table(("POD", "COMPONENT", "PHASE", "NODE"), rows)]
    warnings = [event for event in events if event.get("type") == "Warning"][-N_EVENTS:]
    if warnings:
        lines += ["", *(f"  {event['reason']}: {event['message']}" for event in warnings)]
    return "\n".join(lines)


def _pod_row(pod: Object) -> tuple[str, ...]:
    phase = pod.get("status", {}).get("phase", "Unknown")
    if "deletionTimestamp" in pod["metadata"]:
        phase = "Terminating"
    labels = pod["metadata"].get("labels", {})
    node = pod.get("spec", {}).get("nodeName", "-")
    return pod["metadata"]["name"], labels.get(COMPONENT_LABEL, "-"), phase, node


def _is_ready(pod: Object) -> bool:
    status = pod.get("status", {})
    is_ready = any(
        c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", ())
    )
    return is_ready or status.get("phase") == "Succeeded"


def render_top(model: Object, pods: Sequence[Object]) -> str:
    """Return routers, functions and sandboxes of a model.

    Args:
        model: the MoEModel.
        pods: its pods.
    """
    status = model.get("status", {})
    functions, sandboxes = status.get("functions", {}), status.get("sandboxes", {})
    router, stored = status.get("router", {}), status.get("model", {})
    lines = [
        f"routers: {router.get('readyReplicas', 0)} of {router.get('replicas', 0)} ready; "
        f"functions: {functions.get('active', 0)} of {functions.get('total', 0)} active, "
        f"{functions.get('replicas', 0)} replicas; "
        f"store: {format_bytes(stored.get('sizeBytes'))}",
        f"sandboxes: {sandboxes.get('ready', 0)} of {sandboxes.get('total', 0)} ready, "
        f"{sandboxes.get('generic', 0)} generic",
    ]
    rows = [_sandbox_row(pod) for pod in pods if _component(pod) == "sandbox"]
    header = ("SANDBOX", "FUNCTION", "READY", "NODE", "MEMORY REQUESTED")
    return "\n".join([*lines, *(["", format_table(header, sorted(rows))] if rows else [])])


def _component(pod: Object) -> str:
    return str(pod["metadata"].get("labels", {}).get(COMPONENT_LABEL, ""))


def _sandbox_row(pod: Object) -> tuple[str, ...]:
    labels, spec = pod["metadata"].get("labels", {}), pod["spec"]
    requests = spec["containers"][0].get("resources", {}).get("requests", {})
    return (
        pod["metadata"]["name"],
        labels.get(FUNCTION_LABEL) or "-",
        "yes" if _is_ready(pod) else "no",
        spec.get("nodeName", "-"),
        str(requests.get("memory", "-")),
    )


def render_usage(text: str) -> str:
    """Return a table of what each tenant has used; raises CommandError for an invalid ledger.

    Args:
        text: the ledger, as in the ConfigMap of the model.
    """
    try:
        ledger = decode_ledger(text)
    except LEDGER_DECODE_ERRORS as error:
        raise CommandError(f"accounts.json: got an invalid ledger ({error})") from error
    rows = [
        (tenant, *(f"{value:g}" for value in record.values))
        for tenant, record in sorted(ledger.usage_by_tenant.items())
    ]
    return format_table(("TENANT", *(field.upper() for field in USAGE_FIELDS)), rows)


def port_scheme(service: Object, port: int) -> str:
    """Return the scheme of URLs of a Service's port."""
    found = [p for p in service["spec"]["ports"] if p["port"] == port]
    return "https" if any(p.get("appProtocol") == "https" for p in found) else "http"


class Kubectl:
    """Runs kubectl.

    Args:
        options: options of each call, such as --context.
    """

    def __init__(self, options: Sequence[str]) -> None:
        self._options = list(options)

    def get(self, *arguments: str) -> Any:
        """Return the JSON of `kubectl get`; raises CommandError with kubectl's message."""
        command = ["kubectl", *self._options, "get", *arguments, "--output", "json"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise CommandError("kubectl: not found on the PATH") from error
        if done.returncode != 0:
            raise CommandError(f"kubectl get {arguments[0]}: {done.stderr.strip()}")
        return json.loads(done.stdout)

    @contextmanager
    def forward(self, service: str, port: int) -> Iterator[str]:
        """Forward a port of a Service to this machine; yields the URL, raises CommandError."""
        scheme = port_scheme(self.get("service", service), port)
        target = [f"service/{service}", f":{port}"]
        command = ["kubectl", *self._options, "port-forward", "--address", "127.0.0.1", *target]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            found = _FORWARDING.search(process.stdout.readline())
            if found is None:
                raise CommandError(f"kubectl port-forward service/{service}: it ended")
            yield f"{scheme}://127.0.0.1:{found[1]}"
        finally:
            process.terminate()
            process.wait()


def _events(kubectl: Kubectl, names: set[str]) -> list[Object]:
    events = kubectl.get("events", "--sort-by=.lastTimestamp")["items"]
    return [event for event in events if event["involvedObject"]["name"] in names]


def _pods(kubectl: Kubectl, name: str) -> list[Object]:
    pods: list[Object] = kubectl.get("pods", "--selector", f"{MODEL_LABEL}={name}")["items"]
    return pods


def explain(kubectl: Kubectl, name: str) -> str:
    """Return why a MoEModel is not ready; raises CommandError."""
    model, pods = kubectl.get("moemodel", name), _pods(kubectl, name)
    names = {name, *(pod["metadata"]["name"] for pod in pods)}
    return render_explanation(model, pods, _events(kubectl, names))


def _explain(kubectl: Kubectl, arguments: argparse.Namespace) -> str:
    return explain(kubectl, arguments.name)


def top(kubectl: Kubectl, name: str) -> str:
    """Return routers, functions and sandboxes of a MoEModel; raises CommandError."""
    return render_top(kubectl.get("moemodel", name), _pods(kubectl, name))


def _top(kubectl: Kubectl, arguments: argparse.Namespace) -> str:
    return top(kubectl, arguments.name)


def _usage(kubectl: Kubectl, arguments: argparse.Namespace) -> str:
    config_map = kubectl.get("configmap", f"{arguments.name}-accounts")
    return render_usage(config_map.get("data", {}).get("accounts.json", ""))


@contextmanager
def forwarded_api(kubectl: Kubectl, name: str, tenant: str) -> Iterator[tuple[str, str]]:
    """Forward a MoEModel's API to this machine.

    Args:
        kubectl: reaches the cluster.
        name: name of the MoEModel.
        tenant: whose Service; empty for the model's own.

    Yields:
        Its base URL with /v1, and the model's name in requests.
    """
    spec = kubectl.get("moemodel", name).get("spec", {})
    served = spec.get("router", {}).get("servedModelName") or name
    service, path = (f"{name}-tenant-{tenant}", f"/{tenant}/v1") if tenant else (name, "/v1")
    with kubectl.forward(service, 80) as url:
        yield f"{url}{path}", served


def _forwarded_tls() -> ssl.SSLContext:
    """Return the context of a forwarded port: the API server has verified where it leads."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _chat(kubectl: Kubectl, arguments: argparse.Namespace) -> str:
    message = {"role": "user", "content": arguments.message}
    headers = {"Content-Type": "application/json"}
    if arguments.key:
        headers["Authorization"] = f"Bearer {arguments.key}"
    with forwarded_api(kubectl, arguments.name, arguments.tenant) as (url, served):
        body = {"model": served, "messages": [message], "max_tokens": arguments.max_tokens}
        request = urllib.request.Request(
            f"{url}/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(
                request, timeout=CHAT_TIMEOUT_S, context=_forwarded_tls()
            ) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            raise CommandError(f"{error.code}: {error.read().decode(errors='replace')}") from error
    return str(answer["choices"][0]["message"]["content"])


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all verbs."""
    parser = argparse.ArgumentParser(
        prog="kubectl faasmoe", description="Look into MoEModels of a cluster."
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, run, text in (
        ("explain", _explain, "why a model is not ready, and what to do"),
        ("top", _top, "routers, functions and sandboxes"),
        ("usage", _usage, "what each tenant has used"),
        ("chat", _chat, "send one message and print the answer"),
    ):
        verb = verbs.add_parser(name, help=text, description=f"Print {text}.")
        verb.add_argument("name", metavar="NAME", help="name of the MoEModel")
        for option in ("namespace", "context", "kubeconfig"):
            flags = ["-n"] if option == "namespace" else []
            verb.add_argument(*flags, f"--{option}", help=f"as kubectl's --{option}")
        if name == "chat":
            verb.add_argument("message", metavar="MESSAGE", help="the message")
            verb.add_argument("--tenant", default="", help="tenant whose Service is used")
            verb.add_argument("--key", default="", help="API key")
            verb.add_argument("--max-tokens", type=int, default=256, help="default: %(default)s")
        verb.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit status."""
    arguments = build_parser().parse_args(argv)
    options = [
        f"--{option}={value}"
        for option in ("namespace", "context", "kubeconfig")
        if (value := getattr(arguments, option)) is not None
    ]
    try:
        print(arguments.run(Kubectl(options), arguments))
    except FaasmoeError as error:
        print(f"kubectl faasmoe: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
