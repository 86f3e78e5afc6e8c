from typing import Any

import pytest

from faasmoe_operator.kube.status import COUNTS_INTERVAL_S, WrittenStatus, status_write_at
from faasmoe_operator.kube.types import Object

NOW = 100.0


def a_status(*, active: int = 1, reason: str = "Ready", message: str = "", **rest: Any) -> Object:
    ready = {"type": "Ready", "status": "True", "reason": reason, "message": message}
    return {"conditions": [ready], "functions": {"active": active}, "url": "u", **rest}


def written(status: Object, result: Object | None = None) -> WrittenStatus:
    return WrittenStatus(status, status if result is None else result, written_at=NOW - 1)


SAME = a_status()
PRUNED = {"url": "u"}


@pytest.mark.parametrize(
    ("wanted", "live", "last", "expected"),
    [
        pytest.param(SAME, SAME, None, None, id="as-it-is"),
        pytest.param(SAME, None, None, NOW, id="first"),
        pytest.param(SAME, {}, written(SAME), NOW, id="taken-away-by-others"),
        pytest.param(
            a_status(reason="Broken"), SAME, written(SAME), NOW, id="a-reason-is-told-at-once"
        ),
        pytest.param(a_status(url="v"), SAME, written(SAME), NOW, id="a-url-is-told-at-once"),
        pytest.param(
            a_status(active=2),
            SAME,
            written(SAME),
            NOW - 1 + COUNTS_INTERVAL_S,
            id="counts-are-told-seldom",
        ),
        pytest.param(
            a_status(message="2 of 3"),
            SAME,
            written(SAME),
            NOW - 1 + COUNTS_INTERVAL_S,
            id="messages-too",
        ),
        pytest.param(
            SAME, PRUNED, written(SAME, PRUNED), None, id="an-older-crd-drops-fields-once"
        ),
        pytest.param(
            a_status(reason="New"),
            PRUNED,
            written(SAME, PRUNED),
            NOW,
            id="an-older-crd-is-told-news-all-the-same",
        ),
    ],
)
def test_a_status_is_written_when_it_is_worth_it(
    wanted: Object, live: Object | None, last: WrittenStatus | None, expected: float | None
) -> None:
    assert status_write_at(wanted, live, last, now=NOW) == expected
