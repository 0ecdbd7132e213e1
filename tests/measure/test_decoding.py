"""The benchmark of decoding behind long contexts."""

import re

from linear_moe.measure import decoding


def test_what_is_kept_of_a_context(monkeypatch, tmp_path, capsys):
    """Of linear layers the same behind any; of softmax layers as much more as the context is longer."""
    monkeypatch.setattr(decoding, "SIZE", decoding.SIZE | {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64})
    monkeypatch.setattr(decoding, "ROUNDS", 2)
    picture = tmp_path / "decoding.png"
    decoding.decoding(3, [1024, 8192], picture)
    lines = capsys.readouterr().out.splitlines()
    kept = [[float(x) for x in re.findall(r"[\d.]+", line)] for line in lines if "MiB kept" in line]
    taken = [[float(x) for x in re.findall(r"\d+\.\d+", line)] for line in lines if "ms a token" in line]
    softmax, plain, memories, hybrid = kept
    assert softmax == [1.0, 8.0]  # 4 layers' keys and values of 32 channels in float32
    assert plain[0] == plain[1] < memories[0] == memories[1] < hybrid[0]
    assert 1.7 < hybrid[1] - hybrid[0] < 1.8  # one softmax layer of four
    assert all(a > 0 and b > 0 for a, b in taken) and len(taken) == 4
    assert picture.read_bytes().startswith(b"\x89PNG")
