"""Which replica gets a call: the less busy one of two. Pure."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence


def choose(
    addresses: Sequence[str],
    *,
    avoid: Container[str],
    tried: Container[str] = (),
    busy: Mapping[str, int],
    turn: int,
    chance: float,
) -> str | None:
    """Return an address for a call, None if none is left.

    Two that differ are looked at, and the one with fewer calls in flight is taken: close to the
    least busy of all, and routers that see the same figures do not all run to the same one.

    Args:
        addresses: where the function is.
        avoid: addresses that are ejected.
        tried: addresses that this call was made at before.
        busy: calls in flight at each address.
        turn: goes up by one with each batch; spreads calls that find all equally busy.
        chance: a random number, 0 or more and less than 1.
    """
    fit = [a for a in addresses if a not in avoid and a not in tried]
    if len(fit) < 2:
        return fit[0] if fit else None
    first = turn % len(fit)
    second = (first + 1 + int(chance * (len(fit) - 1))) % len(fit)
    if busy.get(fit[second], 0) < busy.get(fit[first], 0):
        return fit[second]
    return fit[first]
