"""A real Prometheus with the chart's alert rules, in fast motion.

All durations of the rules are divided by SPEED and scrapes are as many times as frequent, so that
an outage that alerts after minutes does so after seconds. Expressions are otherwise unchanged.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from apiserver import eventually
from helm import Helm

SPEED = 20
SCRAPE_INTERVAL_S = 1
UNITS_S = {"s": 1, "m": 60, "h": 3600}
_RANGE = re.compile(r"\[(\d+)([smh])\]")
_DURATION = re.compile(r"(\d+)([smh])")


def fast_rules(helm: Helm) -> dict[str, Any]:
    """Return the chart's alert rules with all durations divided by SPEED."""
    objects = helm.template({"prometheusRule": {"enabled": True}})
    (spec,) = (obj["spec"] for obj in objects if obj["kind"] == "PrometheusRule")
    for group in spec["groups"]:
        group["interval"] = f"{SCRAPE_INTERVAL_S}s"
        for rule in group["rules"]:
            rule["expr"] = _RANGE.sub(lambda found: f"[{_fast(*found.groups())}]", rule["expr"])
            found = _DURATION.fullmatch(rule["for"])
            assert found is not None
            rule["for"] = _fast(*found.groups())
    return dict(spec)


def _fast(number: str, unit: str) -> str:
    return f"{int(number) * UNITS_S[unit] * 1000 // SPEED}ms"


class Prometheus:
    """A running Prometheus.

    Args:
        url: its URL.
        targets_file: file of its targets.
    """

    def __init__(self, url: str, targets_file: Path) -> None:
        self._url = url
        self._targets_file = targets_file

    @classmethod
    @contextmanager
    def running(cls, program: str, folder: Path, rules: Mapping[str, Any]) -> Iterator[Prometheus]:
        """Run Prometheus until the context ends."""
        prometheus = cls(f"http://127.0.0.1:{_free_port()}", folder / "targets.json")
        prometheus._write_targets({})
        (folder / "rules.yaml").write_text(yaml.safe_dump(dict(rules)))
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(_config(folder)))
        command = [
            program,
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={prometheus._url.removeprefix('http://')}",
        ]
        with (folder / "prometheus.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            eventually(lambda: prometheus._is_ready(process), bool)
            yield prometheus
        finally:
            process.terminate()
            process.wait(30)

    def scrape(self, targets: Mapping[str, Mapping[str, str]]) -> None:
        """Replace the targets, and wait until each was scraped.

        Args:
            targets: labels by address, as monitors would add them.
        """
        self._write_targets(targets)
        eventually(self._scraped_addresses, lambda scraped: scraped == targets.keys())

    def _write_targets(self, targets: Mapping[str, Mapping[str, str]]) -> None:
        entries = [{"targets": [address], "labels": dict(to)} for address, to in targets.items()]
        replacement = self._targets_file.with_suffix(".new")
        replacement.write_text(json.dumps(entries))
        replacement.rename(self._targets_file)

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire, with the reason if there is one."""
        alerts = httpx.get(f"{self._url}/api/v1/alerts", trust_env=False).json()["data"]["alerts"]
        firing = [alert["labels"] for alert in alerts if alert["state"] == "firing"]
        return {
            f"{labels['alertname']}:{labels['reason']}"
            if "reason" in labels
            else labels["alertname"]
            for labels in firing
        }

    def _scraped_addresses(self) -> set[str]:
        targets = httpx.get(f"{self._url}/api/v1/targets", trust_env=False).json()["data"]
        return {
            target["discoveredLabels"]["__address__"]
            for target in targets["activeTargets"]
            if target["health"] == "up"
        }

    def _is_ready(self, process: subprocess.Popen[bytes]) -> bool:
        assert process.poll() is None, "Prometheus has exited"
        try:
            return httpx.get(f"{self._url}/-/ready", trust_env=False).is_success
        except httpx.TransportError:
            return False


def _config(folder: Path) -> dict[str, Any]:
    interval = f"{SCRAPE_INTERVAL_S}s"
    return {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": [str(folder / "rules.yaml")],
        "scrape_configs": [
            {
                "job_name": "faasmoe",
                "honor_labels": True,
                "file_sd_configs": [
                    {"files": [str(folder / "targets.json")], "refresh_interval": interval}
                ],
            }
        ],
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
