"""linear-moe mixers."""

import re
import subprocess
import sys

import pytest

from linear_moe.commands.mixers import main
from linear_moe.ssm import MIXERS, mixer_class


def test_every_mixer_with_rule_paper_state_and_options():
    shown = subprocess.run(
        [sys.executable, "-m", "linear_moe", "mixers"], capture_output=True, text=True, check=True, timeout=200
    )
    blocks = {block.split("\n")[0]: " ".join(block.split()) for block in shown.stdout.split("\n\n")}
    assert set(MIXERS) <= blocks.keys()
    for name in MIXERS:
        cls = mixer_class(name)
        assert cls.rule in blocks[name] and re.search(r"arXiv \d{4}\.\d{5}", cls.paper) and cls.paper in blocks[name]
        assert re.search(r"state [\d,]+ bytes a sequence and layer, .*; [\d,]+ under MoM", blocks[name])
        assert "head_dim=" in blocks[name]


def test_one_at_another_size(capsys):
    main(["gsa", "--hidden-size", "64", "--num-attention-heads", "2"])
    shown = capsys.readouterr().out
    assert "num_slots=0" in shown and "gla\n" not in shown
    assert f"{2 * 32 * (32 + 32):,} float32 numbers" in " ".join(shown.split())


def test_unknown_mixer(capsys):
    with pytest.raises(SystemExit):
        main(["glaa"])
    assert "did you mean 'gla'" in capsys.readouterr().err
