"""Resolution of device names without CUDA; for CUDA see tests/gpu."""

from pathlib import Path

import pytest
import torch

from faasmoe_expert import device
from faasmoe_expert.config import SandboxConfigError
from faasmoe_expert.device import cuda_unavailable_reason, is_cuda_possible, resolve_device

requires_no_cuda = pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs a machine without CUDA"
)
FAILURE = "CUDA-capable device(s) is/are busy or unavailable"


@pytest.fixture
def busy_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device that torch counts and that fails when used."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"{FAILURE}\nCUDA kernel errors might be …")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "zeros", fail)


def test_resolves_cpu() -> None:
    assert resolve_device("cpu") == torch.device("cpu")


@requires_no_cuda
def test_auto_resolves_to_cpu_without_cuda() -> None:
    assert resolve_device("auto") == torch.device("cpu")


@requires_no_cuda
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_missing_cuda_device_is_reported_with_a_remedy(name: str) -> None:
    with pytest.raises(SandboxConfigError) as refused:
        resolve_device(name, field="spec.x")
    assert (
        str(refused.value)
        == f"spec.x: got {name!r}, expected cpu or auto: {cuda_unavailable_reason()}"
    )


def test_distinguishes_a_build_without_cuda_from_a_missing_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert "is built without CUDA; install its CUDA build" in str(cuda_unavailable_reason())
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "finds no CUDA device (CUDA_VISIBLE_DEVICES is '7')" in str(cuda_unavailable_reason())


@pytest.mark.usefixtures("busy_device")
def test_unusable_device_is_reported() -> None:
    with pytest.raises(SandboxConfigError) as refused:
        resolve_device("cuda")
    assert str(refused.value) == f"FAASMOE_DEVICE: got 'cuda', which is unusable: {FAILURE}"


@pytest.mark.usefixtures("busy_device")
def test_auto_falls_back_to_cpu_if_the_device_is_unusable(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert resolve_device("auto") == torch.device("cpu")
    assert FAILURE in caplog.text


@pytest.mark.usefixtures("busy_device")
def test_rejects_an_index_out_of_range() -> None:
    with pytest.raises(SandboxConfigError, match="got 'cuda:1', expected an index below 1"):
        resolve_device("cuda:1")


def test_device_with_an_index_becomes_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.device] = []
    monkeypatch.setattr(device, "cuda_unavailable_reason", lambda: None)
    monkeypatch.setattr(device, "_device_failure", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    assert resolve_device("cuda") == torch.device("cuda")
    assert used == []
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert used == [torch.device("cuda:1")]


def test_cuda_is_possible_only_with_a_cuda_build_and_a_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(device, "CUDA_NODES", (tmp_path / "nvidiactl",))
    assert not is_cuda_possible()
    (tmp_path / "nvidiactl").touch()
    assert is_cuda_possible()
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert not is_cuda_possible()
