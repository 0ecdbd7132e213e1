"""The benchmark of decoding behind long contexts."""

from linear_moe.measure import decoding
from linear_moe.ssm import mixer_class
from linear_moe.ssm.state import state_bytes


def test_what_is_kept_of_a_context(monkeypatch, tmp_path, capsys):
    """Of linear layers the same behind any; of softmax layers as much more as the context is longer."""
    monkeypatch.setattr(decoding, "SIZE", decoding.SIZE | {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64})
    monkeypatch.setattr(decoding, "ROUNDS", 2)
    picture = tmp_path / "decoding.png"
    found = decoding.decoding(3, [1024, 8192], picture)
    assert all(seconds > 0 for figures in found.values() for seconds, _ in figures)
    kept = {form: [size for _, size in figures] for form, figures in found.items()}
    mixer = mixer_class("gated_deltanet")
    mixer = mixer(mixer.make_config(32, 4, {}))
    plain, memories = (state_bytes(mixer, 32, memories=n, element_size=4) for n in (0, 5))
    cache = 2 * 32 * 4 * 1024  # keys and values of 1024 tokens, of one layer
    assert kept["softmax"] == [4 * cache, 32 * cache]
    assert kept["gated_deltanet"] == [4 * plain] * 2
    assert kept["gated_deltanet MoM"] == [4 * memories] * 2
    assert kept["hybrid MoM, 1 softmax of 4"] == [3 * memories + cache, 3 * memories + 8 * cache]
    assert "| hybrid MoM, 1 softmax of 4 | ms a token |" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
