"""What ends a text, besides its length."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]
StopReason = str | int


@dataclass(frozen=True, slots=True)
class Ending:
    """What a request lets end its text.

    Attributes:
        stops: strings that end the text.
        stop_ids: tokens that end the text, besides the model's own end tokens.
        ignore_eos: whether to go on after the model's end tokens.
        min_tokens: the tokens before which nothing ends the text.
        included: whether the stop string, or the token, that ends the text is in it.
    """

    stops: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    included: bool = False

    def end_ids(self, eos_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tokens that end the text, of a model with these end tokens."""
        return (*(() if self.ignore_eos else eos_ids), *self.stop_ids)
