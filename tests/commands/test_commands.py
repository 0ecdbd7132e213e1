"""The command `linear-moe`: what it knows, how fast it answers, and what it says of slips."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from linear_moe import __version__
from linear_moe.commands import COMMANDS, main
from linear_moe.mcore.configs import CONFIGS, packaged

ROOT = Path(__file__).resolve().parents[2]
HELP = ["", "--help", "--version"]
HELP += [f"{name} --help" for name in ("configs", "preprocess", "evaluate", "evaluate mqar", "benchmark")]

WITHOUT = """
import contextlib, io, sys
from linear_moe.commands import main

for words in sys.argv[1:]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:
        main(words.split())
    loaded = {"torch", "megatron", "triton", "numpy", "transformers"} & sys.modules.keys()
    assert shown.getvalue() and not loaded, (words, loaded)
"""


def test_help_waits_for_neither_torch_nor_megatron():
    done = subprocess.run([sys.executable, "-c", WITHOUT, *HELP], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def called(*words):
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return end.value.code


def test_every_command_is_listed_and_there(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["linear-moe"])
    assert called() == 0
    shown = capsys.readouterr().out
    for name, summary in COMMANDS.items():
        assert re.search(rf"^ +{name}\s+{re.escape(summary[:20])}", shown, re.MULTILINE)
    modules = {path.stem.replace("_", "-") for path in (ROOT / "linear_moe" / "commands").glob("[a-z]*.py")}
    assert modules == COMMANDS.keys()


def test_version(capsys):
    assert called("--version") == 0
    assert capsys.readouterr().out == f"linear-moe {__version__}\n"


def test_an_unknown_command_names_those_that_exist(capsys):
    assert called("pretain") == 2
    assert "invalid choice: 'pretain' (choose from " in capsys.readouterr().err


def test_configurations_are_listed_with_what_they_are(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["linear-moe"])
    assert called("configs") is None
    where, _, *lines = capsys.readouterr().out.splitlines()
    named = dict(line.split(maxsplit=1) for line in lines if not line.startswith(" "))
    assert str(CONFIGS) in where and list(named) == list(packaged())
    assert named["llama3/340m_mom"] == (
        'The hybrid of arXiv 2502.13685 (its "MoM Hybrid"): MoM-340M with three softmax layers of 24'
    )
    assert not any("#" in line for line in lines), "each file begins with a comment that says what it is"


@pytest.mark.parametrize("script", [*sorted(ROOT.glob("tools/*.py")), ROOT / "examples" / "pretrain.py"], ids=str)
def test_scripts_of_a_checkout_are_the_commands(script):
    text = script.read_text()
    (name,) = re.findall(r'main\(\["([a-z-]+)", \*sys\.argv\[1:\]\]\)', text)
    assert name in COMMANDS and len(text.splitlines()) < 20
