"""Byte-level BPE: lossless, loadable without a network by transformers and by Megatron, safe with special text."""

import pickle
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from linear_moe.data.text import Document, stdlib_root
from linear_moe.data.tokenizer import EOD_TOKEN, Encoder, encode_parallel, load_tokenizer, train_bpe

STRANGE = "tabs\t\r\n  é 漢字 😀 \x00 " + EOD_TOKEN + "<|padding|> end"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("bpe") / "new" / "tokenizer"
    train_bpe([stdlib_root() / "argparse.py"], 300, output)
    assert sorted(f.name for f in output.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert [f.name for f in output.parent.iterdir()] == ["tokenizer"], "nothing partial is left"
    return output


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a network connection was tried")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_any_text_survives_and_is_only_text(folder, no_network):
    tokenizer = load_tokenizer(folder)
    encoder = Encoder(tokenizer)
    assert (encoder.eod, encoder.vocab_size, encoder.dtype) == (0, 300, np.uint16)
    for e in (encoder, pickle.loads(pickle.dumps(encoder))):
        chunk = e.encode([STRANGE, "second"])
        assert chunk.lengths.sum() == chunk.tokens.size
        assert np.flatnonzero(chunk.tokens == encoder.eod).tolist() == (np.cumsum(chunk.lengths) - 1).tolist()
        assert not (chunk.tokens == tokenizer.pad_token_id).any()
        first = chunk.tokens[: chunk.lengths[0] - 1]
        assert tokenizer.decode(first.tolist()) == STRANGE
        assert chunk.text_bytes == len((STRANGE + "second").encode())


def test_megatron_builds_it_offline(folder, no_network):
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    args = SimpleNamespace(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder), chat_template=None, vocab_file=None,
        merge_file=None, special_tokens=None, tokenizer_hf_no_use_fast=False, trust_remote_code=False,
        tokenizer_hf_no_include_special_tokens=False, metadata_path=None, pad_vocab_size=True, padded_vocab_size=None,
        make_vocab_size_divisible_by=128, tensor_model_parallel_size=1, rank=0,
    )  # fmt: skip
    tokenizer = build_tokenizer(args)
    assert (tokenizer.vocab_size, tokenizer.eod, args.padded_vocab_size) == (300, 0, 384)
    # A padding token of its own: Megatron takes labels equal to it out of the loss.
    assert tokenizer.pad == 1
    text = "def f(x): return x\n"
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert tokenizer.tokenize(text) == Encoder(load_tokenizer(folder)).encode([text]).tokens[:-1].tolist()


def test_training_uses_a_sample_and_refuses_impossible_sizes(folder, tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text('{"text": "some words that come again and again"}\n' * 1000)
    assert train_bpe([path], 270, tmp_path / "t", sample_bytes=400) < 450
    with pytest.raises(ValueError, match="must be at least 258"):
        train_bpe([path], 257, tmp_path / "t")
    with pytest.raises(ValueError, match=r"yield only .* tokens, not 5000"):
        train_bpe([path], 5000, tmp_path / "t")


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_encoding_reads_only_a_little_ahead(folder):
    read = 0

    def documents():
        nonlocal read
        while read < 1000:
            read += 1
            yield Document("x" * 2**18, 1)

    stream = encode_parallel(Encoder(load_tokenizer(folder)), documents(), workers=2)
    next(stream)
    assert read <= 10
    stream.close()


def test_a_missing_package_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install linear-moe\[data\]"):
        load_tokenizer(folder)
