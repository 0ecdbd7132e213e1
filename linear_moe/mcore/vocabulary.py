"""How many rows the word embeddings have: the same under every layout, and enough for the data's tokens."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers.utils import build_tokenizer
from megatron.training import get_tokenizer

from linear_moe.data.tokenizer import load_tokenizer, vocabulary_digest

logger = logging.getLogger(__name__)

LARGEST_RECORD = 2**16  # bytes; a larger <prefix>.json is not one that `preprocess` wrote
SCANNED = 2**30  # bytes of data without a record that are looked through at most: seconds
PIECE = 2**20  # tokens


def patch_padding() -> None:
    """Make Megatron pad a tokenizer's vocabulary as ``padded_size`` says. Idempotent.

    Megatron pads to a multiple of --make-vocab-size-divisible-by times TP. The rows beyond the tokenizer's take part in
    the softmax, so that the loss of one checkpoint would depend on the layout that reads it.
    """
    build_tokenizer.vocab_size_with_padding = padded_size


def padded_size(size: int, args, logging_enabled: bool = True) -> int:
    """The next multiple of --make-vocab-size-divisible-by, or the size itself with --no-pad-vocab-size.

    Raises:
        ValueError: one that tensor parallelism does not divide.
    """
    multiple = args.make_vocab_size_divisible_by if args.pad_vocab_size else 1
    tp = args.tensor_model_parallel_size
    if multiple < 1:
        raise ValueError(f"make_vocab_size_divisible_by ({multiple}) must be at least 1")
    padded = -(-size // multiple) * multiple
    if padded % tp:
        raise ValueError(
            f"the padded vocabulary ({padded}) must be divisible by tensor_model_parallel_size ({tp}): give a "
            f"--make-vocab-size-divisible-by ({multiple}) that {tp} divides, to every run of this model alike"
        )
    if logging_enabled and args.rank == 0:
        logger.info("the vocabulary's %d tokens are padded to %d rows", size, padded)
    return padded


def check_vocabulary(args, prefixes: Iterable[str]) -> None:
    """Refuse a model that is too small for its tokenizer, and data of another tokenizer.

    Call it after Megatron has built its tokenizer. What a ``<prefix>.json`` says is compared; without one the largest
    token id is looked for in the data itself: in all of it, or, if that is more than SCANNED bytes, in pieces that lie
    evenly.

    Raises:
        ValueError: with the file, the numbers and the tokenizers.
    """
    size = get_tokenizer().vocab_size
    if args.padded_vocab_size < size:
        raise ValueError(f"padded_vocab_size ({args.padded_vocab_size}) is below the tokenizer's {size} tokens")
    own = args.tokenizer_model or args.tokenizer_type
    prefixes = list(dict.fromkeys(prefixes))
    for prefix in prefixes:
        record = _record(prefix)
        made_with = f" ({record['tokenizer']})" if "tokenizer" in record else ""
        limit = size
        if "vocabulary" in record and args.tokenizer_type == "HuggingFaceTokenizer":
            if record["vocabulary"] != _digest(own):
                raise ValueError(f"{prefix} is of another tokenizer{made_with} than {own}: their vocabularies differ")
            limit = args.padded_vocab_size  # a vocabulary may have gaps, so that its ids go beyond its size
        if "largest_id" in record:
            largest = record["largest_id"]
        else:
            largest = _largest_id(prefix, SCANNED // len(prefixes))
        if largest >= limit:
            raise ValueError(
                f"{prefix} is of another tokenizer{made_with} than {own}: it has token id {largest}, and the model's "
                f"vocabulary is {limit}"
            )


def _record(prefix: str) -> dict:
    """What `preprocess` wrote beside the data; nothing where another program made it."""
    path = Path(f"{prefix}.json")
    if not path.is_file() or path.stat().st_size > LARGEST_RECORD:
        return {}
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return {}
    if not isinstance(record, dict):
        return {}
    folder = Path(str(record.get("tokenizer")))
    if "vocabulary" not in record and (folder / "tokenizer_config.json").is_file():  # written by an older version
        record["vocabulary"] = _digest(str(folder))
    return record


@functools.cache
def _digest(tokenizer: str) -> str:
    return vocabulary_digest(load_tokenizer(tokenizer))


def _largest_id(prefix: str, most: int) -> int:
    """The largest token id in pieces of `most` bytes together, or in one piece if that is more."""
    tokens = np.memmap(f"{prefix}.bin", dtype=IndexedDataset(prefix).index.dtype, mode="r")
    starts = range(0, tokens.size, PIECE)
    step = max(1, -(-tokens.nbytes // most))
    return max(int(tokens[start : start + PIECE].max()) for start in starts[::step])
