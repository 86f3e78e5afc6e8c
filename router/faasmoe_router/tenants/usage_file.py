"""The accounts' file: written whole, beside the old one, and then put in its place."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

from faasmoe_router.errors import ConfigError
from faasmoe_router.tenants.usage import Accounts

logger = logging.getLogger(__name__)

NAME = "usage.json"


class UsageFile:
    """Keeps accounts in a folder, which belongs to one router.

    Raises:
        ConfigError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"FAASMOE_STATE_DIR: {folder}: {error.strerror}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"FAASMOE_STATE_DIR: {folder}: cannot be written to")
        self._path = folder / NAME
        self._written = ""

    def load(self) -> Accounts:
        """Return the accounts as they were kept; new ones if there are none.

        What cannot be read is put aside, for somebody to look at.
        """
        try:
            return Accounts.from_json(json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            aside = self._path.with_suffix(".damaged")
            logger.error("%s cannot be read: %s; it is kept as %s", self._path, error, aside.name)
            self._path.replace(aside)
        return Accounts(time.time())

    def save(self, content: str) -> None:
        """Write the accounts, unless they are what was written last; failing is logged."""
        if content == self._written:
            return
        beside = self._path.with_suffix(".new")
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
        except OSError as error:
            logger.error("The tenants' accounts cannot be kept: %s: %s", self._path, error.strerror)
        else:
            self._written = content
