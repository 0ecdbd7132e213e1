"""Sampling: what may be drawn, and how often."""

import pytest
import torch

from linear_moe.inference.sampling import Sampling, sample

N, VOCAB = 3, 11


def draw(logits, used=None, seed=0, **options):
    used = torch.zeros(logits.shape, dtype=torch.bool) if used is None else used
    return sample(logits, Sampling(**options), used, torch.Generator().manual_seed(seed))


def drawn_often(row, times=20000, **options):
    """Frequencies of one sequence's tokens."""
    tokens = draw(row.expand(times, -1), seed=torch.randint(2**31, ()).item(), **options)
    return torch.bincount(tokens, minlength=len(row)) / times


def test_greedy_takes_the_likeliest(seed):
    logits = torch.randn(N, VOCAB)
    assert draw(logits, top_k=3, top_p=0.5).equal(logits.argmax(1))


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.6}, {"top_k": 6, "top_p": 0.7}], ids=str)
def test_draws_as_often_as_likely(options, seed):
    row, temperature = 2 * torch.randn(VOCAB), 0.7
    p = (row / temperature).softmax(0)
    order = p.argsort(descending=True).tolist()
    kept = order[: options.get("top_k", VOCAB)]
    total, allowed = p[kept].sum(), []
    for token in kept:  # the token that crosses top_p is the last
        if sum(p[allowed]) / total < options.get("top_p", 1):
            allowed.append(token)
    expected = torch.zeros(VOCAB)
    expected[allowed] = p[allowed] / p[allowed].sum()
    assert (drawn_often(row, temperature=temperature, **options) - expected).abs().max() < 0.02


def test_repetition_penalty(seed):
    logits = torch.tensor([[2.0, 1.5, -1.0], [-3.0, -1.0, -1.5]])
    used = torch.tensor([[True, False, False], [False, True, False]])
    assert draw(logits, used, repetition_penalty=2.0).tolist() == [1, 2]  # 1.0, 1.5, -1.0 and -3.0, -2.0, -1.5
    assert draw(logits, used).tolist() == [0, 1]


def test_a_seed_draws_the_same(seed):
    logits = torch.randn(200, VOCAB)
    first, again, other = (draw(logits, seed=s, temperature=1.0) for s in (5, 5, 6))
    assert first.equal(again) and not first.equal(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0, but is -0.1"),
        ({"temperature": float("nan")}, "temperature must be at least 0, but is nan"),
        ({"top_k": -1}, "top_k must be a number of tokens, or 0 for all, but is -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, but is 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, but is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, but is 0.0"),
    ],
)
def test_refuses_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
