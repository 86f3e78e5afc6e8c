"""What needs a CUDA device: marked `gpu`, and skipped with the reason where there is none.

With EMULATED_CUDA=1 it runs on an emulated one (tests/integration/emulated), but for what asks for
the fixture `real`: memory that processes share, and what only a device's own kernels can show.
"""

import gc
import itertools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from sandboxes import OpenSandbox, SandboxProcess, running_sandbox

import faasmoe_expert.device as resolving
from faasmoe_expert.functions.upload import Uploader, uploader_to

HERE = Path(__file__).parent
EMULATED = os.environ.get("EMULATED_CUDA") == "1"

if EMULATED:
    from emulated.cuda import install

    DEVICE = install()
    SUPPORT = str(HERE.parent / "integration")  # for the sandboxes' processes
    os.environ["PYTHONPATH"] = os.pathsep.join([SUPPORT, os.environ.get("PYTHONPATH", "")])
else:
    DEVICE = torch.device("cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why_none = resolving.why_no_cuda()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if why_none:
                item.add_marker(pytest.mark.skip(reason=why_none))


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    return DEVICE


@pytest.fixture
def real() -> None:
    """Skip what an emulated device cannot show."""
    if EMULATED:
        pytest.skip("shown by a real device alone")


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> OpenSandbox:
    """Runs a sandbox process, as everywhere; where CUDA is emulated, it is there too."""
    folder: Path = tmp_path_factory.mktemp("sandboxes")
    numbers = itertools.count()
    module = "emulated.sandbox" if EMULATED else "faasmoe_expert"

    def run(*, token: str = "", **variables: object) -> AbstractContextManager[SandboxProcess]:
        log = folder / f"{next(numbers)}.log"
        return running_sandbox(log, module, token=token, **variables)

    return run


@pytest.fixture
def uploader(cuda: torch.device) -> Uploader:
    found = uploader_to(cuda)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def gives_back() -> Iterator[None]:
    """Each test leaves the device as it found it: the next ones count bytes."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
