"""Documents out of files, and the standard library as a corpus."""

import gzip
import json
import logging

import pytest

from linear_moe.data.text import find_files, iterate_documents, split_files, stdlib_files, stdlib_root


def texts(*paths, **kwargs):
    return [d.text for d in iterate_documents(find_files(paths), **kwargs)]


def test_a_folder_gives_its_text_and_jsonl_files_plain_and_gzipped_in_sorted_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\r\nline")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n\n{"text": ""}\n{"text": "\\u00e9\\n"}\n')
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("gezippt ü".encode()))
    (tmp_path / "sub" / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "deep"}\n'))
    (tmp_path / "ignored.py").write_text("pass")
    assert texts(tmp_path) == ["first\r\nline", "x", "é\n", "gezippt ü", "deep"]
    assert [f.name for f in find_files([tmp_path], ["*.py"])] == ["ignored.py"]
    assert len(find_files([tmp_path, tmp_path / "a.txt"])) == 4, "a file named twice is read once"


@pytest.mark.parametrize("name", ["a.ndjson", "a.jsonlines", "a.JSONL", "a.json", "a.ndjson.gz"])
def test_json_lines_by_every_name(tmp_path, name):
    lines = b'{"text": "x"}\n{"text": "y"}\n'
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    assert texts(tmp_path / name) == ["x", "y"]
    if name.islower() and ".json" != (tmp_path / name).suffix:
        assert texts(tmp_path) == ["x", "y"]


def test_copies_and_binaries_in_a_folder_are_left_out_by_name(tmp_path, caplog):
    for name in ("a.txt", "._a.txt", ".ipynb_checkpoints/a.txt", "a.txt~", "b.en", "c.bz2", "enwik8"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    with caplog.at_level(logging.WARNING):
        assert [f.name for f in find_files([tmp_path], ["*"])] == ["a.txt"]
        assert [f.name for f in find_files([tmp_path], ["*.en", "enwik?"])] == ["b.en"]
    assert [r.getMessage() for r in caplog.records] == [
        f"left out 6 files of {tmp_path} that are hidden or not text by their names; the first: {tmp_path / '._a.txt'}",
        f"left out 1 files of {tmp_path} that are hidden or not text by their names; the first: {tmp_path / 'enwik8'}",
    ]
    assert texts(tmp_path / ".ipynb_checkpoints") == [".ipynb_checkpoints/a.txt"], "named by the user"
    assert [f.name for f in find_files([tmp_path / "enwik8", tmp_path], ["enwik8"])] == ["enwik8"]


def test_bytes_on_disk_add_up_so_that_a_progress_bar_ends(tmp_path):
    lines = b"".join(json.dumps({"text": str(i) * 50}).encode() + b"\n" for i in range(5000))
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    for path in find_files([tmp_path]):
        assert sum(d.disk_bytes for d in iterate_documents([path])) == path.stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1: no key 'text' among \['body'\].*--json-key"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1: expected a JSON object, found a list"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: 'text' must be a string, found a int"),
        ("a.jsonl", b'{"text": "x"}\n{"n": %s}\n' % (b"[" * 99999), r"a\.jsonl:2: JSON that Python cannot read"),
        ("a.jsonl", b'{"text": "x"}\n{"n": %s}\n' % (b"1" * 5000), r"a\.jsonl:2: JSON that Python cannot read"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz is damaged or not a gzip file"),
        ("a.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:-9], r"a\.txt\.gz is damaged or not a gzip file"),
        ("a.jsonl.zst", b"", r"a\.jsonl\.zst is not text by its name.*--pattern '\*\.zst'"),
        ("a.pdf", b"%PDF-1.4", r"a\.pdf is not text by its name"),
        ("a.npy.gz", gzip.compress(b"words", mtime=0), r"a\.npy\.gz is not text by its name"),
        ("a.txt~", b"words", r"a\.txt~ is not text by its name"),
        ("enwik8", b"words", r"enwik8 is not text by its name.*--pattern 'enwik8'"),
        ("a.txt", "words".encode("utf-16-le"), r"a\.txt is not text in UTF-8: it holds NUL bytes"),
    ],
)
def test_bad_input_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / name)


def test_missing_paths_and_folders_without_a_match_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        find_files([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"no text in .* matches \*\.md; .*--pattern"):
        find_files([tmp_path], ["*.md"])


def test_what_is_not_unicode_is_replaced_and_reported_once(tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes("né".encode("latin-1"))
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"text": "half \\ud83d"}\n{"text": "\\ud83d\\ude00"}\n')
    (tmp_path / "c.jsonl").write_bytes('{"text": "né"}\n'.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        assert texts(tmp_path) == ["n\ufffd", "fine", "half \ufffd", "😀", "n\ufffd"]
    assert [r.getMessage() for r in caplog.records] == [
        f"3 documents held bytes that are not UTF-8, now U+FFFD; the first: {tmp_path / 'a.txt'}"
    ]


def test_the_standard_library_is_there_and_its_split_depends_on_each_file_alone(tmp_path):
    files = stdlib_files()
    assert files == sorted(files)
    assert stdlib_root() / "argparse.py" in files
    assert not [f for f in files if "site-packages" in f.parts]
    train, validation = split_files(files, stdlib_root())
    assert sorted(train + validation) == files
    assert 0.01 < len(validation) / len(files) < 0.06
    half = files[::2]
    assert split_files(half, stdlib_root())[1] == [f for f in validation if f in half]


def test_a_split_keeps_large_files_for_training_and_refuses_an_empty_side(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x")
    large.write_bytes(b"x" * 200_000)
    assert split_files([small, large], tmp_path, validation=1.0) == ([large], [small])
    with pytest.raises(ValueError, match=r"split of 1 files .* leaves one side empty"):
        split_files([large], tmp_path)
