"""The vocabulary's size under every layout, and data that is of another tokenizer."""

import json
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.training.global_vars import destroy_global_vars

from linear_moe.data.text import stdlib_files
from linear_moe.data.tokenizer import load_tokenizer, train_bpe, vocabulary_digest
from linear_moe.mcore import pretrain, vocabulary
from linear_moe.mcore.preprocess import load_documents, preprocess
from linear_moe.mcore.vocabulary import check_vocabulary, padded_size

TINY = "tiny"
FILES = [f for f in stdlib_files() if f.parent.name == "json"]


def prepare(*flags):
    """Megatron's arguments and tokenizer, as a run has them; forgets those of the run before."""
    destroy_global_vars()
    destroy_num_microbatches_calculator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain"])
        return pretrain.prepare(["--config", TINY, *map(str, flags)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tokenizers of 300 and 400 tokens, and the same text by each."""
    folder = tmp_path_factory.mktemp("vocabulary")
    for size in (300, 400):
        train_bpe(FILES, size, folder / f"bpe{size}")
        preprocess(FILES, folder / f"bpe{size}", folder / f"data{size}", workers=1, progress=False)
    return folder


@pytest.fixture
def args(folder):
    """Of a run with the tokenizer of 300 tokens, whose data are its own."""
    flags = ("--tokenizer-model", folder / "bpe300", "--train-data-path", folder / "data300")
    yield prepare(*flags, "--valid-data-path", folder / "data300")
    destroy_global_vars()
    destroy_num_microbatches_calculator()


def sizes(**changes):
    defaults = {"make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 1, "pad_vocab_size": True, "rank": 0}
    return Namespace(**(defaults | changes))


def test_the_padded_size_does_not_depend_on_the_layout():
    assert [padded_size(300, sizes(tensor_model_parallel_size=tp)) for tp in (1, 2, 3, 4, 64)] == [384] * 5
    assert padded_size(384, sizes()) == 384
    assert padded_size(300, sizes(make_vocab_size_divisible_by=7)) == 301
    assert padded_size(301, sizes(pad_vocab_size=False)) == 301
    with pytest.raises(
        ValueError, match=r"padded vocabulary \(384\) must be divisible by tensor_.*_size \(5\): give a"
    ):
        padded_size(300, sizes(tensor_model_parallel_size=5))
    with pytest.raises(ValueError, match=r"make_vocab_size_divisible_by \(0\) must be at least 1"):
        padded_size(300, sizes(make_vocab_size_divisible_by=0))


def test_megatron_pads_so_too(args):
    assert args.padded_vocab_size == 384
    args = sizes(tensor_model_parallel_size=2, padded_vocab_size=None)
    vocabulary.build_tokenizer._set_padded_vocab_size(args, Namespace(vocab_size=300))
    assert args.padded_vocab_size == 384


def test_the_record_says_what_the_data_are_of(folder):
    record = json.loads((folder / "data300.json").read_text())
    assert record["largest_id"] == max(int(document.max()) for document in load_documents(folder / "data300")) < 300
    assert record["vocabulary"] == vocabulary_digest(load_tokenizer(folder / "bpe300"))
    assert record["vocabulary"] != vocabulary_digest(load_tokenizer(folder / "bpe400"))


@pytest.mark.parametrize("kind", ["train", "valid", "test"])
def test_data_of_another_tokenizer_are_refused_in_every_set(folder, kind):
    prefixes = dict.fromkeys(("train", "valid", "test"), folder / "data400") | {kind: folder / "data300"}
    paths = [word for name, prefix in prefixes.items() for word in (f"--{name}-data-path", prefix)]
    message = r"data300 is of another tokenizer \(.*bpe300\) than .*bpe400: their vocabularies differ"
    with pytest.raises(ValueError, match=message):
        prepare("--tokenizer-model", folder / "bpe400", *paths)


def test_a_token_beyond_the_vocabulary_is_refused(folder, args, tmp_path):
    """Whether a record says so, of this version or an older one, or only the data."""
    for suffix in (".bin", ".idx"):
        shutil.copy(folder / f"data400{suffix}", tmp_path / f"data{suffix}")
    largest = max(int(document.max()) for document in load_documents(tmp_path / "data"))
    beyond = rf"data is of another tokenizer.* than .*bpe300: it has token id {largest}, and .* vocabulary is 300"
    record = {"documents": 1, "tokens": 2, "bytes": 3, "tokenizer": str(folder / "bpe400")}
    for content, message in [
        (None, beyond),
        ("not JSON", beyond),
        (json.dumps(record | {"tokenizer": "gone"}), beyond.replace("tokenizer.*", r"tokenizer \(gone\)")),
        (json.dumps(record), r"data is of another tokenizer \(.*bpe400\) than .*bpe300: their vocabularies differ"),
    ]:
        if content:
            (tmp_path / "data.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            check_vocabulary(args, [str(folder / "data300"), str(tmp_path / "data")])


def test_a_model_smaller_than_its_tokenizer_is_refused(folder, args):
    small = Namespace(**(vars(args) | {"padded_vocab_size": 256}))
    with pytest.raises(ValueError, match=r"padded_vocab_size \(256\) is below the tokenizer's 300 tokens"):
        check_vocabulary(small, [str(folder / "data300")])


def test_large_data_are_read_in_pieces(tmp_path):
    tokens = np.zeros(5 * 2**20, np.uint16)
    tokens[2**20], tokens[3 * 2**20], tokens[-1] = 5, 7, 9
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=np.uint16)
    builder.add_document(tokens, [tokens.size])
    builder.finalize(str(tmp_path / "data.idx"))
    assert vocabulary._largest_id(str(tmp_path / "data"), vocabulary.SCANNED) == 9
    some = tokens.nbytes // 3 + 1
    assert vocabulary._largest_id(str(tmp_path / "data"), some) == 7, "of the first and the fourth of five pieces"
    assert vocabulary._largest_id(str(tmp_path / "data"), 1) == 0, "of the first"


@pytest.mark.parametrize("key", ["tokens", "labels"])
def test_what_was_not_seen_then_is_seen_when_it_is_read(key):
    batch = {"tokens": torch.full((2, 3), 383), "labels": torch.full((2, 3), 383)}
    pretrain._check_ids(Namespace(padded_vocab_size=384), batch)
    batch[key][1, 2] = 384
    with pytest.raises(ValueError, match="token id 384, beyond the model's vocabulary of 384"):
        pretrain._check_ids(Namespace(padded_vocab_size=384), batch)
