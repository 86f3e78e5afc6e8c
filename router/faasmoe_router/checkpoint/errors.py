"""The error of checkpoint preparation."""


class PrepareError(Exception):
    """A checkpoint or a store folder that cannot be used; the message says what is missing."""
