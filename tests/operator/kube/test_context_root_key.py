import asyncio
import base64

import pytest
from fake_kube_api import FakeKubeApi

from faasmoe_operator.kube.context import RootKeyError, derive_model_secrets, load_root_key
from faasmoe_operator.kube.types import SECRET, Kind, Object


def key_of(api: FakeKubeApi) -> bytes:
    return asyncio.run(load_root_key(api, namespace="faasmoe-system", name="root"))


def a_secret(text: str | None) -> Object:
    data = {} if text is None else {"data": {"root-key": text}}
    metadata = {"name": "root", "namespace": "faasmoe-system"}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, **data}


def test_is_made_once_and_stays() -> None:
    api = FakeKubeApi()
    first = key_of(api)
    assert len(first) == 32
    assert key_of(api) == first
    (secret,) = api.objects.values()
    assert secret["immutable"] is True


class TakenMeanwhile(FakeKubeApi):
    """Another operator makes the key between our look and our own."""

    async def create(self, kind: Kind, obj: Object) -> Object:
        if not self.objects:
            await super().create(kind, a_secret(base64.b64encode(b"k" * 32).decode()))
        return await super().create(kind, obj)


def test_of_two_operators_that_begin_the_first_makes_it() -> None:
    assert key_of(TakenMeanwhile()) == b"k" * 32


@pytest.mark.parametrize("text", [None, "", "!", base64.b64encode(b"short").decode()])
def test_refuses_a_key_that_is_none(text: str | None) -> None:
    api = FakeKubeApi()
    api.write(a_secret(text))
    with pytest.raises(RootKeyError, match=r"Secret faasmoe-system/root: data\.root-key: got"):
        key_of(api)
    assert SECRET in {kind for kind, _, _ in api.objects}


def test_each_model_has_secrets_of_its_own_that_a_restart_knows() -> None:
    one, other = derive_model_secrets(b"r" * 32, "uid-1"), derive_model_secrets(b"r" * 32, "uid-2")
    assert one == derive_model_secrets(b"r" * 32, "uid-1")
    assert len({one.token, one.function_key, other.token, other.function_key}) == 4
    assert len(bytes.fromhex(one.function_key)) == 32
