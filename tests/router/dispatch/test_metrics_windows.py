"""What metrics show of calls: sums of many tokens, late, and no help to whoever reads a text."""

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from faasmoe_router.dispatch.metrics import DispatchMetrics

N_TOKENS, VOCABULARY, N_LAYERS, TOP_K, N_BLOCKS, N_EXPERTS = 2_560, 50, 12, 2, 3, 12


class Shown:
    """A router's metrics, read after every token."""

    def __init__(self, *, min_tokens: int) -> None:
        self.registry = CollectorRegistry()
        self.metrics = DispatchMetrics(self.registry)
        self.n_tokens = 0
        self.metrics.windows.show_late(lambda: self.n_tokens, min_tokens=min_tokens)

    def compute(self, n_calls: int) -> None:
        self.metrics.calls.inc(n_calls)
        self.metrics.sent_bytes.inc(100 * n_calls)
        self.metrics.failed_calls.inc()
        self.n_tokens += 1

    def read(self, name: str) -> float:
        value = self.registry.get_sample_value(f"faasmoe_router_{name}")
        assert value is not None
        return value


def test_calls_are_shown_by_windows_and_failures_at_once() -> None:
    shown = Shown(min_tokens=4)
    for number in range(1, 10):
        shown.compute(3)
        full = number - number % 4
        assert shown.read("function_calls_total") == 3 * full
        assert shown.read("function_sent_bytes_total") == 300 * full
        assert shown.read("function_call_failures_total") == number


def test_everything_is_shown_at_once_without_windows() -> None:
    registry = CollectorRegistry()
    metrics = DispatchMetrics(registry)
    metrics.calls.inc(2)
    assert registry.get_sample_value("faasmoe_router_function_calls_total") == 2


def test_every_counter_exists_at_zero_before_the_first_window() -> None:
    shown = Shown(min_tokens=256)
    shown.compute(3)
    text = generate_latest(shown.registry).decode()
    assert "faasmoe_router_function_calls_total 0.0" in text
    assert 'faasmoe_router_layer_seconds_bucket{le="+Inf"} 0.0' in text
    assert text.count("# TYPE faasmoe_router_function_calls_total") == 1


class Attack:
    """Guesses each token of a text from the calls that metrics show, read after every token.

    The attacker knows how many functions each token of the vocabulary calls, how often tokens
    occur, and when each was computed.
    """

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        order = random.permuted(np.tile(np.arange(N_EXPERTS), (VOCABULARY, N_LAYERS, 1)), axis=2)
        blocks = order[:, :, :TOP_K] * N_BLOCKS // N_EXPERTS  # (vocabulary, layers, top_k)
        self.calls = (1 + (blocks[:, :, 0] != blocks[:, :, 1])).sum(axis=1)  # (vocabulary,)
        weights = 1 / np.arange(1, VOCABULARY + 1)
        self.prior = weights / weights.sum()
        self.text = random.choice(VOCABULARY, size=N_TOKENS, p=self.prior)

    def accuracy(self, min_tokens: int) -> float:
        """Return the part of the text's tokens that the attacker names."""
        shown, before, n_right = Shown(min_tokens=min_tokens), 0.0, 0
        pending: list[int] = []
        for token in self.text:
            pending.append(int(token))
            shown.compute(int(self.calls[token]))
            calls = shown.read("function_calls_total")
            if calls == before:
                continue
            guess = self._most_likely((calls - before) / len(pending))
            n_right += pending.count(guess)
            before, pending = calls, []
        return n_right / N_TOKENS

    @property
    def accuracy_from_lengths(self) -> float:
        """What guessing the most frequent token gives."""
        return float(np.mean(self.text == np.argmax(self.prior)))

    def _most_likely(self, calls: float) -> int:
        """Return the most frequent token of those with as many calls; of all if there is none."""
        fits = self.calls == calls
        return int(np.argmax(np.where(fits, self.prior, 0) if fits.any() else self.prior))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_attacker_reads_no_more_than_from_lengths(seed: int) -> None:
    attack = Attack(seed)
    assert attack.accuracy(min_tokens=256) <= attack.accuracy_from_lengths + 0.02
    assert attack.accuracy(min_tokens=1) > attack.accuracy_from_lengths + 0.1
