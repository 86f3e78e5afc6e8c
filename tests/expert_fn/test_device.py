"""What a device's name comes to on this machine; CUDA itself is in tests/gpu."""

from pathlib import Path

import pytest
import torch

from faasmoe_expert import device
from faasmoe_expert.config import SandboxConfigError
from faasmoe_expert.device import cuda_unavailable_reason, is_cuda_possible, resolve_device

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
FAULT = "CUDA-capable device(s) is/are busy or unavailable"


@pytest.fixture
def busy_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that torch counts, and that cannot be used."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"{FAULT}\nCUDA kernel errors might be …")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "zeros", fail)


def test_cpu_is_cpu() -> None:
    assert resolve_device("cpu") == torch.device("cpu")


@without_cuda
def test_auto_is_the_cpu_where_there_is_no_other() -> None:
    assert resolve_device("auto") == torch.device("cpu")


@without_cuda
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_what_is_not_there_is_told_with_what_to_do(name: str) -> None:
    with pytest.raises(SandboxConfigError) as refused:
        resolve_device(name, field="spec.x")
    assert (
        str(refused.value)
        == f"spec.x: got {name!r}, expected cpu or auto: {cuda_unavailable_reason()}"
    )


def test_a_build_without_cuda_is_told_from_a_missing_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert "is built without CUDA; install its CUDA build" in str(cuda_unavailable_reason())
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "finds no CUDA device (CUDA_VISIBLE_DEVICES is '7')" in str(cuda_unavailable_reason())


@pytest.mark.usefixtures("busy_device")
def test_a_device_that_cannot_be_used_is_told_at_the_start() -> None:
    with pytest.raises(SandboxConfigError) as refused:
        resolve_device("cuda")
    assert str(refused.value) == f"FAASMOE_DEVICE: got 'cuda', which cannot be used: {FAULT}"


@pytest.mark.usefixtures("busy_device")
def test_auto_goes_on_without_a_device_that_cannot_be_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert resolve_device("auto") == torch.device("cpu")
    assert FAULT in caplog.text


@pytest.mark.usefixtures("busy_device")
def test_an_index_that_is_not_there_is_told() -> None:
    with pytest.raises(SandboxConfigError, match="got 'cuda:1', expected an index below 1"):
        resolve_device("cuda:1")


def test_a_device_with_an_index_becomes_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.device] = []
    monkeypatch.setattr(device, "why_no_cuda", lambda: None)
    monkeypatch.setattr(device, "_fault_of", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    assert resolve_device("cuda") == torch.device("cuda")
    assert used == []
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert used == [torch.device("cuda:1")]


def test_only_a_build_with_cuda_and_a_driver_may_have_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(device, "CUDA_NODES", (tmp_path / "nvidiactl",))
    assert not is_cuda_possible()
    (tmp_path / "nvidiactl").touch()
    assert is_cuda_possible()
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert not is_cuda_possible()
