"""What sandboxes show of their work: sums of many tokens, late, no help to readers of a text."""

import numpy as np
import numpy.typing as npt
import pytest
from metric_samples import parse_sample
from prometheus_client.exposition import generate_latest

from faasmoe_expert.server import shown_work
from faasmoe_expert.server.metrics import SandboxMetrics
from faasmoe_expert.server.shown_work import PERIOD_S, Work, WorkWindow, draw_laplace

Booleans = npt.NDArray[np.bool_]


def exact(_scale: float) -> float:
    return 0.0


def work(rows: int) -> Work:
    return Work(python_frames=rows, computations=(rows,) + (0,) * 11, compute_s=rows * 1e-5)


def test_nothing_is_shown_of_fewer_tokens() -> None:
    window = WorkWindow(4, draw_noise=exact)
    window.set_layers(2)
    assert not window.end(work(7), 0.0)
    assert window.shown == Work()


def test_a_full_window_is_shown_and_the_next_one_begins() -> None:
    window = WorkWindow(4, draw_noise=exact)
    window.set_layers(2)
    assert window.end(work(8), 0.0)
    assert window.shown.rows == 8
    assert not window.end(work(15), PERIOD_S)
    assert window.end(work(17), 2 * PERIOD_S)
    assert window.shown.rows == 17


def test_a_window_ends_at_the_first_scrape_of_a_period_only() -> None:
    window = WorkWindow(4, draw_noise=exact)
    assert not window.end(work(3), 0.0)
    assert not window.end(work(5), PERIOD_S - 0.1)
    assert window.end(work(6), PERIOD_S)


def test_functions_that_left_during_a_window_count_in_it() -> None:
    window = WorkWindow(4, draw_noise=exact)
    window.set_layers(3)
    window.set_layers(1)
    assert not window.end(work(11), 0.0)
    assert window.end(work(12), PERIOD_S)
    assert window.end(work(16), 2 * PERIOD_S)


def test_one_token_is_shown_at_once_and_exactly() -> None:
    window = WorkWindow(1, draw_noise=draw_laplace)
    for rows in (1, 2):
        assert window.end(work(rows), 0.0)
        assert window.shown == work(rows)


def test_noise_is_that_of_one_token_and_counts_never_fall() -> None:
    scales: list[float] = []

    def draw(scale: float) -> float:
        scales.append(scale)
        return -1e9

    window = WorkWindow(4, draw_noise=draw)
    window.set_layers(6)
    assert window.end(work(24), 0.0)
    assert window.shown == Work()  # counts that were 0 stay so, others fall to 0 at most
    assert set(scales) == {4 * 6}
    assert len(scales) == 2


def test_laplace_draws_have_their_scale() -> None:
    draws = np.array([draw_laplace(8.0) for _ in range(20_000)])
    assert np.mean(np.abs(draws)) == pytest.approx(8.0, rel=0.1)
    assert np.mean(draws) == pytest.approx(0.0, abs=0.6)


def test_metrics_keep_what_follows_calls_until_a_window_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("faasmoe_expert.server.metrics.time.monotonic", lambda: now[0])
    metrics = SandboxMetrics(min_tokens=256)
    metrics.set_functions([100], n_layers=1)
    metrics.functions.attach_seconds.observe(0.2)

    def read(name: str) -> float:
        return parse_sample(metrics.render().decode(), f"faasmoe_expert_{name}")

    names = ("frames_total", "rows_total", "compute_seconds_count", "functions", "function_bytes")
    metrics.count_batch(n_frames=200, n_rows=255, seconds=0.001)
    metrics.refused.labels("bad_frame").inc()
    assert [read(name) for name in (*names, "attach_seconds_count")] == [0] * 6
    assert read('refused_total{code="bad_frame"}') == 1
    metrics.count_batch(n_frames=200, n_rows=200, seconds=0.001)
    assert read("rows_total") == 0
    now[0] = PERIOD_S
    assert read("rows_total") == pytest.approx(455, abs=150)
    assert (read("functions"), read("function_bytes"), read("attach_seconds_count")) == (1, 100, 1)
    assert generate_latest(metrics.registry).decode().count("# TYPE faasmoe_expert_rows_total") == 1


# An attacker who scrapes every sandbox after every token, and knows everything but the text.

N_TOKENS, VOCABULARY, N_LAYERS, TOP_K, N_BLOCKS, N_EXPERTS = 2_560, 50, 12, 2, 3, 12
TOKENS_PER_S = 20
N_SANDBOXES = N_LAYERS * N_BLOCKS


class Attack:
    """Guesses each token of a text from the rows that sandboxes of one function each show.

    The attacker knows which functions each token of the vocabulary calls, how often tokens occur,
    and when each was computed. The moment at which a count moves is that of a call, if windows end
    with calls: an attacker who believes so uses it.
    """

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        order = random.permuted(np.tile(np.arange(N_EXPERTS), (VOCABULARY, N_LAYERS, 1)), axis=2)
        blocks = order[:, :, :TOP_K] * N_BLOCKS // N_EXPERTS  # (vocabulary, layers, top_k)
        called = (blocks[..., None] == np.arange(N_BLOCKS)).any(axis=2)
        self.calls: Booleans = called.reshape(VOCABULARY, N_SANDBOXES)
        weights = 1 / np.arange(1, VOCABULARY + 1)
        self.prior = weights / weights.sum()
        self.text = random.choice(VOCABULARY, size=N_TOKENS, p=self.prior)

    def accuracy(self, min_tokens: int, *, believes_moments: bool = False) -> float:
        """Return the part of the text's tokens that the attacker names."""
        rates, moved = self.read(min_tokens)
        if believes_moments:
            rates[moved] = 1
        usual = self.prior @ self.calls  # (sandboxes,)
        rates, usual = (np.clip(p, 1e-3, 1 - 1e-3) for p in (rates, usual))
        called, spared = np.log(rates / usual), np.log((1 - rates) / (1 - usual))
        scores = np.log(self.prior) + called @ self.calls.T + spared @ ~self.calls.T
        return float(np.mean(np.argmax(scores, axis=1) == self.text))

    @property
    def accuracy_from_lengths(self) -> float:
        """What guessing the most frequent token gives."""
        return float(np.mean(self.text == np.argmax(self.prior)))

    def read(self, min_tokens: int) -> tuple[npt.NDArray[np.float64], Booleans]:
        """Return the rate of calls that is shown, and whether it moved: (tokens, sandboxes)."""
        windows = [WorkWindow(min_tokens) for _ in range(N_SANDBOXES)]
        for window in windows:
            window.set_layers(1)
        done = np.cumsum(self.calls[self.text], axis=0)
        rates = np.tile(self.prior @ self.calls, (N_TOKENS, 1))
        moved = np.zeros((N_TOKENS, N_SANDBOXES), dtype=bool)
        for sandbox, window in enumerate(windows):
            before, since = 0, 0
            for token in range(N_TOKENS):
                window.end(Work(python_frames=int(done[token, sandbox])), token / TOKENS_PER_S)
                if window.shown.rows != before:
                    new = window.shown.rows - before
                    rates[since : token + 1, sandbox] = new / (token + 1 - since)
                    moved[token, sandbox] = True
                    before, since = window.shown.rows, token + 1
        return rates, moved


@pytest.mark.parametrize("believes_moments", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_attacker_reads_no_more_than_from_lengths(seed: int, believes_moments: bool) -> None:
    attack = Attack(seed)
    learned = attack.accuracy(256, believes_moments=believes_moments) - attack.accuracy_from_lengths
    assert learned <= 0.01


@pytest.mark.parametrize(("believes_moments", "learned"), [(False, 0.25), (True, 0.5)])
def test_the_attacker_would_read_what_was_shown_per_token(
    believes_moments: bool, learned: float
) -> None:
    attack = Attack(0)
    accuracy = attack.accuracy(1, believes_moments=believes_moments)
    assert accuracy > attack.accuracy_from_lengths + learned


def test_the_moment_of_a_change_is_that_of_a_period(monkeypatch: pytest.MonkeyPatch) -> None:
    attack = Attack(0)
    _, moved = attack.read(256)
    tokens, _ = np.nonzero(moved)
    assert len(tokens)
    assert not np.any(tokens % round(PERIOD_S * TOKENS_PER_S))
    monkeypatch.setattr(shown_work, "PERIOD_S", 0.1 / TOKENS_PER_S)
    _, moved = attack.read(256)  # else each change would be a call
    tokens, sandboxes = np.nonzero(moved)
    assert attack.calls[attack.text[tokens], sandboxes].all()
