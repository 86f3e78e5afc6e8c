"""Fixtures shared by the tests of all components: small stores and real sandbox processes."""

import itertools
import sys
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from sandbox_processes import PreparedStore, SandboxProcess, StartSandbox, running_sandbox

from faasmoe_contracts.store import QuantizationEntry, Store
from faasmoe_contracts.store.references import StoreMode
from faasmoe_contracts.tls import TlsPeer

# On a busy machine, an example or its generation may take any time. The same examples in every run,
# so that a run fails because of its change; `make test-random` draws others.
settings.register_profile(
    "repeatable",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)
settings.register_profile("random", settings.get_profile("repeatable"), derandomize=False)
settings.load_profile("repeatable")

WHOLE_SYSTEM = Path(__file__).parent / "integration", Path(__file__).parent / "chaos"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that all processes end at about the same time."""
    items.sort(key=lambda item: not any(f in item.path.parents for f in WHOLE_SYSTEM))


@pytest.fixture(scope="session", autouse=True)
def _single_torch_thread() -> None:
    """Use one thread: for tiny tensors, more are up to ten times slower on a busy machine."""
    if "torch" in sys.modules:  # tests of the control plane do not import it
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def prepared_store(tmp_path_factory: pytest.TempPathFactory) -> PreparedStore:
    """Prepare a family's tiny model as a store, once per session: `prepared_store("mixtral")`.

    `experts` and `router` name quantisations, `none` by default. `mode` is that of the store, whose
    checkpoint lies beside it.
    """

    @cache
    def prepare_family(
        family: str,
        dtype: str | None = None,
        experts: str = "none",
        router: str = "none",
        mode: str = "copy",
    ) -> Store:
        from families.registry import FAMILIES

        from faasmoe_router.checkpoint.prepare import prepare

        folder = tmp_path_factory.mktemp(family)
        model = next(f for f in FAMILIES if f.name == family).build()
        model.save_pretrained(folder / "checkpoint")
        return prepare(
            str(folder / "checkpoint"),
            folder / "store",
            dtype=dtype,
            quantization=QuantizationEntry(experts, router),
            mode=StoreMode(mode),
        )

    return prepare_family


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> StartSandbox:
    """Run a sandbox process: `with sandbox(capacity=9, token="…") as s: s.http.get(…)`."""
    folder: Path = tmp_path_factory.mktemp("sandboxes")
    numbers = itertools.count()

    def run(
        *, token: str = "", tls: TlsPeer | None = None, **variables: object
    ) -> AbstractContextManager[SandboxProcess]:
        log = folder / f"{next(numbers)}.log"
        return running_sandbox(log, token=token, tls=tls, **variables)

    return run
