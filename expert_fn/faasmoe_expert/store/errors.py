"""The one error of the store."""


class StoreError(Exception):
    """A store that cannot be used; the message names the file and the field, got and expected."""
