"""The router's errors.

RouterError
├── ConfigError           a setting that the process cannot start with
├── ChatTemplateError     messages that the model's chat template does not take
├── EngineUnavailable     the engine does not run (starting again, stopped, or given up)
├── EngineSaturated       more requests wait than the engine may hold
├── HoldQueueFull         more requests wait for functions to be started than may
├── ActivationTimeout     functions that a request needs could not be started in time
├── StoreUnreadable       the store was removed or damaged while it was served
├── ConstraintError       a grammar that a text cannot be held to
├── StoreCorrupted        bytes of the store that a request needs are wrong, and no sandbox has them
└── GenerationFailed      a request that had been accepted could not be finished
    └── NoTokenAllowed    its own constraints leave no token that may come next
"""


class RouterError(Exception):
    """Base of all errors that the router raises on purpose."""


class ConfigError(RouterError):
    """A setting that the process cannot start with; the message names the variable."""


class ChatTemplateError(RouterError):
    """Messages that the model's chat template does not take."""


class EngineUnavailable(RouterError):
    """The engine does not run: it starts again, was stopped, or has given up."""


class EngineSaturated(RouterError):
    """More requests wait than the engine may hold."""


class HoldQueueFull(RouterError):
    """More requests wait for functions to be started than may."""


class ActivationTimeout(RouterError):
    """Functions that a request needs could not be started in time."""


class StoreUnreadable(RouterError):
    """The store was removed or damaged while it was served; starting again does not help."""


class StoreCorrupted(RouterError):
    """Bytes of the store that a request needs are wrong, and no sandbox has right ones."""


class DeviceLost(RouterError):
    """The model's device cannot be used any more by this process; only a new one can go on."""


class GenerationFailed(RouterError):
    """A request that had been accepted could not be finished."""


class ConstraintError(RouterError):
    """A grammar that a text cannot be held to: wrong, too large, or of a kind not known here."""


class NoTokenAllowed(GenerationFailed):
    """A request's own constraints leave no token that may come next, or cost too much."""
