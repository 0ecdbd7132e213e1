"""The training program from outside: what it refuses before any work, and what it logs."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from linear_moe.evaluation.plots import read_scalars
from linear_moe.mcore.arguments import expand_argv
from linear_moe.mcore.checks import check_arguments
from linear_moe.mcore.pretrain import _is_weight, main
from tests.mcore.test_arguments import parse

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "examples" / "configs" / "tiny.yaml")


def pretrain(*flags, cwd):
    command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), "--config", TINY, *flags]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


MOCK = "--mock-data --tokenizer-type NullTokenizer --vocab-size 511".split()


def test_trains_and_logs(tmp_path):
    """tokens/s, FLOP/s and the memories' shares, on the console and in TensorBoard."""
    run = pretrain(*MOCK, "--train-iters", "6", "--log-interval", "3", "--tensorboard-dir", "tb", cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-1500:] + run.stderr[-1500:]
    assert re.search(r"tokens/s: \d+ \| TFLOP/s of all processes: \d\.\d+ \| MoM balance loss: \d\.\d+", run.stdout)
    scalars = read_scalars(tmp_path / "tb")
    for layer in (1, 2, 3):
        shares = [scalars[f"mom/layer_{layer}/memory_{m}_share"][1] for m in range(4)]
        assert len(shares[0]) == 6 and sum(shares) == pytest.approx(1)
    assert "mom/layer_4/memory_0_share" not in scalars  # softmax
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
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.strip().splitlines()[-1].startswith("error: ")


CONFIGS = ROOT / "examples" / "configs"
WHOLE = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name != "common"]  # those are parts of others


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_configuration_is_valid(path):
    args = parse(expand_argv(["--config", str(path), "--transformer-impl", "local"]))
    check_arguments(args)


def test_blends_alternate_weights_and_prefixes():
    assert [_is_weight(word) for word in ("0.3", "30", "corpus", "1e-3")] == [True, True, False, True]
