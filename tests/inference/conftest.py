import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from linear_moe.data.text import stdlib_root
from linear_moe.data.tokenizer import train_bpe
from linear_moe.mcore.preprocess import preprocess
from tests.mcore.test_pretrain import ROOT

MODEL = "--config tiny --num-layers 2 --layer-pattern LN --num-experts 2 --max-position-embeddings 64 --seq-length 64"
TRAINING = "--train-iters 2 --save-interval 1 --eval-iters 0 --lr-warmup-iters 0 --save out"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of 2 iterations of a hybrid MoM model with a tokenizer of 300 tokens: its folder, and the tokenizer's."""
    folder = tmp_path_factory.mktemp("trained")
    source = stdlib_root() / "textwrap.py"
    train_bpe([source], 300, folder / "bpe")
    preprocess([source], str(folder / "bpe"), str(folder / "data"), workers=1)
    data = f"--data-path data --split 100,0,0 --tokenizer-model {folder / 'bpe'}"
    command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), *f"{MODEL} {TRAINING} {data}".split()]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout[-1500:] + run.stderr[-1500:]
    return SimpleNamespace(load=folder / "out", tokenizer=folder / "bpe")
