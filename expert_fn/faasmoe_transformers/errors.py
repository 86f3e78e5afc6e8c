"""Errors of the adapter, in terms of transformers; callers translate them to their settings."""


class UnsupportedVersions(RuntimeError):
    """The installed torch or transformers lacks a private name that this package uses."""


class UnsupportedModel(Exception):
    """A model or checkpoint that cannot be handled; the message names the field or tensor."""


class CacheAllocationFailed(Exception):
    """The device has no room for the KV cache; the message is torch's reason, one line."""


class CacheTooSmall(Exception):
    """The KV cache cannot hold one request of the maximum length.

    Attributes:
        n_sectors: sectors of the cache.
        n_required_sectors: sectors that one request needs.
    """

    def __init__(self, n_sectors: int, n_required_sectors: int) -> None:
        super().__init__(f"got {n_sectors} sectors, expected at least {n_required_sectors}")
        self.n_sectors = n_sectors
        self.n_required_sectors = n_required_sectors
