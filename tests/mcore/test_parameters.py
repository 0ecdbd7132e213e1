"""Parameters of a configuration, counted without making them, and of the published sizes."""

import functools

import pytest

import linear_moe
from linear_moe.mcore.configs import read_config
from linear_moe.mcore.parameters import count_parameters


def test_counts_what_is_built(seed):
    config = "qwen2_moe/tiny_mom"
    model = linear_moe.build_model(config, vocab_size=500)
    named = {name: p.numel() for name, p in model.named_parameters()}
    counted = count_parameters(config, vocab_size=500)
    assert counted.total == sum(named.values())
    experts = sum(n for name, n in named.items() if ".experts." in name and "shared" not in name)
    memories = sum(n for name, n in named.items() if ".core.rows." in name)
    assert counted.activated == counted.total - experts * 3 // 4 - memories * 2 // 5  # 2 of 8 experts; 3 of 5 memories


@pytest.mark.parametrize(
    ("config", "vocabulary", "experts", "pattern", "blocks", "total", "activated"),  # in billions, embeddings included
    [
        ("nemotron_h/8b", 131072, None, "M-M-M-M*-" + 3 * "M-M-M-M-M*-" + "{}", "M-M-M-M-M-", 8.10, 8.10),
        ("kimi_linear/48b_a3b", 163840, 256, "G-GEGE+E{}{}{}{}{}GEGE+E", "GEGEGE+E", 49.1, 3.48),
        ("qwen3_next/80b_a3b", 151936, 512, 12 * "{}", "GEGEGE*E", 79.7, 3.87),
    ],
)
def test_published_patterns(config, vocabulary, experts, pattern, blocks, total, activated):
    """The papers say 8B, 48B-A3B, 80B-A3B. Sizes grow evenly with blocks and with experts, of which there are many."""
    places = pattern.count("{}")
    assert read_config(config)["hybrid-layer-pattern"].split("/")[0] == pattern.format(*[blocks] * places)

    @functools.cache
    def count(number, of_experts):
        short = pattern.format(*[blocks] * number, *[""] * (places - number))
        overrides = {"num_experts": of_experts} if of_experts else {}
        return count_parameters(config, vocab_size=vocabulary, hybrid_layer_pattern=short, **overrides)

    def grown(name, number, of_experts):
        one, two = (getattr(count(n, of_experts), name) for n in (1, 2)) if places > 1 else (0, 0)
        return getattr(count(1, of_experts), name) + (number - 1) * (two - one)

    found = {}
    for name in ("total", "activated"):
        found[name] = grown(name, places, experts and 16)
        if experts:
            found[name] += (experts - 16) // 16 * (grown(name, places, 32) - found[name])
    assert found == {
        "total": pytest.approx(total * 1e9, rel=2e-3),
        "activated": pytest.approx(activated * 1e9, rel=2e-3),
    }


@pytest.mark.parametrize(
    ("config", "total", "activated"),  # in millions, without embeddings; the papers say 380M, 1.3B, 0.3B-2B, 1B-7B
    [
        ("llama3/340m_pure_mom", 480, 379),
        ("llama3/1.3b_pure_mom", 1487, 1285),
        ("qwen2_moe/a0.3b_2b", 2178, 328),
        ("qwen2_moe/a1b_7b", 6781, 1144),
    ],
)
def test_published_sizes(config, total, activated):
    count = count_parameters(config, vocab_size=32000)
    without = (count.total - count.embedding, count.activated - count.embedding)
    assert without == (pytest.approx(total * 1e6, abs=1e6), pytest.approx(activated * 1e6, abs=1e6))
