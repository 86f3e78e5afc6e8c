"""The Secret with the token by which a model's parts know each other.

Its name carries a hash of the token, so that it never changes: another token is another Secret, and
the pods that name it are replaced.
"""

from __future__ import annotations

import base64

from faasmoe_operator.kube.kinds import SECRET, Object
from faasmoe_operator.kube.manifests.context import ModelContext
from faasmoe_operator.kube.manifests.names import Component, control_name
from faasmoe_operator.kube.manifests.objects import new_object

TOKEN_KEY = "token"


def control_secret_name(ctx: ModelContext) -> str:
    """Return the name of the control Secret."""
    return control_name(ctx.name, ctx.secrets.digest)


def control_secret(ctx: ModelContext) -> Object:
    """Return the control Secret; the function key is nobody's but the operator's."""
    return new_object(
        ctx,
        SECRET,
        control_secret_name(ctx),
        component=Component.CONTROL,
        type="Opaque",
        immutable=True,
        data={TOKEN_KEY: base64.b64encode(ctx.secrets.token.encode()).decode()},
    )


def token_variable(ctx: ModelContext) -> Object:
    """Return FAASMOE_TOKEN, read from the control Secret."""
    reference = {"name": control_secret_name(ctx), "key": TOKEN_KEY}
    return {"name": "FAASMOE_TOKEN", "valueFrom": {"secretKeyRef": reference}}
