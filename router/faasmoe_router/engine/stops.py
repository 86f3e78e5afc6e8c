"""Stop strings in a stream of text: nothing of one is emitted, unless it is asked for."""

from collections.abc import Sequence


class StopMatcher:
    """Finds the stop string that is complete first, however the text is cut into pieces.

    Text is held back only while it may be the beginning of a stop string.

    Args:
        stops: the stop strings.
        included: whether the one that ends the text is emitted after all.

    Attributes:
        found: the stop string that ended the text, if one did.
    """

    def __init__(self, stops: Sequence[str], *, included: bool = False) -> None:
        if any(not stop for stop in stops):
            raise ValueError(f"stops: got {list(stops)!r}, expected strings that are not empty")
        self._stops = tuple(stops)
        self._included = included
        self.found: str | None = None
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Take more text; return what may be emitted and whether a stop string was reached."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            end, start = min(found)
            self.found = text[start:end]
            return text[: end if self._included else start], True
        n_held = self._beginning(text)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held], False

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Return the length of the longest end of the text that begins some stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
