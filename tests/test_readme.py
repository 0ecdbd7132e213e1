"""Every code block of README.md is run: as it stands where that takes seconds, else in the form that HOW says.

A block that HOW does not know fails. Programs are called by the names that README gives them, in an empty folder.
"""

import gzip
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import pytest

from linear_moe.data.text import stdlib_files
from linear_moe.ssm import Mixer

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
LESS = "--train-iters 3 --eval-iters 0 --log-interval 1"  # behind the flags of everything that trains
LOSS = r"iteration +\d+/.*?lm loss: \d\.\d+"  # processes may share a line
SAVED = "out/latest_checkpointed_iteration.txt"
OWN = """--layer-pattern LN --num-layers 2 --mom-memories 3 --mixer gla --hidden-size 32 --num-attention-heads 4
    --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope --normalization RMSNorm
    --disable-bias-linear --micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-3 --min-lr 0 --eval-iters 0
    --eval-interval 1000 --log-interval 1 --tokenizer-type NullTokenizer --vocab-size 99 --save out
    --save-interval 2"""

# As pip makes it: its folder, not the present one, is where Python looks for modules.
LINEAR_MOE = f"""#!{sys.executable}
import sys
sys.path.append({str(ROOT)!r})
from linear_moe.commands import main
if __name__ == "__main__":
    main(sys.argv[1:] + ({LESS!r}.split() if sys.argv[1] == "pretrain" else []))
"""
TORCHRUN = f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@" {LESS}\n'
PROGRAMS = {"linear-moe": LINEAR_MOE, "torchrun": TORCHRUN, "pip": "#!/bin/sh\n"}


# --- how a block is run -----------------------------------------------------------------------------------------------


def run(command, folder):
    """The output of a program that README names, called in a folder."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in PROGRAMS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    streams = {"stdin": subprocess.DEVNULL, "capture_output": True}
    done = subprocess.run(command, cwd=folder, env=environment, text=True, timeout=600, **streams)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@dataclass
class Shell:
    """In bash, where `linear-moe` and torchrun train three iterations, and pip does nothing.

    said: how often a pattern is in the output. prepare: makes in a folder what the block expects there.
    changes: text -> what stands in its place, and takes less time. made: a file that is there afterwards.
    """

    said: dict[str, int]
    prepare: Callable[[Path], None] | None = None
    changes: dict[str, str] = field(default_factory=dict)
    made: str | None = None

    def __call__(self, block, folder):
        check_extras(block)
        if self.prepare:
            self.prepare(folder)
        for before, after in self.changes.items():
            assert before in block
            block = block.replace(before, after)
        output = run(["bash", "-euo", "pipefail", "-c", block], folder)
        assert {pattern: len(re.findall(pattern, output, re.MULTILINE)) for pattern in self.said} == self.said, output
        assert self.made is None or (folder / self.made).exists()


def check_extras(block):
    """What is given to pip in brackets are extras that setup.py has."""
    with patch("setuptools.setup") as setup, pytest.MonkeyPatch.context() as there:
        there.chdir(ROOT)
        runpy.run_path("setup.py")
    for extras in re.findall(r"pip install [^#\n]*\[([\w,-]+)\]", block):
        assert {*extras.split(",")} <= setup.call_args.kwargs["extras_require"].keys()


def make(block, folder):
    """The targets exist, and make knows what to do for them."""
    targets = re.findall(r"^make (\w+)", block, re.MULTILINE)
    said = run(["make", "-n", "-C", ROOT, f"VENV={folder}", *targets], folder)
    assert "examples/demo.py" in said and "-m pytest" in said and "[dev]" in said


def shown(block, folder):
    """Output, which nobody runs."""


def build(block, folder):
    names = {}
    exec(block, names)
    assert names["logits"].shape == (2, 128, 512) and names["losses"].shape == (2, 128)
    assert len(names["model"].decoder.layers) == 16


def own_script(block, folder):
    shutil.copy(ROOT / "tests" / "my_script.py", folder)
    (folder / "train.py").write_text(block)
    output = run([sys.executable, "train.py", *OWN.split()], folder)
    assert len(re.findall(LOSS, output, re.MULTILINE)) == 2 and "MoM balance loss: 1." in output
    assert (folder / SAVED).read_text() == "2"


def mixer(block, folder):
    names = {}
    exec(block, names)
    assert issubclass(names["Toy"], Mixer)


def write_toy(folder):
    (toy,) = (block for block in BLOCKS if "class Toy(Mixer)" in block)
    (folder / "toy.py").write_text(toy)


def write_corpus(folder):
    (folder / "corpus").mkdir()
    files = [file for file in stdlib_files() if file.parent.name == "json"]
    for file in files:
        shutil.copy(file, folder / "corpus" / f"{file.stem}.txt")
    with gzip.open(folder / "more.jsonl.gz", "wt") as more:
        more.writelines(json.dumps({"text": part}) + "\n" for part in files[0].read_text().split("\n\n") * 20)


def write_chat(folder):
    """A model to write with: bytes, so that any text is in its vocabulary."""
    write_corpus(folder)
    (train,) = (block for block in BLOCKS if block.startswith("linear-moe preprocess"))
    *training, _ = train.replace("32000", "400").strip().split("\nlinear-moe ")
    run(["bash", "-euo", "pipefail", "-c", "\nlinear-moe ".join(training)], folder)
    (folder / "prompts.jsonl").write_text('{"prompt": "def "}\n{"prompt": "import "}\n')


def write_from_python(block, folder):
    flags = "--config tiny --save out --mock-data --tokenizer-type NullTokenizer --vocab-size 511"
    run(["linear-moe", "pretrain", *flags.split()], folder)
    names = {}
    with pytest.MonkeyPatch.context() as there:
        there.chdir(folder)
        exec(block, names)
    assert [len(tokens) for tokens in names["written"]] == [20, 20]


HOW = {  # how a block begins -> how it is run
    "make demo": make,
    "1. Corpus:": shown,
    "pip install": Shell({"^usage: linear-moe": 1, "^llama3/340m_mom ": 1, LOSS: 3, "^layout: 2 processes on CPU": 1}),
    "linear-moe preprocess": Shell(
        {r"^data/train\.bin: \d+ documents": 1, LOSS: 3, "^import .": 1},
        write_corpus,
        {"--train-bpe 32000": "--train-bpe 400"},
        SAVED,
    ),
    "linear-moe generate": Shell({"^Say something": 1}, write_chat, made="written.jsonl"),
    "from linear_moe import load_model": write_from_python,
    "import torch\n\nimport linear_moe\n": build,
    "from megatron.core.enums": own_script,
    "import torch\n\nfrom linear_moe.ops": mixer,
    "export PYTHONPATH=.": Shell({LOSS: 6, "MoM balance loss: ": 3, r"^model: 8 layers LELELE\*E, Toy": 2}, write_toy),
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_block(block, tmp_path):
    found = [way for start, way in HOW.items() if block.startswith(start)]
    assert len(found) == 1, "say in HOW how this block is run"
    found[0](block, tmp_path)


def test_every_way_has_its_block():
    assert [start for start in HOW if not any(block.startswith(start) for block in BLOCKS)] == []
