"""The live page of `faasmoe up`: its options, and where it is served."""

from __future__ import annotations

import argparse
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from faasmoe_operator.errors import CommandError

PAGE_PATH = "/ui/"
SOCKET_NAME = "page.sock"
DEFAULT_MIN_TOKENS = 256
MAX_MIN_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class LivePageOptions:
    """How the live page is served.

    Attributes:
        key: the key that it asks for; empty for none.
        min_tokens: tokens that sums over single functions hold at least.
    """

    key: str = ""
    min_tokens: int = DEFAULT_MIN_TOKENS

    def control_variables(self, folder: Path) -> dict[str, str]:
        """Return what the control process's environment says of it.

        Args:
            folder: private runtime folder of this instance, where its socket is.
        """
        return {
            "FAASMOE_PAGE_SOCKET": str(folder / SOCKET_NAME),
            "FAASMOE_PAGE_KEY": self.key,
            "FAASMOE_PAGE_MIN_TOKENS": str(self.min_tokens),
        }


def add_options(group: argparse._ArgumentGroup) -> None:
    """Add the live page's options."""
    group.add_argument(
        "--live-page",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"serve a page at {PAGE_PATH} of functions, activations and sandboxes, without a key "
        "on loopback alone (default: on loopback, or with --live-page-key)",
    )
    group.add_argument(
        "--live-page-key", metavar="KEY", default="", help="key that the live page asks for"
    )
    group.add_argument(
        "--live-page-min-tokens",
        type=_min_tokens,
        default=DEFAULT_MIN_TOKENS,
        metavar="N",
        help="show calls of single functions only as sums over at least N tokens of all tenants "
        "(default: %(default)s)",
    )


def live_page_options(arguments: argparse.Namespace) -> LivePageOptions | None:
    """Return how the page is served; None if it is not.

    Raises:
        CommandError: the page is asked for where it cannot be served.
    """
    is_open = is_loopback(arguments.host) or bool(arguments.live_page_key)
    if arguments.live_page and not is_open:
        what = f"--live-page: got --host {arguments.host}, which others reach"
        raise CommandError(f"{what}; expected --live-page-key KEY", exit_status=2)
    if arguments.live_page and not arguments.gateway:
        raise CommandError("--live-page: expected no --no-gateway, which serves it", exit_status=2)
    if arguments.live_page is False or not is_open or not arguments.gateway:
        return None
    return LivePageOptions(arguments.live_page_key, arguments.live_page_min_tokens)


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _min_tokens(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_MIN_TOKENS:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 1 to {MAX_MIN_TOKENS}")
    return int(text)
