"""Parameters of a configuration, counted without making them, and of the published sizes."""

import pytest

import linear_moe
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
