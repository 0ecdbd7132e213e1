"""The bigram against a loop over tokens, and against what is known about its loss."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from linear_moe.evaluation import bigram
from linear_moe.evaluation.bigram import BigramResult, bigram_loss, bits_per_byte


def loop(train, validation, vocab, result: BigramResult) -> float:
    """The formula at the top of bigram.py, token by token."""
    stream = np.concatenate(train).tolist()
    pairs, n, successors, occurrences, predecessors = Counter(), Counter(), defaultdict(set), Counter(), Counter()
    for a, b in itertools.pairwise(stream):
        if (a, b) not in pairs:
            predecessors[b] += 1
        pairs[a, b] += 1
        n[a] += 1
        successors[a].add(b)
        occurrences[b] += 1
    lower = predecessors if result.continuation else occurrences
    d, c = result.discount, result.concentration
    loss = 0.0
    predicted = np.concatenate(validation).tolist()
    for a, b in itertools.pairwise(predicted):
        q = (lower[b] + 0.5) / (sum(lower.values()) + 0.5 * vocab)
        p = (max(pairs[a, b] - d, 0) + (c + d * len(successors[a])) * q) / (n[a] + c) if n[a] else q
        loss -= math.log(p)
    return loss / (len(predicted) - 1)


def documents(rng, vocab, number):
    weights = 1 / np.arange(1, vocab + 1)
    lengths = rng.integers(2, 40, size=number)
    return [np.append(rng.choice(vocab, n, p=weights / weights.sum()), 0).astype(np.uint16) for n in lengths]


@pytest.mark.parametrize(("vocab", "sort"), [(12, 2**24), (12, 50), (60_000, 2**24)], ids=["small", "pieces", "60k"])
def test_agrees_with_a_loop_over_tokens(monkeypatch, vocab, sort):
    seed = int(np.random.default_rng().integers(2**31))
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(bigram, "_SORT_TOKENS", sort)
    train, validation = documents(rng, vocab, 60), documents(rng, vocab, 20)
    result = bigram_loss(train, validation, vocab)
    assert result.tokens == sum(map(len, validation)) - 1
    assert result.nats_per_token == pytest.approx(loop(train, validation, vocab, result), rel=1e-10), f"seed {seed}"


@pytest.mark.parametrize("discount", [0.0, 0.4])
@pytest.mark.parametrize("concentration", [0.0, 3.0])
@pytest.mark.parametrize("continuation", [False, True])
def test_probabilities_after_any_token_sum_to_one(discount, concentration, continuation):
    rng = np.random.default_rng()
    counts = bigram._Counts(bigram._Pairs.count(documents(rng, 9, 10), 10), 10)  # token 9 never occurs
    for first in range(10):
        pairs = [bigram._Pairs(np.array([first * 10 + second]), np.array([1])) for second in range(10)]
        losses = [counts.loss(p, counts.look_up(p), discount, concentration, continuation) for p in pairs]
        assert sum(math.exp(-x) for x in losses) == pytest.approx(1)


def test_beats_unigram_and_uniform_and_nears_the_entropy_of_a_bigram_source():
    rng = np.random.default_rng(0)
    vocab = 20
    transition = rng.dirichlet(np.full(vocab, 0.3), size=vocab)

    def sample(length):
        tokens = [0]
        for u in rng.random(length):
            tokens.append(min(int(np.searchsorted(np.cumsum(transition[tokens[-1]]), u)), vocab - 1))
        return np.array(tokens)

    train, validation = [sample(500) for _ in range(60)], [sample(20_000)]
    stream = validation[0]
    ideal = -np.log(transition[stream[:-1], stream[1:]]).mean()
    loss = bigram_loss(train, validation, vocab).nats_per_token
    assert ideal < loss < ideal + 0.02
    frequency = np.bincount(stream, minlength=vocab) / stream.size
    assert loss < -(frequency * np.log(frequency)).sum() - 0.3


def test_bits_per_byte():
    assert bits_per_byte(math.log(256), tokens=10, text_bytes=20) == pytest.approx(4)


def test_bad_input_is_named():
    document = np.array([1, 2, 0])
    with pytest.raises(ValueError, match="at least 2 training documents"):
        bigram_loss([document], [document], 3)
    with pytest.raises(ValueError, match="token ids 0 to 2 do not fit a vocabulary of 2"):
        bigram_loss([document] * 3, [document], 2)
    with pytest.raises(ValueError, match="fewer than 2 tokens"):
        bigram_loss([document] * 3, [], 3)
