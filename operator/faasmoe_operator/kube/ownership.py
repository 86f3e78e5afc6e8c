"""Whose an object is: nothing is changed or deleted that is not the MoEModel's own. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from faasmoe_operator.kube.cache import controller_uid
from faasmoe_operator.kube.kinds import CLAIM, Object, kind_of
from faasmoe_operator.kube.manifests.names import FIELD_MANAGER, MANAGED_BY_LABEL, MODEL_LABEL


@dataclass(frozen=True, slots=True)
class Owner:
    """The MoEModel that objects are made for.

    Attributes:
        uid: its uid.
        name: its name.
    """

    uid: str
    name: str

    def owns(self, live: Object) -> bool:
        """Return whether an object is this model's.

        A claim that outlives its model has no owner; it is that of whatever model has the name.
        """
        controller = controller_uid(live)
        if controller is not None:
            return controller == self.uid
        labels = live["metadata"].get("labels", {})
        ours = labels.get(MANAGED_BY_LABEL) == FIELD_MANAGER
        return kind_of(live) == CLAIM and ours and labels.get(MODEL_LABEL) == self.name

    def preceded(self, live: Object) -> bool:
        """Return whether an object is of a MoEModel of this name that was deleted before."""
        return any(
            reference.get("kind") == "MoEModel" and reference.get("name") == self.name
            for reference in live["metadata"].get("ownerReferences", ())
            if reference.get("controller") and reference.get("uid") != self.uid
        )
