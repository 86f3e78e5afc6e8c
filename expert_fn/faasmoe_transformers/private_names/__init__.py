"""The private and undocumented names of torch and transformers that this package uses.

PRIVATE_NAMES is the one table: where each name is, why it is needed and which module here uses it.
Its parts are `batching`, on continuous batching, and `models`, on models and how they are loaded.
`version_check` resolves it against the installed versions. Documented classes that the package only
calls, such as ContinuousBatchingConfig, are not listed, nor are conventions of the families' own
classes, such as `shared_expert`, `num_experts` and the arguments of an experts module: the tests of
every family cover these.

A location is `module`, `module:attribute...`, or one of the latter followed by `(parameter)` for a
keyword argument or `[key]` for an entry of a mapping. An attribute of a class may also be one that
its instances get in a method.
"""

from faasmoe_transformers.private_names.batching import BATCHING_NAMES
from faasmoe_transformers.private_names.models import MODEL_NAMES
from faasmoe_transformers.private_names.private_name import PrivateName

__all__ = ["PRIVATE_NAMES", "PrivateName"]

PRIVATE_NAMES: tuple[PrivateName, ...] = (*BATCHING_NAMES, *MODEL_NAMES)
