"""What is shown of functions: sums of many tokens, late, with noise."""

import random
from collections.abc import Mapping

import numpy as np
import pytest

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.control.functions import ManagedFunction
from faasmoe_operator.control.live.shown_functions import (
    MAX_LEVEL,
    FunctionWindow,
    PrivacySettings,
    ShownFunction,
    laplace,
)
from faasmoe_operator.scaling import ScalingSettings

N_LAYERS, N_BLOCKS = 4, 3
NO_NOISE = PrivacySettings(min_tokens=4, epsilon=1e9)


def functions(n_layers: int = N_LAYERS, n_blocks: int = N_BLOCKS) -> dict[str, ManagedFunction]:
    specs = [
        FunctionSpec(f"{layer}x{block}", (layer,), (block,))
        for layer in range(n_layers)
        for block in range(n_blocks)
    ]
    return {spec.id: ManagedFunction(spec, 10, ScalingSettings()) for spec in specs}


def window(settings: PrivacySettings = NO_NOISE, **shape: int) -> FunctionWindow:
    return FunctionWindow(functions(**shape), N_LAYERS * 2, settings)


def show(shown: FunctionWindow, replicas: Mapping[str, tuple[int, int]], now: float = 0) -> bool:
    return shown.show(replicas, now=now, random=random.Random(0))


def test_nothing_is_shown_of_fewer_tokens() -> None:
    shown = window()
    shown.add([("0x0", 3), ("1x0", 3)])
    assert not show(shown, {"0x0": (1, 1)})
    assert (shown.shown, shown.shown_at, shown.n_tokens) == ({}, None, 3)


def test_a_full_window_is_shown_and_the_next_one_begins() -> None:
    shown = window()
    shown.add([("0x0", 3), ("0x1", 1)])
    shown.add([("0x0", 1), ("0x1", 1)])
    assert show(shown, {"0x0": (2, 2), "0x1": (0, 1)}, now=7)
    assert shown.shown["0x0"] == ShownFunction(MAX_LEVEL, replicas=2, desired=2)
    assert shown.shown["0x1"] == ShownFunction(4, replicas=0, desired=1)
    assert shown.shown["1x0"] == ShownFunction()
    assert (shown.shown_at, shown.n_tokens) == (7, 0)
    assert not show(shown, {"0x0": (1, 1)}, now=8)
    assert shown.shown["0x0"].replicas == 2


def test_tokens_of_functions_over_several_layers_count_once() -> None:
    spec = FunctionSpec("a", (0, 1), (0,))
    shown = FunctionWindow({"a": ManagedFunction(spec, 1, ScalingSettings())}, 2, NO_NOISE)
    shown.add([("a", 6)])
    assert shown.n_tokens == 3


def test_an_idle_model_is_shown_at_zero_at_once() -> None:
    shown = window()
    assert not show(shown, {})
    shown.add([("0x0", 4)])
    show(shown, {"0x0": (1, 1)})
    shown.add([("0x0", 1)])
    assert show(shown, {}, now=9)
    assert {f.replicas for f in shown.shown.values()} == {0}
    assert shown.n_tokens == 1  # calls wait for their window


def test_noise_has_the_scale_of_one_token() -> None:
    source = random.Random(1)
    draws = np.array([laplace(8.0, source) for _ in range(20_000)])
    assert np.mean(np.abs(draws)) == pytest.approx(8.0, rel=0.05)
    assert np.mean(draws) == pytest.approx(0.0, abs=0.3)


# An attacker who knows everything but the text.

N_TOKENS, VOCABULARY, N_EXPERTS, TOP_K = 5_120, 50, 12, 2


class Attack:
    """Estimates which tokens a text has from what is shown, by maximum likelihood (MLEM).

    The attacker knows which experts each token of the vocabulary chooses, how often tokens occur in
    texts of this kind, and how many tokens each window holds.
    """

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        order = self.random.permuted(
            np.tile(np.arange(N_EXPERTS), (VOCABULARY, N_LAYERS, 1)), axis=2
        )
        blocks = order[:, :, :TOP_K] * N_BLOCKS // N_EXPERTS  # (vocabulary, layers, top_k)
        self.cells = np.zeros((VOCABULARY, N_LAYERS, N_BLOCKS))
        for layer in range(N_LAYERS):
            for choice in range(TOP_K):
                self.cells[np.arange(VOCABULARY), layer, blocks[:, layer, choice]] = 1
        weights = 1 / np.arange(1, VOCABULARY + 1)
        self.prior = weights / weights.sum()
        self.text = self.random.choice(VOCABULARY, size=N_TOKENS, p=self.prior)

    def accuracy(self, settings: PrivacySettings) -> float:
        """Return the part of the text's tokens that the attacker names."""
        shown = FunctionWindow(functions(), TOP_K * N_LAYERS, settings)
        noise, n_right, pending = random.Random(0), 0, list[int]()
        for token in self.text:
            pending.append(token)
            layers, blocks = np.nonzero(self.cells[token])
            shown.add((f"{i}x{j}", 1) for i, j in zip(layers, blocks, strict=True))
            if shown.show({"0x0": (1, 1)}, now=0, random=noise):
                guess = self._most_likely(shown)
                n_right += sum(token == guess for token in pending)
                pending.clear()
        return n_right / len(self.text)

    @property
    def accuracy_from_lengths(self) -> float:
        """What guessing the most frequent token gives."""
        return float(np.mean(self.text == np.argmax(self.prior)))

    def _most_likely(self, shown: FunctionWindow) -> int:
        levels = np.array(
            [[shown.shown[f"{i}x{j}"].level for j in range(N_BLOCKS)] for i in range(N_LAYERS)]
        )
        expected = np.tensordot(self.prior, self.cells, axes=1)  # (layers, blocks)
        observed = levels * (expected.max(axis=1) / MAX_LEVEL)[:, None]
        guess = self.prior.copy()
        for _ in range(10):
            predicted = np.tensordot(guess, self.cells, axes=1) + 1e-9
            ratio = self.cells * (observed / predicted)
            guess *= ratio.sum(axis=(1, 2)) / self.cells.sum(axis=(1, 2))
        return int(np.argmax(guess))


def test_an_attacker_learns_no_more_of_a_text_than_from_its_length() -> None:
    attack = Attack()
    learned = attack.accuracy(PrivacySettings()) - attack.accuracy_from_lengths
    assert learned <= 0.01


def test_the_attacker_would_read_what_was_shown_per_token() -> None:
    attack = Attack()
    learned = attack.accuracy(PrivacySettings(min_tokens=1, epsilon=1e9))
    assert learned > attack.accuracy_from_lengths + 0.3
