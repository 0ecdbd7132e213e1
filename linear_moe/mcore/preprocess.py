"""Text -> Megatron's .bin/.idx, and checks of such files that speak before Megatron starts."""

import json
import os
import shutil
import struct
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from linear_moe.data.text import find_files, iterate_documents
from linear_moe.data.tokenizer import Encoder, encode_parallel, load_tokenizer, vocabulary_digest

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document indices
_MAGIC = b"MMIDIDX\x00\x00"


@dataclass(frozen=True)
class Corpus:
    """What was written: also in `<prefix>.json`, because bits per byte needs tokens and bytes of the same text, and
    training wants to know whether its tokenizer is this one.
    """

    documents: int
    tokens: int  # one EOD a document included
    bytes: int  # UTF-8, without EODs
    tokenizer: str
    vocabulary: str  # the tokenizer's `vocabulary_digest`
    largest_id: int  # of all tokens


def preprocess(
    paths: Sequence[str | Path],
    tokenizer: str | Path,
    output_prefix: str | Path,
    workers: int | None = None,
    *,
    json_key: str = "text",
    patterns: Sequence[str] | None = None,
    progress: bool = True,
) -> Corpus:
    """Tokenize `paths` into `<output_prefix>.bin`, `.idx` and `.json`, EOD after each document.

    paths: files and folders, see `linear_moe.data.text.find_files`. tokenizer: folder or Hub name.
    workers: processes; None takes every core this process may use. The result is byte for byte the same for any
        number. With more than one, a script needs `if __name__ == "__main__"` (processes are spawned).

    Everything is written under `<output_prefix>.partial-<pid>.*` and renamed when whole, .idx last. Raises
    ValueError for bad input (see `find_files`, `iterate_documents`, `load_tokenizer`), for an input without any
    text, and if a worker process died.
    """
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    files = find_files(paths, patterns)
    loaded = load_tokenizer(tokenizer)
    encoder = Encoder(loaded)
    # Not above: training needs check_dataset without the `data` extra, of which tqdm is a part.
    from tqdm import tqdm

    prefix = Path(output_prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    partial = f"{prefix}.partial-{os.getpid()}"
    builder = IndexedDatasetBuilder(f"{partial}.bin", dtype=encoder.dtype)
    documents = tokens = text_bytes = largest_id = 0
    try:
        with tqdm(
            total=sum(f.stat().st_size for f in files),
            unit="B",
            unit_scale=True,
            desc=prefix.name,
            disable=not progress,
            mininterval=0.5 if sys.stderr.isatty() else 10,  # a log file wants few lines
        ) as bar:
            for chunk in encode_parallel(encoder, iterate_documents(files, json_key), workers):
                for document in np.split(chunk.tokens, np.cumsum(chunk.lengths)[:-1]):
                    builder.add_document(document, [document.size])
                documents += chunk.lengths.size
                tokens += chunk.tokens.size
                text_bytes += chunk.text_bytes
                largest_id = max(largest_id, int(chunk.tokens.max()))
                bar.update(chunk.disk_bytes)
                bar.set_postfix_str(f"{documents} documents, {tokens / 1e6:.1f}M tokens", refresh=False)
        if not documents:
            raise ValueError(f"no text in {', '.join(map(str, paths))}: every document is empty")
        corpus = Corpus(documents, tokens, text_bytes, str(tokenizer), vocabulary_digest(loaded), largest_id)
        builder.finalize(f"{partial}.idx")
        Path(f"{partial}.json").write_text(json.dumps(asdict(corpus), indent=2) + "\n")
        _publish(partial, prefix)
    finally:
        builder.data_file.close()
        for suffix in (".bin", ".idx", ".json"):
            Path(partial + suffix).unlink(missing_ok=True)
    return corpus


def _publish(partial: str, prefix: Path) -> None:
    # Without its .idx a corpus does not exist for Megatron. So the old .idx goes first and the new one comes last:
    # at no moment does an .idx stand beside another run's .bin.
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    # Megatron's cached sample indices are keyed by this path, not by content: stale ones would be used silently.
    shutil.rmtree(prefix / "cache" / "GPTDataset_indices", ignore_errors=True)
    for suffix in (".bin", ".json", ".idx"):
        os.replace(partial + suffix, f"{prefix}{suffix}")


@dataclass(frozen=True)
class DatasetInfo:
    """What a .bin/.idx pair holds. `epochs`: passes over it that the wanted samples take."""

    documents: int
    tokens: int
    epochs: float


def check_dataset(prefix: str | Path, sequence_length: int, samples: int = 0, split: str | None = None) -> DatasetInfo:
    """Check that Megatron can train on `<prefix>.bin` and `<prefix>.idx`. Reads the index, not the tokens.

    sequence_length: tokens a sample. samples: how many samples are wanted (more than there are means repetition).
    split: Megatron's ``--split``, by which it cuts the file into train, validation and test sets of whole documents.
    Raises ValueError for a missing, truncated or damaged file, for files that do not belong together, for fewer than
    sequence_length + 1 tokens, and for a split whose share is not a single token (Megatron would wait for it forever).
    """
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, data):
        if not path.is_file():
            raise ValueError(f"{path} does not exist: make it with linear-moe preprocess --output-prefix {prefix}")
    again = "preprocess the text again"
    content = np.memmap(idx, mode="r") if idx.stat().st_size else np.empty(0, np.uint8)
    if content.size < _HEADER.size:
        raise ValueError(f"{idx} is truncated: {content.size} bytes, its header alone takes {_HEADER.size}; {again}")
    magic, version, code, sequences, boundaries = _HEADER.unpack(content[: _HEADER.size].tobytes())
    if magic != _MAGIC or version != 1 or code not in {d.value for d in DType}:
        raise ValueError(f"{idx} is not a Megatron index (header {magic!r}, version {version}, dtype code {code})")
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if content.size < expected:
        raise ValueError(f"{idx} is truncated: {content.size} bytes of {expected}; {again}")
    lengths = content[_HEADER.size :][: 4 * sequences].view(np.int32)
    starts = content[_HEADER.size + 4 * sequences :][: 8 * sequences].view(np.int64)
    ends = content[_HEADER.size + 12 * sequences :][: 8 * boundaries].view(np.int64)
    itemsize = DType.size(code)
    tokens = int(lengths.sum(dtype=np.int64))
    whole = (
        boundaries > 0
        and ends[0] == 0
        and ends[-1] == sequences
        and (lengths >= 0).all()
        and (starts[:1] == 0).all()
        and (np.diff(starts) == lengths[:-1].astype(np.int64) * itemsize).all()
    )
    if not whole:
        raise ValueError(f"{idx} is damaged: its lengths, offsets and document ends contradict each other; {again}")
    size = data.stat().st_size
    if size != tokens * itemsize:
        problem = "is truncated" if size < tokens * itemsize else "does not belong to its .idx"
        raise ValueError(f"{data} {problem}: {size} bytes, its index says {tokens * itemsize}; {again}")
    if tokens < sequence_length + 1:
        raise ValueError(
            f"{prefix} is too small: {tokens} tokens, and one sample takes {sequence_length + 1} "
            f"(sequence length {sequence_length} + 1); give more text or a shorter sequence length"
        )
    if split is not None:
        shares = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
        for name, share in zip(("train", "validation", "test"), shares):
            if share and not lengths[slice(*(round(end * float(sequences)) for end in share))].any():
                raise ValueError(
                    f"--split {split} leaves nothing of {prefix} for the {name} set: it cuts between documents, and "
                    f"there are {boundaries - 1}; give more documents, another --split, or files of their own "
                    "(--train-data-path, --valid-data-path)"
                )
    return DatasetInfo(boundaries - 1, tokens, samples * sequence_length / tokens)


def load_documents(prefix: str | Path) -> list[np.ndarray]:
    """Token ids of every document of `<prefix>.bin`, EOD included, in file order; memory-mapped, read-only."""
    dataset = IndexedDataset(str(prefix))
    # Not dataset[i]: when the dataset is deleted it unmaps the memory under its arrays, and reading them crashes.
    tokens = np.asarray(np.memmap(f"{prefix}.bin", dtype=dataset.index.dtype, mode="r"))
    return np.split(tokens, np.cumsum(dataset.sequence_lengths)[:-1])
