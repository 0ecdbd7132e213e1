"""The training program from outside: what it refuses before any work, and what it logs."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from linear_moe.evaluation.plots import read_scalars
from linear_moe.mcore import data_checks
from linear_moe.mcore.arguments import expand_argv
from linear_moe.mcore.checks import check_arguments
from linear_moe.mcore.configs import CONFIGS
from linear_moe.mcore.data_checks import check_data
from linear_moe.mcore.pretrain import main
from tests.mcore.test_arguments import parse

ROOT = Path(__file__).resolve().parents[2]
TINY = "tiny"


def pretrain(*flags, cwd, **options):
    command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), "--config", TINY, *flags]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500, **options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The prefix of data with 4 documents of 200 tokens."""
    prefix = str(tmp_path_factory.mktemp("corpus") / "words")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(4):
        builder.add_document(np.arange(200, dtype=np.uint16), [200])
    builder.finalize(f"{prefix}.idx")
    return prefix


MOCK = "--mock-data --tokenizer-type NullTokenizer --vocab-size 511".split()


def test_trains_and_logs(tmp_path):
    """tokens/s, FLOP/s and the memories' shares, on the console and in TensorBoard."""
    run = pretrain(*MOCK, "--train-iters", "6", "--log-interval", "3", "--tensorboard-dir", "tb", cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-1500:] + run.stderr[-1500:]
    assert re.search(r"tokens/s: \d+ \| TFLOP/s of all processes: \d\.\d+ \| MoM balance loss: \d\.\d+", run.stdout)
    scalars = read_scalars(tmp_path / "tb")
    for layer in (1, 3, 5):  # places in the pattern
        shares = [scalars[f"mom/layer_{layer}/memory_{m}_share"][1] for m in range(4)]
        assert len(shares[0]) == 6 and sum(shares) == pytest.approx(1)
    assert "mom/layer_7/memory_0_share" not in scalars  # softmax
    assert scalars["mom/balance_loss"][1] == pytest.approx(1, abs=0.03)  # of routers that know nothing yet
    assert scalars["mom/router_entropy"][1] == pytest.approx(math.log(4), abs=0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-path", "nowhere"], "nowhere"),
        ([], "no data: give --data-path"),
        ([*MOCK, "--mixer", "gated_delta"], "unknown mixer 'gated_delta'; did you mean 'gated_deltanet'"),
        ([*MOCK, "--mom-topk", "9"], "mom_topk (9) must be between 1 and mom_memories (4)"),
        ([*MOCK, "--layer-patern", "LN"], "unknown flag --layer-patern; did you mean --layer-pattern"),
        ([*MOCK, "--hidden-size", "66"], "hidden_size (66) must be divisible by num_heads (4), unless"),
        (
            [*MOCK, "--global-batch-size", "3"],
            "Megatron refuses these arguments: eval_global_batch_size (3) must be divisible",
        ),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_any_work(flags, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    with pytest.raises(ValueError, match=re.escape(message)):
        main(["--config", TINY, *flags])


def test_bad_input_is_one_line(tmp_path):
    run = pretrain("--data-path", "nowhere", cwd=tmp_path)
    assert run.returncode == 1
    assert re.fullmatch("error: .*nowhere.*\n", run.stderr)


WHOLE = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name != "common"]  # those are parts of others


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_configuration_is_valid(path):
    args = parse(expand_argv(["--config", str(path), "--transformer-impl", "local"]))
    check_arguments(args)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data-path DATA --split 100,0,0", "no validation set (--split 100,0,0): give one"),
        ("--train-data-path DATA", "no validation set (only training data): give one (--valid-data-path, or a share"),
        ("--train-data-path DATA --test-data-path DATA", "no validation set (only training and test data)"),
        (
            "--data-path DATA --split 100,0,0 --full-validation --multiple-validation-sets --eval-iters 0",
            "no validation",
        ),
        ("--data-path DATA --split 0,100,0", "no training set (--split 0,100,0): give one, or --skip-train"),
        ("--valid-data-path DATA", "no training set (only validation data)"),
        ("--data-path DATA --split 0,0,0", "--split 0,0,0 must be up to three numbers, not all 0"),
        ("--data-path DATA --split 1,2,3,4", "--split 1,2,3,4 must be up to three numbers"),
        ("--train-data-path DATA --valid-data-path DATA --full-validation", "must be given together"),
        ("--mock-data --multiple-validation-sets", "must be given together"),
        (
            "--train-data-path DATA --valid-data-path 1 DATA 2 DATA --full-validation --multiple-validation-sets",
            "--full-validation reads every validation set once: give the sets without weights",
        ),
        (
            "--data-path 0.5 DATA DATA --split 1,1,0",
            "DATA: in a blend give every prefix a weight before it (0.3 a 0.7 b), or none",
        ),
        ("--data-path DATA 0.5 --split 1,1,0", "DATA 0.5: in a blend give every prefix a weight"),
        ("--data-path 1 DATA 0 DATA --split 1,1,0", "weights must be above 0, but are [1.0, 0.0]; leave out"),
        ("--data-path 1 DATA nan DATA --split 1,1,0", "weights must be above 0, but are [1.0, nan]"),
        ("--data-path DATA DATA 3 DATA4 --split 1,1,0", "give every prefix a weight"),
        ("--data-args-path nowhere.txt", "the data's paths cannot be read (FileNotFoundError"),
    ],
    ids=lambda value: value if value.startswith("--") else "",
)
def test_data_flags_that_cannot_work(flags, message, corpus):
    with pytest.raises(ValueError, match=re.escape(message.replace("DATA", corpus))) as error:
        check_data(parse(["--seq-length", "64", *flags.replace("DATA", corpus).split()]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        "--data-path DATA --split 1,1,0",
        "--data-path DATA --split 100,0,0 --eval-iters 0",
        "--train-data-path DATA --eval-iters 0",
        "--data-path 0.3 DATA 1e-3 DATA --split 1,1,0",
        "--data-path DATA DATA --split 1,1",
        "--train-data-path DATA --valid-data-path DATA DATA --full-validation --multiple-validation-sets",
        "--valid-data-path DATA --skip-train",
    ],
)
def test_data_flags_that_work(flags, corpus):
    check_data(parse(["--seq-length", "64", *flags.replace("DATA", corpus).split()]))


def test_chats_need_their_packages_tokenizer_and_files(corpus, monkeypatch):
    flags = ["--sft", "--data-path", corpus, "--split", "1,1,0", "--tokenizer-type"]
    monkeypatch.setattr(data_checks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--sft needs datasets and transformers: pip install 'linear-moe\[sft\]'"):
        check_data(parse([*flags, "SFTTokenizer"]))
    monkeypatch.setattr(data_checks, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="--sft needs --tokenizer-type SFTTokenizer, which knows chats, not TikTok"):
        check_data(parse([*flags, "TikTokenizer"]))
    with pytest.raises(ValueError, match=rf"{corpus} does not exist: --sft reads \.jsonl files"):
        check_data(parse([*flags, "SFTTokenizer"]))
