"""Where the live page of `faasmoe up` is served, and to whom."""

import argparse
from pathlib import Path

import pytest

from faasmoe_operator.cli import live_page
from faasmoe_operator.cli.live_page import LivePageOptions, live_page_options
from faasmoe_operator.errors import CommandError


def parse(*arguments: str, host: str = "127.0.0.1", gateway: bool = True) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    live_page.add_options(parser.add_argument_group("live page"))
    return parser.parse_args([*arguments], namespace=argparse.Namespace(host=host, gateway=gateway))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert live_page_options(parse(host=host)) == LivePageOptions()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com"])
def test_other_hosts_need_a_key(host: str) -> None:
    assert live_page_options(parse(host=host)) is None
    with pytest.raises(CommandError, match="expected --live-page-key KEY"):
        live_page_options(parse("--live-page", host=host))
    options = live_page_options(parse("--live-page-key", "secret", host=host))
    assert options == LivePageOptions(key="secret")


def test_it_can_be_turned_off() -> None:
    assert live_page_options(parse("--no-live-page", "--live-page-key", "secret")) is None


def test_the_gateway_serves_it() -> None:
    assert live_page_options(parse(gateway=False)) is None
    with pytest.raises(CommandError, match="no --no-gateway"):
        live_page_options(parse("--live-page", gateway=False))


@pytest.mark.parametrize("number", ["0", "-1", "x", "1.5", str(1 << 21)])
def test_other_numbers_of_tokens_are_refused(number: str) -> None:
    with pytest.raises(argparse.ArgumentError, match="expected 1 to 1048576"):
        parse(f"--live-page-min-tokens={number}")


def test_the_control_process_is_told(tmp_path: Path) -> None:
    options = live_page_options(parse("--live-page-min-tokens", "9", "--live-page-key", "k"))
    assert options is not None
    assert options.control_variables(tmp_path) == {
        "FAASMOE_PAGE_SOCKET": str(tmp_path / "page.sock"),
        "FAASMOE_PAGE_KEY": "k",
        "FAASMOE_PAGE_MIN_TOKENS": "9",
    }
