import asyncio
import base64

import pytest
from fake_kube_api import FakeKubeApi

from faasmoe_operator.kube.context import RootKeyError, derive_model_secrets, load_root_key
from faasmoe_operator.kube.types import SECRET, Kind, Object


def load_key(api: FakeKubeApi) -> bytes:
    return asyncio.run(load_root_key(api, namespace="faasmoe-system", name="root"))


def make_secret(text: str | None) -> Object:
    data = {} if text is None else {"data": {"root-key": text}}
    metadata = {"name": "root", "namespace": "faasmoe-system"}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, **data}


def test_root_key_is_created_once_and_reused() -> None:
    api = FakeKubeApi()
    first = load_key(api)
    assert len(first) == 32
    assert load_key(api) == first
    (secret,) = api.objects.values()
    assert secret["immutable"] is True


class RacingKubeApi(FakeKubeApi):
    """Another operator creates the Secret between our read and our create."""

    async def create(self, kind: Kind, obj: Object) -> Object:
        if not self.objects:
            await super().create(kind, make_secret(base64.b64encode(b"k" * 32).decode()))
        return await super().create(kind, obj)


def test_root_key_creation_race_uses_the_existing_key() -> None:
    assert load_key(RacingKubeApi()) == b"k" * 32


@pytest.mark.parametrize("text", [None, "", "!", base64.b64encode(b"short").decode()])
def test_rejects_an_invalid_root_key(text: str | None) -> None:
    api = FakeKubeApi()
    api.write(make_secret(text))
    with pytest.raises(RootKeyError, match=r"Secret faasmoe-system/root: data\.root-key: got"):
        load_key(api)
    assert SECRET in {kind for kind, _, _ in api.objects}


def test_model_secrets_are_distinct_and_deterministic() -> None:
    one, other = derive_model_secrets(b"r" * 32, "uid-1"), derive_model_secrets(b"r" * 32, "uid-2")
    assert one == derive_model_secrets(b"r" * 32, "uid-1")
    assert len({one.token, one.function_key, other.token, other.function_key}) == 4
    assert len(bytes.fromhex(one.function_key)) == 32
