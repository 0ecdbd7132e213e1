"""Text -> .bin/.idx -> Megatron, and every way in which such files can be broken."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers import MegatronTokenizer

from linear_moe.data.text import iterate_documents, stdlib_files, stdlib_root
from linear_moe.data.tokenizer import load_tokenizer, train_bpe
from linear_moe.mcore.preprocess import check_dataset, load_documents, preprocess

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "preprocess_data.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
FILES = [f for f in stdlib_files() if f.parent.name in ("json", "asyncio")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(FILES, 400, folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    prefix = tmp_path_factory.mktemp("whole") / "corpus"
    return prefix, preprocess(FILES, tokenizer, prefix, workers=1, progress=False)


def test_megatron_reads_back_every_document(whole, tokenizer):
    prefix, corpus = whole
    texts = [d.text for d in iterate_documents(FILES)]
    decode = load_tokenizer(tokenizer).decode
    dataset = IndexedDataset(str(prefix))
    assert len(dataset) == len(texts) == corpus.documents == len(dataset.document_indices) - 1
    for text, tokens, loaded in zip(texts, dataset, load_documents(prefix), strict=True):
        assert tokens[-1] == 0
        assert decode(tokens[:-1].tolist()) == text
        assert (loaded == tokens).all()
    assert corpus.tokens == sum(map(len, dataset))
    assert corpus.bytes == sum(len(t.encode()) for t in texts)
    assert json.loads(Path(f"{prefix}.json").read_text()) == vars(corpus)
    assert sorted(f.name for f in prefix.parent.iterdir()) == ["corpus.bin", "corpus.idx", "corpus.json"]


def gpt_dataset(prefix, tokenizer, samples):
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=64, blend=([str(prefix)], None), split="1,0,0", reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False,
        tokenizer=MegatronTokenizer.from_pretrained(str(tokenizer), {"library": "huggingface"}),
    )  # fmt: skip
    low = IndexedDataset(str(prefix))
    return GPTDataset(low, str(prefix), np.arange(len(low), dtype=np.int32), samples, Split.train, config)


def test_gpt_dataset_gives_the_stream_and_no_stale_indices_after_new_text(whole, tokenizer, tmp_path):
    prefix = tmp_path / "corpus"
    for files in (FILES, FILES[:3]):
        preprocess(files, tokenizer, prefix, workers=1, progress=False)
        documents = load_documents(prefix)
        dataset = gpt_dataset(prefix, tokenizer, 10)
        stream = np.concatenate([documents[i] for i in dataset.document_index])
        for place, sample in zip(dataset.shuffle_index, (dataset[i] for i in range(len(dataset))), strict=True):
            window = stream[64 * place : 64 * place + 65]
            assert (sample["tokens"].numpy() == window[:-1]).all()
            assert (sample["labels"].numpy() == window[1:]).all()
            assert sample["loss_mask"].all(), "EOD is predicted too"


def test_the_tool_with_two_workers_writes_the_same_bytes_as_one(whole, tokenizer, tmp_path):
    prefix, corpus = whole
    folder = tmp_path / "in"
    folder.mkdir()
    for i, path in enumerate(FILES):
        (folder / f"{i:03}.py").write_bytes(path.read_bytes())
    new = tmp_path / "bpe"
    run = subprocess.run(
        [sys.executable, TOOL, "--input", folder, "--pattern", "*.py", "--workers", "2", "--train-bpe", "400",
         "--tokenizer-output", new, "--output-prefix", tmp_path / "out"], capture_output=True, text=True, check=True,
        env=ENVIRONMENT,
    )  # fmt: skip
    assert "trained a BPE of 400 tokens" in run.stdout
    assert (new / "tokenizer.json").read_text() == (tokenizer / "tokenizer.json").read_text()
    assert f"{corpus.documents} documents, {corpus.tokens} tokens" in run.stdout
    assert "100%" in run.stderr
    for suffix in (".bin", ".idx"):
        assert Path(f"{tmp_path / 'out'}{suffix}").read_bytes() == Path(f"{prefix}{suffix}").read_bytes()


def test_a_killed_run_leaves_no_corpus_and_no_process(tokenizer, tmp_path):
    prefix = tmp_path / "corpus"
    command = [sys.executable, TOOL, "--input", stdlib_root(), "--pattern", "*.py", "--workers", "2",
               "--tokenizer", tokenizer, "--output-prefix", prefix]  # fmt: skip
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    deadline = time.monotonic() + 180  # generous: importing Megatron is slow on a busy machine
    while not any(f.stat().st_size for f in tmp_path.glob("corpus.partial-*.bin")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.glob("corpus.idx"))
    assert not list(tmp_path.glob("corpus.bin"))
    with pytest.raises(ValueError, match=r"corpus\.idx does not exist"):
        check_dataset(prefix, 64)
    # Its workers see that it is gone; os.killpg fails once its session is empty.
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def test_an_error_on_the_way_leaves_an_older_corpus_as_it_was(tokenizer, tmp_path):
    (tmp_path / "good.txt").write_text("good text")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{')
    prefix = tmp_path / "corpus"
    preprocess([tmp_path / "good.txt"], tokenizer, prefix, workers=1, progress=False)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"bad\.jsonl:2"):
        preprocess([tmp_path / "good.txt", tmp_path / "bad.jsonl"], tokenizer, prefix, workers=1, progress=False)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="every document is empty"):
        preprocess([tmp_path / "empty.txt"], tokenizer, prefix, workers=1, progress=False)


def test_the_tool_says_an_error_in_one_line(tmp_path, monkeypatch):
    arguments = ["--input", tmp_path, "--output-prefix", tmp_path / "o", "--tokenizer", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(a) for a in [TOOL, *arguments]])
    with pytest.raises(SystemExit, match=r"^error: no text in .* matches \*\.txt"):
        runpy.run_path(str(TOOL), run_name="__main__")


def break_file(suffix, change):
    def apply(prefix):
        path = Path(f"{prefix}{suffix}")
        path.write_bytes(change(path.read_bytes()))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: Path(f"{p}.bin").unlink(), r"c\.bin does not exist: make it with linear-moe preprocess"),
        (break_file(".bin", lambda b: b[:-2]), r"c\.bin is truncated: \d+ bytes, its index says \d+"),
        (break_file(".bin", lambda b: b + b"\0\0"), r"c\.bin does not belong to its \.idx"),
        (break_file(".idx", lambda b: b""), r"c\.idx is truncated: 0 bytes"),
        (break_file(".idx", lambda b: b[:-1]), r"c\.idx is truncated: \d+ bytes of \d+"),
        (break_file(".idx", lambda b: b"X" + b[1:]), r"c\.idx is not a Megatron index"),
        (break_file(".idx", lambda b: b[:34] + b"\xff" * 4 + b[38:]), r"c\.idx is damaged"),
        (break_file(".idx", lambda b: b[:-8] + bytes(8)), r"c\.idx is damaged"),
    ],
    ids=["no-bin", "short-bin", "long-bin", "empty-idx", "short-idx", "bad-magic", "bad-length", "bad-document"],
)
def test_damage_is_found_before_megatron_starts(whole, tmp_path, damage, message):
    prefix = tmp_path / "c"
    for suffix in (".bin", ".idx"):
        Path(f"{prefix}{suffix}").write_bytes(Path(f"{whole[0]}{suffix}").read_bytes())
    assert check_dataset(prefix, 64).tokens == whole[1].tokens
    damage(prefix)
    with pytest.raises(ValueError, match=message):
        check_dataset(prefix, 64)


def test_a_split_without_a_document_is_refused(whole):
    """Megatron would look for its first token forever."""
    prefix, corpus = whole
    check_dataset(prefix, 8, split="98,2,0")
    share = 100 / corpus.documents
    with pytest.raises(ValueError, match=r"leaves nothing of .* for the validation set"):
        check_dataset(prefix, 8, split=f"{100 - share / 3},{share / 3},0")


def test_too_small_a_corpus_is_refused_at_the_exact_size(whole):
    prefix, corpus = whole
    assert check_dataset(prefix, corpus.tokens - 1, samples=2).documents == corpus.documents
    with pytest.raises(
        ValueError, match=f"too small: {corpus.tokens} tokens, and one sample takes {corpus.tokens + 1}"
    ):
        check_dataset(prefix, corpus.tokens)
