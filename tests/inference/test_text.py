"""`linear-moe generate`: prompts, files and chats, and what it refuses before the model is loaded."""

import argparse
import json
import re
import runpy
import subprocess

import pytest

from linear_moe.commands import generate as command
from linear_moe.inference import generate, text
from linear_moe.inference.text import Printer, Text
from linear_moe.mcore.load import load_model
from tests.mcore.test_pretrain import ROOT

PROMPTS = ["def wrap(self, text):", "é 漢字"]


@pytest.fixture(scope="module")
def model(trained):
    return load_model(trained.load)


@pytest.fixture(autouse=True)
def loaded(monkeypatch, request):
    """The model is loaded once; what has to be refused before that does not get it."""
    monkeypatch.setattr(text, "load_model", lambda path: request.getfixturevalue("model"))


@pytest.fixture
def written(trained, model):
    """What the model writes behind PROMPTS, 8 tokens."""
    words = Text(trained.tokenizer)
    tokens = generate(model, [words.encode(prompt) for prompt in PROMPTS], 8, stop=[words.eod])
    return [prompt + words.decode(new) for prompt, new in zip(PROMPTS, tokens)]


def run(trained, *flags):
    command.main(["--load", str(trained.load), "--max-new-tokens", "8", *map(str, flags)])


def test_prompts(trained, written, capsys):
    run(trained, "--prompt", PROMPTS[0])
    said = capsys.readouterr()
    assert said.out == written[0] + "\n"  # the tokenizer is the checkpoint's
    figures = r"prefill: \d+ tokens at \d+ tokens/s \| decoding: 7 tokens at \d+ tokens/s \| state of 1 sequence: "
    assert re.search(figures + r"0\.\d\d MiB of linear layers, 0\.\d\d MiB of softmax layers", said.err)
    run(trained, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--tokenizer", trained.tokenizer)
    assert capsys.readouterr().out == f"{written[0]}\n\n{written[1]}\n\n"


def test_sampling_flags_count(trained, written, capsys):
    flags = "--temperature 5 --top-k 200 --top-p 0.99 --repetition-penalty 1.1 --seed 3".split()
    outs = []
    for _ in range(2):
        run(trained, "--prompt", PROMPTS[0], *flags)
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != written[0] + "\n"


def test_files(trained, written, tmp_path, capsys):
    lines = [{"prompt": prompt, "id": i} for i, prompt in enumerate([*PROMPTS, PROMPTS[0]])]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run(trained, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "new" / "out.jsonl", "--batch-size", 2)
    found = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert [line.pop("completion") for line in found] == [
        full.removeprefix(prompt) for full, prompt in zip([*written, written[0]], [*PROMPTS, PROMPTS[0]])
    ]
    assert found == lines and "3/3" in capsys.readouterr().err


def test_a_chat_keeps_its_state(trained, model, monkeypatch, capsys):
    said = iter(["def", " wrap", "x" * 60, "/new", "def"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said, ""))
    run(trained)
    words = Text(trained.tokenizer)
    first = generate(model, [words.encode("def")], 8, stop=[words.eod])[0]
    second = generate(model, [words.encode("def") + first + words.encode(" wrap")], 8, stop=[words.eod])[0]
    full = r"\d+ tokens are more than the model's 64 positions; /new starts anew"
    replies = [re.escape(words.decode(tokens)) for tokens in (first, second)]
    shown = "\n".join(["Say something.*", *replies, full, replies[0], ""])
    assert re.fullmatch(shown, capsys.readouterr().out)


def test_characters_are_printed_whole(trained, capsys):
    words, printed = Text(trained.tokenizer), []
    printer = Printer(words)
    for token in words.encode(STRANGE := "漢字\n😀 end"):
        printer(0, token)
        printed.append(capsys.readouterr().out)
    assert "".join(printed) == STRANGE and not any("\ufffd" in part for part in printed)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", ""], "prompt 0 is empty: give at least one token"),
        (["--prompt", "ab " * 100], r"prompt 0 has \d+ tokens, more than the model's 64 positions"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be at least 0, but is -1.0"),
        (["--prompt", "a", "--top-p", "2"], "top_p must be above 0 and at most 1, but is 2.0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, but is 0"),
        (["--prompt", "a", "--ckpt-step", "9"], "iter_0000009 is missing; whole: iter_0000001, iter_0000002"),
        (["--prompt", "a", "--load", "nowhere"], "no checkpoint: nowhere is not a folder"),
        (["--prompt", "a", "--tokenizer", "nowhere/x/y"], "no tokenizer 'nowhere/x/y'"),
        (["--prompt", "a", "--stop", ""], "stop has an empty list of tokens"),
        (["--input", "nowhere.jsonl", "--output", "out"], "No such file or directory: 'nowhere.jsonl'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_refuses_before_any_work(trained, flags, message, monkeypatch, tmp_path):
    monkeypatch.setattr(text, "load_model", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(trained, *flags)
    assert re.match(f"error: .*{message}", end.value.code) and "\n" not in end.value.code


def test_refuses_lines_and_tokenizers(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(text, "load_model", None)
    path = tmp_path / "in.jsonl"
    for content, message in (
        ('{"prompt": "a"}\n{"prompt"', "line 2: not JSON"),
        ('{"text": "a"}', 'line 1: must be an object with a text "prompt"'),
        ("", "has no prompts"),
    ):
        path.write_text(content)
        with pytest.raises(SystemExit, match=f"error: {path}.*{message}"):
            run(trained, "--input", path, "--output", tmp_path / "out")
    for saved, size in (({"vocabulary": 299}, "299"), ({"padded_vocab_size": 256}, "at most 256")):
        with pytest.raises(ValueError, match=f"does not fit: it has 300 tokens, .* was trained with {size}"):
            text._tokenizer(str(trained.tokenizer), argparse.Namespace(**saved))
    saved = argparse.Namespace(tokenizer_type="NullTokenizer", tokenizer_model=None)
    with pytest.raises(ValueError, match="trained with NullTokenizer, which has no text: give --tokenizer"):
        text._tokenizer(None, saved)
    with pytest.raises(SystemExit):
        run(trained, "--input", path)


def test_the_demo_ends_with_a_sample(trained, tmp_path, monkeypatch, capsys):
    demo = runpy.run_path(str(ROOT / "examples" / "demo.py"))
    (tmp_path / "checkpoints").symlink_to(trained.load)
    monkeypatch.setattr(subprocess, "run", lambda words, check: command.main(words[4:]))
    demo["sample"](tmp_path)
    assert re.search(r"\ndef (.|\n){20,}", capsys.readouterr().out)
