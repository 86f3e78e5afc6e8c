"""Which calls and states of functions are shown, and when. Pure.

Which experts a token chose tells which token it was: from routing traces alone, 91 % of a text can
be had back (arXiv 2602.04105). So calls of functions are shown as sums over all tenants, of at
least `min_tokens` tokens, once these have passed, with Laplace noise: each window of sums is
`epsilon`-differentially private for one token (Dwork et al. 2006, "Calibrating noise to
sensitivity"), and a token is in one window only. States and replicas follow calls, so they are
shown with the same window. Only when no function is active are all shown as what they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from faasmoe_operator.control.functions import ManagedFunction

MAX_LEVEL = 9


class UniformRandom(Protocol):
    """A source of randomness; `random.SystemRandom` implements it."""

    def random(self) -> float:
        """Return a number from [0, 1)."""
        ...


@dataclass(frozen=True, slots=True)
class PrivacySettings:
    """How much of the functions is shown.

    Attributes:
        min_tokens: tokens of all tenants together that a window holds at least.
        epsilon: privacy loss of one token; noise has the scale `rows per token / epsilon`.
    """

    min_tokens: int = 256
    epsilon: float = 1.0


@dataclass(frozen=True, slots=True)
class ShownFunction:
    """What is shown of one function.

    Attributes:
        level: its part of its layers' rows in the last window, 0 to `MAX_LEVEL`; the function with
            the most rows of a layer has `MAX_LEVEL`.
        replicas: replicas that could be called at the end of the window.
        desired: replicas wanted then.
    """

    level: int = 0
    replicas: int = 0
    desired: int = 0


@dataclass(slots=True)
class FunctionWindow:
    """Sums the rows of calls until a window is full, then shows them.

    Args:
        functions: the model's functions by id.
        rows_per_token: most rows that one token adds to all functions together.
        settings: how much is shown.

    Attributes:
        shown: what is shown, by function id.
        shown_at: when that was, seconds on the caller's clock; None if nothing has been shown.
    """

    functions: Mapping[str, ManagedFunction]
    rows_per_token: int
    settings: PrivacySettings
    shown: dict[str, ShownFunction] = field(default_factory=dict)
    shown_at: float | None = None
    _rows: dict[str, int] = field(default_factory=dict)

    def add(self, rows: Iterable[tuple[str, int]]) -> None:
        """Add (function, rows) pairs of calls."""
        for name, count in rows:
            self._rows[name] = self._rows.get(name, 0) + count

    @property
    def n_tokens(self) -> int:
        """Tokens in the window, at least: a token adds at most one row per function and layer."""
        return max(
            (rows // len(self.functions[n].spec.layers) for n, rows in self._rows.items()),
            default=0,
        )

    def layer_replicas(self) -> dict[int, int]:
        """Return the replicas that are shown, by layer; 0 before anything is shown.

        A function over several layers counts in each.
        """
        replicas = {layer: 0 for f in self.functions.values() for layer in f.spec.layers}
        for name, function in self.shown.items():
            for layer in self.functions[name].spec.layers:
                replicas[layer] += function.replicas
        return dict(sorted(replicas.items()))

    def show(
        self,
        replicas: Mapping[str, tuple[int, int]],
        *,
        now: float,
        random: UniformRandom,
    ) -> bool:
        """Show the window if it is full, or the states if no function is active.

        Args:
            replicas: (ready, desired) replicas of functions that have any.
            now: current time, seconds.
            random: source of the noise.

        Returns:
            Whether anything new is shown.
        """
        if self.n_tokens >= self.settings.min_tokens:
            levels = self._noisy_levels(random)
        elif not replicas and any(f.replicas or f.desired for f in self.shown.values()):
            levels = {name: function.level for name, function in self.shown.items()}
        else:
            return False
        self.shown = {
            name: ShownFunction(levels.get(name, 0), *replicas.get(name, (0, 0)))
            for name in self.functions
        }
        self.shown_at = now
        return True

    def _noisy_levels(self, random: UniformRandom) -> dict[str, int]:
        scale = self.rows_per_token / self.settings.epsilon
        noisy = {
            name: max(0.0, self._rows.get(name, 0) + laplace(scale, random))
            for name in self.functions
        }
        self._rows.clear()
        by_layers: dict[tuple[int, ...], list[str]] = {}
        for name, function in self.functions.items():
            by_layers.setdefault(tuple(function.spec.layers), []).append(name)
        levels = {}
        for names in by_layers.values():
            even_share = self.settings.min_tokens / len(names)  # the busiest function has no less
            most = max(even_share, *(noisy[name] for name in names))
            levels.update({name: round(MAX_LEVEL * noisy[name] / most) for name in names})
        return levels


def laplace(scale: float, random: UniformRandom) -> float:
    """Draw from the Laplace distribution around 0 with this scale."""
    uniform = random.random() - 0.5
    return -scale * math.copysign(math.log1p(-2 * abs(uniform)), uniform)
