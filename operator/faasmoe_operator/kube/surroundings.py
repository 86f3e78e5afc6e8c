"""What all models of one operator have in common, and one model in the midst of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from faasmoe_operator.kube.kinds import Object
from faasmoe_operator.kube.manifests import ControlEndpoint, Images, ModelContext
from faasmoe_operator.kube.root_key import model_secrets
from faasmoe_operator.spec import MoEModel


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What surrounds every model.

    Attributes:
        images: what pods run.
        control: the operator's control API.
        root_key: what tokens are derived from.
        served: tells the optional APIs that the cluster serves now, such as
            "gateway.networking.k8s.io/v1".
    """

    images: Images
    control: ControlEndpoint
    root_key: bytes = field(repr=False)
    served: Callable[[], frozenset[str]] = frozenset

    def context(self, model: MoEModel, obj: Object) -> ModelContext:
        """Return a model with what surrounds it.

        Args:
            model: what is asked for.
            obj: the object that says so.
        """
        metadata = obj["metadata"]
        return ModelContext(
            model=model,
            namespace=metadata["namespace"],
            uid=metadata["uid"],
            generation=metadata.get("generation", 0),
            images=self.images,
            control=self.control,
            secrets=model_secrets(self.root_key, metadata["uid"]),
            api=self.served(),
        )
