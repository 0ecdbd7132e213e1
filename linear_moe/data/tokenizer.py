"""Tokenizers: train a small byte-level BPE, load any Hugging Face tokenizer, turn documents into token arrays."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from linear_moe.data.text import Document, find_files, iterate_documents

EOD_TOKEN = "<|endoftext|>"
# Of its own: Megatron takes every label that equals the padding token out of the loss, so it must not be EOD.
PAD_TOKEN = "<|padding|>"
SMALLEST_VOCAB = 256 + 2
SAMPLE_BYTES = 32 * 2**20
CHUNK_CHARACTERS = 2**18
CHUNK_DOCUMENTS = 1024


def train_bpe(
    paths: Sequence[str | Path],
    vocab_size: int,
    output: str | Path,
    *,
    json_key: str = "text",
    patterns: Sequence[str] | None = None,
    sample_bytes: int = SAMPLE_BYTES,
) -> int:
    """Train a byte-level BPE (GPT-2's splitting) and save it as a Hugging Face tokenizer folder.

    paths, json_key, patterns: as for `linear_moe.data.text`. Of a large corpus only the first `sample_bytes` (UTF-8)
        are used, the files taken in a fixed random order.
    vocab_size: all tokens, including 256 bytes, EOD (`<|endoftext|>`, id 0) and padding (id 1). Any text can be
        encoded and decoded again without loss.
    output: folder for tokenizer.json and tokenizer_config.json: what `AutoTokenizer.from_pretrained` and Megatron's
        `--tokenizer-type HuggingFaceTokenizer --tokenizer-model` read, without a network.

    Returns the number of bytes trained on. Raises ValueError if `vocab_size` is too small for the bytes, or larger
    than the merges that the text yields.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(f"vocab_size ({vocab_size}) must be at least {SMALLEST_VOCAB}: 256 bytes, EOD and padding")
    tokenizers, transformers = _packages()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKEN, PAD_TOKEN],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    files = find_files(paths, patterns)
    random.Random(0).shuffle(files)
    taken = 0

    def sample() -> Iterator[str]:
        nonlocal taken
        for document in iterate_documents(files, json_key):
            taken += len(document.text.encode())
            yield document.text
            if taken >= sample_bytes:
                return

    tokenizer.train_from_iterator(sample(), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"{taken} bytes of text yield only {tokenizer.get_vocab_size()} tokens, not {vocab_size}: "
            "give more text or a smaller vocab_size"
        )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOD_TOKEN, pad_token=PAD_TOKEN, clean_up_tokenization_spaces=False
    )
    _save_whole(wrapped, Path(output))
    return taken


def _save_whole(tokenizer: Any, output: Path) -> None:
    # An interrupted save must not leave a tokenizer.json that is half of one.
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.partial-") as partial:
        tokenizer.save_pretrained(partial)
        for file in sorted(Path(partial).iterdir()):
            os.replace(file, output / file.name)


def load_tokenizer(name: str | Path) -> Any:
    """The Hugging Face tokenizer in folder `name`, or of that name on the Hub.

    Raises ValueError if there is none, or if it has no end-of-document (eos) token.
    """
    _, transformers = _packages()
    if Path(name).exists() and not (Path(name) / "tokenizer_config.json").is_file():
        raise ValueError(f"{name} is not a Hugging Face tokenizer folder: it holds no tokenizer_config.json")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer {str(name)!r}: neither a folder here nor a name on the Hub ({error})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {str(name)!r} has no eos token, which has to end each document")
    return tokenizer


def vocabulary_digest(tokenizer: Any) -> str:
    """A short name for what the ids of a tokenizer (as from `load_tokenizer`) mean: equal where they mean the same."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


class Encoder:
    """Documents -> token ids, EOD after each. Cheap to send to another process: it then needs no transformers.

    Text is only text: a literal `<|endoftext|>` inside a document is encoded as its characters, never as EOD, and
    no other special token (such as a BOS) is added.
    """

    def __init__(self, tokenizer: Any):
        """tokenizer: as from `load_tokenizer`."""
        self.eod: int = tokenizer.eos_token_id
        self.vocab_size: int = len(tokenizer)
        # uint16 halves the file; 65500 is Megatron's own limit for it.
        self.dtype = np.uint16 if self.vocab_size < 65500 else np.int32
        self._slow = None if tokenizer.is_fast else tokenizer
        self._fast = None
        if tokenizer.is_fast:
            # A copy, because these settings must not change how the caller's tokenizer behaves.
            self._fast = _packages()[0].Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._fast.no_truncation()
            self._fast.no_padding()

    def encode(self, texts: Sequence[str], disk_bytes: int = 0) -> "EncodedChunk":
        """Tokens of `texts`, each followed by EOD. `disk_bytes` is handed through."""
        if self._fast is not None:
            # Set here and not once above: this flag does not survive pickling.
            self._fast.encode_special_tokens = True
            documents = [e.ids for e in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            documents = [self._slow.encode(t, add_special_tokens=False, split_special_tokens=True) for t in texts]
        return EncodedChunk(
            tokens=np.concatenate([np.asarray([*d, self.eod], dtype=self.dtype) for d in documents]),
            lengths=np.asarray([len(d) + 1 for d in documents], dtype=np.int32),
            text_bytes=sum(len(t.encode()) for t in texts),
            disk_bytes=disk_bytes,
        )


@dataclass(frozen=True)
class EncodedChunk:
    """Some consecutive documents. tokens: all of them in one array, EOD after each; lengths: int32, one a document."""

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: int  # UTF-8, without EODs
    disk_bytes: int  # of the input files


def encode_parallel(encoder: Encoder, documents: Iterable[Document], workers: int) -> Iterator[EncodedChunk]:
    """Encode `documents` in `workers` processes (1: in this one), in order; the same chunks for any number.

    Reads only a little ahead, so the corpus may be larger than memory. Raises ValueError if a process died.
    """
    chunks = _chunks(documents)
    if workers == 1:
        for texts, disk_bytes in chunks:
            yield encoder.encode(texts, disk_bytes)
        return
    # spawn: a fork would copy the locks of tokenizers' and torch's threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(encoder,))
    pending: deque[Future] = deque()
    try:
        for texts, disk_bytes in chunks:
            pending.append(pool.submit(_encode_in_worker, texts, disk_bytes))
            if len(pending) >= 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError("a tokenizing process died (out of memory?); try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(documents: Iterable[Document]) -> Iterator[tuple[list[str], int]]:
    # Cut by size and count alone, so that the number of workers changes nothing.
    texts: list[str] = []
    characters = disk_bytes = 0
    for document in documents:
        texts.append(document.text)
        characters += len(document.text)
        disk_bytes += document.disk_bytes
        if characters >= CHUNK_CHARACTERS or len(texts) >= CHUNK_DOCUMENTS:
            yield texts, disk_bytes
            texts, characters, disk_bytes = [], 0, 0
    if texts:
        yield texts, disk_bytes


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    # The processes are the parallelism; threads inside each would only fight over the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C is the parent's to handle; a parent that was killed must not leave its workers waiting for ever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode_in_worker(texts: list[str], disk_bytes: int) -> EncodedChunk:
    return _worker_encoder.encode(texts, disk_bytes)


def _packages() -> tuple[Any, Any]:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
        import transformers
    except ImportError as error:
        raise ImportError(f"tokenizers need more packages ({error}): pip install linear-moe[data]") from error
    return tokenizers, transformers
