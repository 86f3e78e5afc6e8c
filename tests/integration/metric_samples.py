"""Reads Prometheus samples in tests; an unknown metric name is an error rather than 0."""

from __future__ import annotations

import re
from collections.abc import Mapping

from prometheus_client import CollectorRegistry

_SUFFIXES = ("_total", "_bucket", "_count", "_sum")


def sample_value(
    registry: CollectorRegistry, name: str, labels: Mapping[str, str] | None = None
) -> float:
    """Return a sample of a registry; 0 if its metric has no sample with these labels yet."""
    check_known(name, {family.name for family in registry.collect()})
    return registry.get_sample_value(name, dict(labels or {})) or 0.0


def parse_sample(exposition: str, sample: str) -> float:
    """Return a sample of a text exposition; 0 if its metric has no such sample yet.

    Args:
        exposition: the response to GET /metrics.
        sample: metric name, with labels in braces if it has any.
    """
    check_known(sample.partition("{")[0], exposed_families(exposition))
    match = re.search(rf"^{re.escape(sample)} (\S+)$", exposition, re.MULTILINE)
    return 0.0 if match is None else float(match[1])


def exposed_families(exposition: str) -> set[str]:
    """Return the names of all metric families of a text exposition, with or without samples."""
    return set(re.findall(r"^# TYPE (\S+) ", exposition, re.MULTILINE))


def check_known(name: str, families: set[str]) -> None:
    """Fail unless a sample name belongs to one of the metric families."""
    names = {name, *(name.removesuffix(suffix) for suffix in _SUFFIXES)}
    assert names & families, f"unknown metric {name}"
