"""Documents out of text files, and the corpus that every machine already has: Python's standard library.

A text file (`.txt`, `.py`, ...) is one document. A `.jsonl` (or `.ndjson`, `.jsonlines`, `.json`: one object a line)
file holds one document a line. Either may be gzipped (`.gz`). A folder is searched recursively. What is text is decided
by name, from the lists below and what the user adds to them.
"""

import gzip
import hashlib
import json
import logging
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

JSON_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json")
PROSE_SUFFIXES = ".txt .text .md .markdown .rst .org .adoc .tex .bib .html .htm .xml .csv .tsv .log".split()
CODE_SUFFIXES = (
    ".py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .java .kt .scala .go .rs .swift .cs .js .mjs .ts .jsx .tsx .rb .php "
    ".pl .lua .r .jl .f90 .hs .ml .ex .erl .clj .lisp .el .sh .bash .ps1 .bat .sql .css .proto .yaml .yml .toml .ini"
).split()
TEXT_SUFFIXES = (*JSON_SUFFIXES, *PROSE_SUFFIXES, *CODE_SUFFIXES)
# .json is not among them: a folder's .json files are more often settings than one object a line.
DEFAULT_PATTERNS = ("*.txt", *(f"*{suffix}" for suffix in JSON_SUFFIXES if suffix != ".json"))
DEFAULT_PATTERNS += tuple(f"{pattern}.gz" for pattern in DEFAULT_PATTERNS)
LARGEST_VALIDATION_FILE = 2**17


class Document(NamedTuple):
    """One document, and how many bytes of the input on disk it used up (compressed bytes in a `.gz`)."""

    text: str
    disk_bytes: int


def find_files(paths: Sequence[str | Path], patterns: Sequence[str] | None = None) -> list[Path]:
    """Files named by `paths`: files as given, folders searched recursively for `patterns`, sorted within a folder.

    A file is text if its name, without a `.gz`, ends in one of TEXT_SUFFIXES, or as a pattern does after its last
    wildcard: `*.en` declares `.en` files to be text, `*` declares nothing. In a folder other files, and hidden ones
    (`._a.txt`, anything in `.ipynb_checkpoints/`), are left out with a warning.

    Raises ValueError for a path that does not exist, a folder without a match, and a file that is not text by its name.
    """
    patterns = tuple(patterns or DEFAULT_PATTERNS)
    declared = [re.split(r"[*?\]/]", pattern)[-1].lower().removesuffix(".gz") for pattern in patterns]
    endings = (*TEXT_SUFFIXES, *filter(None, declared))
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            found.update(dict.fromkeys(_search(path, patterns, endings)))
        elif not path.is_file():
            raise ValueError(f"input {path} does not exist")
        elif not _is_text(path, endings):
            raise ValueError(
                f"{path} is not text by its name, as .txt, .md, .py, .jsonl, their .gz and others are; "
                f"if it is all the same, say so with --pattern '{path.suffix and '*'}{path.suffix or path.name}'"
            )
        else:
            found[path] = None
    return list(found)


def _search(folder: Path, patterns: tuple[str, ...], endings: tuple[str, ...]) -> list[Path]:
    matches = sorted({file for pattern in patterns for file in folder.rglob(pattern) if file.is_file()})
    left_out = [file for file in matches if _is_hidden(file.relative_to(folder)) or not _is_text(file, endings)]
    if left_out:
        logger.warning(
            "left out %d files of %s that are hidden or not text by their names; the first: %s",
            len(left_out), folder, left_out[0],
        )  # fmt: skip
    if len(left_out) == len(matches):
        raise ValueError(f"no text in {folder} matches {' or '.join(patterns)}; choose others with --pattern")
    return sorted(set(matches) - set(left_out))


def _is_text(path: Path, endings: tuple[str, ...]) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(endings)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def iterate_documents(files: Sequence[Path], json_key: str = "text") -> Iterator[Document]:
    """Documents of `files`, in order. Empty documents are dropped.

    Bytes that are not UTF-8 become U+FFFD; one warning at the end says in how many documents and where first.
    Raises ValueError, with file and line, for JSON that is not an object with a string under `json_key`; for a text
    file with NUL bytes (UTF-16, or binary), and for a damaged `.gz`.
    """
    replaced: list[str] = []
    for path in files:
        is_json = path.name.lower().removesuffix(".gz").endswith(JSON_SUFFIXES)
        is_gzip = path.name.lower().endswith(".gz")
        read_bytes = 0
        try:
            with open(path, "rb") as raw, gzip.open(raw) if is_gzip else nullcontext(raw) as stream:
                for number, content in enumerate(stream if is_json else [stream.read()], 1):
                    where = f"{path}:{number}" if is_json else str(path)
                    text, exact = _decode(content)
                    if is_json:
                        text, whole = _text_of_json(text, json_key, where) if text.strip() else ("", True)
                        exact = exact and whole
                    elif "\0" in text:
                        raise ValueError(f"{where} is not text in UTF-8: it holds NUL bytes")
                    if not exact:
                        replaced.append(where)
                    # The position in the file on disk, so that a progress bar knows its end in a .gz too.
                    position = raw.tell()
                    if text:
                        yield Document(text, position - read_bytes)
                        read_bytes = position
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path} is damaged or not a gzip file: {error}") from error
    if replaced:
        logger.warning(
            "%d documents held bytes that are not UTF-8, now U+FFFD; the first: %s", len(replaced), replaced[0]
        )


def _decode(content: bytes) -> tuple[str, bool]:
    try:
        return content.decode("utf-8-sig"), True
    except UnicodeDecodeError:
        return content.decode("utf-8-sig", errors="replace"), False


def _text_of_json(line: str, key: str, where: str) -> tuple[str, bool]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON, {error.msg} at column {error.colno}; one object a line is wanted"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets too deep
        raise ValueError(f"{where}: JSON that Python cannot read, {error}") from error
    if type(record) is not dict:
        raise ValueError(f"{where}: expected a JSON object, found a {type(record).__name__}")
    if key not in record:
        raise ValueError(f"{where}: no key {key!r} among {sorted(record)}; choose one with --json-key")
    text = record[key]
    if type(text) is not str:
        raise ValueError(f"{where}: {key!r} must be a string, found a {type(text).__name__}")
    # JSON can spell half a surrogate pair ("\\ud83d"), which is no character and which no tokenizer takes.
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole, whole == text


def stdlib_files() -> list[Path]:
    """This machine's Python standard library, tests included: sorted `*.py` files (about 1700 files, 30 MB).

    Raises ValueError where Python ships without its sources.
    """
    root = stdlib_root()
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    files = sorted(f for f in root.rglob("*.py") if f.is_file() and not skipped & set(f.relative_to(root).parts))
    if not files:
        raise ValueError(f"no Python sources in {root}: this Python came without its standard library's source")
    return files


def stdlib_root() -> Path:
    """Folder of the standard library; paths relative to it are the same on every machine with this Python."""
    return Path(sysconfig.get_path("stdlib"))


def split_files(files: Sequence[Path], root: Path, validation: float = 0.03) -> tuple[list[Path], list[Path]]:
    """(train, validation): each file's side depends on nothing but its path relative to `root` and its size.

    So a file that is added, or a tree that is moved, changes no other file's side. `validation` is the expected
    share in (0, 1) of the files up to LARGEST_VALIDATION_FILE bytes; larger ones are for training, so that no single
    file is most of the validation set. Raises ValueError if a side would be empty.
    """
    sides: tuple[list[Path], list[Path]] = ([], [])
    for path in files:
        digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
        chosen = int.from_bytes(digest[:8]) < validation * 2**64
        sides[chosen and path.stat().st_size <= LARGEST_VALIDATION_FILE].append(path)
    if not all(sides):
        raise ValueError(f"a split of {len(files)} files with validation share {validation} leaves one side empty")
    return sides
