"""Creates a pod's container as a process of this machine: environment and volumes resolved."""

from __future__ import annotations

import base64
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apiserver import ApiServer, Object
from containers import Container, Mount

CPU_LIMIT = "1"
"""CPU limit that containers see, since they all share this machine."""
_SERVICE_HOST = re.compile(r"(?P<name>[a-z0-9-]+)\.(?P<namespace>[a-z0-9-]+)\.svc(?=:)")
_REFERENCE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)")


class ContainerConfigError(Exception):
    """The container cannot be created as long as something is missing."""


class ContainerFactory:
    """Creates the containers of pods.

    Args:
        api: to read Secrets and ConfigMaps.
        folder: parent of the folders of claims, overlays and logs.
        entry_points: module that an image runs, by a part of the image's name.
    """

    def __init__(self, api: ApiServer, folder: Path, *, entry_points: Mapping[str, str]) -> None:
        self._api = api
        self._folder = folder
        self._entry_points = entry_points

    def claim_folder(self, namespace: str, claim: str) -> Path:
        """Return the folder that backs a claim."""
        folder: Path = self._folder / "claims" / namespace / claim
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def create(self, pod: Object, address: str) -> Container:
        """Return a pod's only container, not started; raises ContainerConfigError.

        Args:
            pod: the pod.
            address: its IP address.
        """
        spec = pod["spec"]["containers"][0]
        folder = self._folder / "pods" / pod["metadata"]["uid"]
        shutil.rmtree(folder, ignore_errors=True)
        environment = self._environment(pod, spec)
        environment["FAASMOE_HOST"] = address  # all pods share the network namespace
        command = [*self._entry_point(spec), *spec.get("args", [])]
        return Container(
            [_expand(word, environment) for word in command],
            environment,
            list(self._mounts(pod, spec, folder)),
            folder,
            termination_log=spec.get("terminationMessagePath", "/dev/termination-log"),
        )

    def _environment(self, pod: Object, container: Object) -> dict[str, str]:
        given = {v["name"]: self._value(v, pod) for v in container.get("env", [])}
        return {
            "HOME": "/tmp",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            **{
                name: self._resolved(_expand(value, given), pod["metadata"]["namespace"])
                for name, value in given.items()
            },
        }

    def _resolved(self, value: str, namespace: str) -> str:
        """Replace the names of Services of the namespace by the address of one of their pods."""
        return _SERVICE_HOST.sub(lambda found: self._pod_address(found, namespace), value)

    def _pod_address(self, found: re.Match[str], namespace: str) -> str:
        if found["namespace"] != namespace:
            return found[0]
        service = self._api.find("services", namespace, found["name"])
        selector = {} if service is None else service["spec"].get("selector", {})
        labels = ",".join(f"{key}={value}" for key, value in selector.items())
        pods = self._api.list("pods", namespace, labels=labels) if labels else []
        addresses = [pod["status"]["podIP"] for pod in pods if pod["status"].get("podIP")]
        if not addresses:
            raise ContainerConfigError(f"service {found['name']} has no pod with an address")
        return str(addresses[-1])

    def _entry_point(self, container: Object) -> list[str]:
        if "command" in container:
            first, *rest = container["command"]
            return [sys.executable if first.startswith("python") else first, *rest]
        for word, module in self._entry_points.items():
            if word in container["image"]:
                return [sys.executable, "-m", module]
        raise ContainerConfigError(f"image {container['image']} is not known here")

    def _value(self, variable: Object, pod: Object) -> str:
        if "valueFrom" not in variable:
            return str(variable.get("value", ""))
        source = variable["valueFrom"]
        if "fieldRef" in source:
            return _field(pod, source["fieldRef"]["fieldPath"])
        if "resourceFieldRef" in source:
            return CPU_LIMIT
        kind = "secrets" if "secretKeyRef" in source else "configmaps"
        reference = source.get("secretKeyRef") or source["configMapKeyRef"]
        data = self._data(kind, pod["metadata"]["namespace"], reference)
        if reference["key"] not in data and not reference.get("optional"):
            raise ContainerConfigError(
                f"couldn't find key {reference['key']} in {kind} {reference['name']}"
            )
        return data.get(reference["key"], b"").decode()

    def _data(self, kind: str, namespace: str, reference: Object) -> dict[str, bytes]:
        name = reference.get("name") or reference["secretName"]
        found = self._api.find(kind, namespace, name)
        if found is None:
            if reference.get("optional"):
                return {}
            raise ContainerConfigError(f'{kind.removesuffix("s")} "{name}" not found')
        if kind == "secrets":
            return {k: base64.b64decode(v) for k, v in found.get("data", {}).items()}
        return {k: v.encode() for k, v in found.get("data", {}).items()}

    def _mounts(self, pod: Object, container: Object, folder: Path) -> Iterator[Mount]:
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        for mount in container.get("volumeMounts", []):
            source = self._volume(volumes[mount["name"]], pod, folder)
            if "subPath" in mount:
                source = source / mount["subPath"]
                source.mkdir(parents=True, exist_ok=True)
            yield Mount(source, mount["mountPath"], bool(mount.get("readOnly")))

    def _volume(self, volume: Object, pod: Object, folder: Path) -> Path:
        namespace = pod["metadata"]["namespace"]
        if claim := volume.get("persistentVolumeClaim"):
            return self.claim_folder(namespace, str(claim["claimName"]))
        path = folder / "volumes" / str(volume["name"])
        path.mkdir(parents=True, exist_ok=True)
        for kind, reference in (
            ("secrets", volume.get("secret")),
            ("configmaps", volume.get("configMap")),
        ):
            if reference is not None:
                _write_files(path, self._data(kind, namespace, reference))
        return path


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _expand(text: str, environment: Mapping[str, str]) -> str:
    """Expand $(NAME) references, as a kubelet does."""
    return _REFERENCE.sub(lambda found: environment.get(found[1], found[0]), text)


def _field(pod: Object, path: str) -> str:
    value: Any = pod
    for part in path.split("."):
        value = value[part]
    return str(value)
