"""Runs vLLM's own HTTP-level tests, unmodified, against `faasmoe up`.

    python tests/clients/vllm_suite.py SDIST MODEL [--engine=NAME] [pytest options]

SDIST is an unpacked source distribution of vLLM, MODEL a chat checkpoint (the demo model). vLLM
itself is not installed: its packages are stand-ins, and `RemoteOpenAIServer` starts FaaSMoE with
the settings that vLLM's arguments ask for. Tests that do not apply are skipped with the reason.
NAME is the router's engine, transformers by default; for vllm, FAASMOE_VLLM_PYTHON has it.
"""

import fnmatch
import importlib.abc
import importlib.machinery
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import anthropic
import openai
import pytest
from transformers import AutoTokenizer
from vllm_exclusions import FILES, NOT_APPLICABLE, NOT_SUPPORTED

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 600
REQUEST_TIMEOUT_S = 900
MAX_NEW_TOKENS = 320
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}  # as SmolLM2's authors advise
MOEMODEL = """
apiVersion: faasmoe.dev/v1alpha1
kind: MoEModel
metadata: {{name: vllm-tests}}
spec:
  model: {{source: "file://{model}"}}
  store: {{path: "{store}"}}
  router: {router}
  experts: {{device: cpu, functionsPerSandbox: 81, scaling: {{minScale: 1}}}}
"""
ENGINE_ARGS = {"--tool-call-parser": "toolCallParser", "--reasoning-parser": "reasoningParser"}
ENGINE_OPTION = "--engine="


class RemoteOpenAIServer:
    """Has the interface of vLLM's class of this name; serves MODEL under the requested name.

    Args:
        model: the name that requests give the model.
        vllm_serve_args: arguments of `vllm serve`; those that FaaSMoE has a setting for apply.
        env_dict: environment variables of `vllm serve`, of which the API key applies.
    """

    DUMMY_API_KEY = "token-abc123"
    show_hidden_metrics = False
    folder: Path
    checkpoint: Path
    engine = "transformers"

    def __init__(
        self,
        model: str,
        vllm_serve_args: Sequence[str],
        *,
        env_dict: dict[str, str] | None = None,
        **_: Any,
    ) -> None:
        arguments = _arguments(vllm_serve_args)
        self.host, self.port = "127.0.0.1", _free_port()
        file = self.folder / f"{self.port}.yaml"
        text = MOEMODEL.format(
            model=self.checkpoint,
            store=self.folder / "store",
            router=json.dumps(self._router_spec(model, arguments)),
        )
        file.write_text(text)
        python = os.environ["FAASMOE_PYTHON"]
        command = [python, "-m", "faasmoe_operator.cli", "up", "-f", str(file)]
        command += ["--port", str(self.port), "--skip-verify"]
        api_key = (env_dict or {}).get("VLLM_API_KEY", arguments.get("--api-key"))
        if api_key is None and "--enable-prompt-tokens-details" in arguments:
            api_key = self.DUMMY_API_KEY  # prompts are cached for those who have a key
        if api_key:
            command += ["--api-key", api_key]
        self._log = self.folder / f"{self.port}.log"
        with self._log.open("wb") as output:
            self.proc = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)

    def _router_spec(self, model: str, arguments: Mapping[str, str]) -> dict[str, Any]:
        spec: dict[str, Any] = {
            "engine": self.engine,
            "device": "cpu",
            "maxModelLen": min(int(arguments.get("--max-model-len", 2048)), 8192),
            "servedModelName": arguments.get("--served-model-name", model),
        }
        given = {f: arguments[name] for name, f in ENGINE_ARGS.items() if name in arguments}
        return {**spec, "engineArgs": given} if self.engine == "vllm" and given else spec

    def __enter__(self) -> "RemoteOpenAIServer":
        end_s = time.monotonic() + START_TIMEOUT_S
        while "OpenAI base URL" not in (log := self._log.read_text()):
            if self.proc.poll() is not None or time.monotonic() > end_s:
                self.__exit__()
                raise RuntimeError(f"faasmoe up did not start:\n{log}")
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self.proc.terminate()
        self.proc.wait(60)

    @property
    def url_root(self) -> str:
        """The URL of the server."""
        return f"http://{self.host}:{self.port}"

    def url_for(self, *parts: str) -> str:
        """Return the URL of a path."""
        return "/".join([self.url_root, *(part.strip("/") for part in parts if part)])

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {
            "api_key": self.DUMMY_API_KEY,
            "max_retries": 0,
            "timeout": REQUEST_TIMEOUT_S,
            **options,
        }

    def get_client(self, **options: Any) -> openai.OpenAI:
        """Return a client."""
        return openai.OpenAI(base_url=self.url_for("v1"), **self._options(options))

    def get_async_client(self, **options: Any) -> openai.AsyncOpenAI:
        """Return an asynchronous client."""
        return openai.AsyncOpenAI(base_url=self.url_for("v1"), **self._options(options))

    def get_async_client_anthropic(self, **options: Any) -> anthropic.AsyncAnthropic:
        """Return an asynchronous client of Anthropic's API."""
        return anthropic.AsyncAnthropic(base_url=self.url_root, **self._options(options))


def _arguments(given: Sequence[str]) -> dict[str, str]:
    """Return the values of arguments, written `--name value`; flags have an empty one."""
    arguments, name = {}, ""
    for text in given:
        if text.startswith("--"):
            name = text.replace("_", "-")
            arguments[name] = ""
        elif name:
            arguments[name] = text
    return arguments


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class _StandIn(ModuleType):
    """A module that has any attribute."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for every module of vLLM."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a module of vLLM; None for others."""
        is_vllm = name.partition(".")[0] in ("vllm", "tblib", "pybase64", "fastapi")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_vllm else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Return a new stand-in."""
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: a stand-in has no code."""


def bounded_checkpoint(checkpoint: Path, folder: Path) -> Path:
    """Return a folder with a checkpoint whose texts end after MAX_NEW_TOKENS by default.

    Some tests set no limit; a small model would write to the end of the context.
    """
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    config = folder / "generation_config.json"
    settings = json.loads(config.read_text())
    config.unlink()
    config.write_text(json.dumps({**settings, **SAMPLING, "max_new_tokens": MAX_NEW_TOKENS}))
    return folder


def install_stand_ins(sdist: Path, checkpoint: Path, folder: Path) -> None:
    """Make vLLM's tests importable without vLLM."""
    sys.path.insert(0, str(sdist))
    sys.meta_path.insert(0, _StandInFinder())
    import vllm.config
    import vllm.platforms
    import vllm.tokenizers

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    vllm.tokenizers.get_tokenizer = lambda *_, **__: tokenizer
    AutoTokenizer.from_pretrained = lambda *_, **__: tokenizer  # whatever model a test names
    vllm.config.ModelConfig = lambda *_, **__: MagicMock(get_vocab_size=lambda: len(tokenizer))
    vllm.platforms.current_platform.is_rocm = lambda: False
    RemoteOpenAIServer.checkpoint, RemoteOpenAIServer.folder = checkpoint, folder
    test_utils: Any = _StandIn("tests.utils")
    test_utils.RemoteOpenAIServer = RemoteOpenAIServer
    test_utils.ROCM_EXTRA_ARGS = []
    test_utils.VLLM_PATH = sdist
    sys.modules["tests.utils"] = test_utils
    sys.modules["tests.conftest"] = _StandIn("tests.conftest")


def _failure(report: pytest.TestReport) -> str:
    """Return the first line of why a test failed."""
    crash = getattr(report.longrepr, "reprcrash", None)
    message = str(report.longrepr) if crash is None else str(crash.message)
    return message.strip().partition("\n")[0][:300]


class VllmSuite:
    """A pytest plugin: skips what does not apply, and counts the rest by outcome."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.skipped: Counter[str] = Counter()
        self._write: Callable[[str], None] = print

    @pytest.fixture(scope="session")
    def local_asset_server(self) -> None:
        """Serve no images: tests of texts ask for the fixture as well."""

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Write to the terminal, also while output is captured."""
        reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        self._write = reporter.write_line

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Skip the tests that do not apply."""
        for item in items:
            if (reason := self._not_applicable(item)) is not None:
                item.add_marker(pytest.mark.skip(reason))

    def _not_applicable(self, item: pytest.Item) -> str | None:
        name = item.nodeid.partition("tests/")[2] or item.nodeid
        for pattern, reason in NOT_APPLICABLE:
            if fnmatch.fnmatchcase(name, pattern):
                return str(reason)
        fixtures = getattr(item, "fixturenames", ())
        code = getattr(item, "function", None)
        names = code.__code__.co_names if code is not None else ()
        is_http = "RemoteOpenAIServer" in names or any("server" in f for f in fixtures)
        return None if is_http else "a unit test of vLLM's own code"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the outcome of a test: its call's, or that of a failed setup."""
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self.skipped[reason.removeprefix("Skipped: ")] += 1
        elif report.when == "call" or report.failed:
            self.outcomes[report.nodeid] = report.outcome
            if report.failed:
                self._write(f"\n{report.nodeid}: {_failure(report)}")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the shares."""
        counts = Counter(self.outcomes.values())
        n_passed, n_all = counts["passed"], len(self.outcomes)
        write = terminalreporter.write_line
        for reason, count in self.skipped.most_common():
            write(f"not applicable: {count:3} {reason}")
        for nodeid, outcome in self.outcomes.items():
            if outcome != "passed":
                name = nodeid.partition("tests/")[2] or nodeid
                reasons = [r for p, r in NOT_SUPPORTED if fnmatch.fnmatchcase(name, p)]
                write(f"failed: {name}: {reasons[0] if reasons else 'UNEXPECTED'}")
        write(f"{n_passed} of {n_all} applicable tests passed ({n_passed / max(1, n_all):.1%})")


def main() -> int:
    """Run the tests; return pytest's exit status."""
    sdist, checkpoint = Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute()
    options = sys.argv[3:]
    chosen = [text for text in options if re.match(r"[a-z_/]+/test_\w+\.py", text)]
    for text in options:
        if text.startswith(ENGINE_OPTION):
            RemoteOpenAIServer.engine = text.removeprefix(ENGINE_OPTION)
    taken = {*chosen, ENGINE_OPTION + RemoteOpenAIServer.engine}
    options = [text for text in options if text not in taken]
    with tempfile.TemporaryDirectory(prefix="faasmoe-vllm-") as folder:
        bounded = bounded_checkpoint(checkpoint, Path(folder) / "model")
        install_stand_ins(sdist, bounded, Path(folder))
        os.environ["FAASMOE_PYTHON"] = str(Path(os.environ["FAASMOE_PYTHON"]).absolute())
        files = [str(sdist / "tests" / file) for file in chosen or FILES]
        fixed = [
            "-p",
            "no:cacheprovider",
            "-q",
            "--tb=short",
            f"--rootdir={sdist}",
            "--durations=5",
        ]
        fixed += ["-W", "ignore::pytest.PytestDeprecationWarning"]
        fixed += [f"--confcutdir={sdist / 'tests' / 'entrypoints'}", "-c", os.devnull]
        if any("tool_use/" in file for file in files):
            fixed.append("--models=hermes")  # of the models whose forms of calls they know
        with suppress(FileNotFoundError):
            os.chdir(sdist)
        return int(pytest.main([*fixed, *options, *files], plugins=[VllmSuite()]))


if __name__ == "__main__":
    sys.exit(main())
