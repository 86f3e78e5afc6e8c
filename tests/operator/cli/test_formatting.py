import pytest

from faasmoe_operator.cli.formatting import format_bytes


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(None, "-"), (0, "0 B"), (1536, "1.5 KiB"), (43 << 20, "43.0 MiB"), (3 << 29, "1.50 GiB")],
)
def test_formats_sizes(size_bytes: int | None, text: str) -> None:
    assert format_bytes(size_bytes) == text
