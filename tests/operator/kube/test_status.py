from typing import Any

import pytest

from faasmoe_operator.kube.status import COUNTS_INTERVAL_S, WrittenStatus, status_write_at
from faasmoe_operator.kube.types import Object

NOW = 100.0


def make_status(
    *, active: int = 1, reason: str = "Ready", message: str = "", **rest: Any
) -> Object:
    ready = {"type": "Ready", "status": "True", "reason": reason, "message": message}
    return {"conditions": [ready], "functions": {"active": active}, "url": "u", **rest}


def written(status: Object, result: Object | None = None) -> WrittenStatus:
    return WrittenStatus(status, status if result is None else result, written_at=NOW - 1)


SAME = make_status()
PRUNED = {"url": "u"}


@pytest.mark.parametrize(
    ("desired", "live", "last", "expected"),
    [
        pytest.param(SAME, SAME, None, None, id="unchanged"),
        pytest.param(SAME, None, None, NOW, id="first"),
        pytest.param(SAME, {}, written(SAME), NOW, id="removed-by-others"),
        pytest.param(
            make_status(reason="Broken"), SAME, written(SAME), NOW, id="a-reason-is-written-at-once"
        ),
        pytest.param(make_status(url="v"), SAME, written(SAME), NOW, id="a-url-is-written-at-once"),
        pytest.param(
            make_status(active=2),
            SAME,
            written(SAME),
            NOW - 1 + COUNTS_INTERVAL_S,
            id="counters-are-delayed",
        ),
        pytest.param(
            make_status(message="2 of 3"),
            SAME,
            written(SAME),
            NOW - 1 + COUNTS_INTERVAL_S,
            id="messages-are-delayed",
        ),
        pytest.param(
            SAME, PRUNED, written(SAME, PRUNED), None, id="an-older-crd-drops-fields-once"
        ),
        pytest.param(
            make_status(reason="New"),
            PRUNED,
            written(SAME, PRUNED),
            NOW,
            id="an-older-crd-gets-changes",
        ),
    ],
)
def test_status_write_at(
    desired: Object, live: Object | None, last: WrittenStatus | None, expected: float | None
) -> None:
    assert status_write_at(desired, live, last, now=NOW) == expected
