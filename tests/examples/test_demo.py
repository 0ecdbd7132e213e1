"""The demo's commands are ones that the training program takes; the demo itself is `make demo`."""

import argparse
import runpy
from pathlib import Path

from linear_moe.mcore.arguments import expand_argv
from linear_moe.mcore.checks import check_arguments
from tests.mcore.test_arguments import parse

DEMO = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "demo.py"))


def test_commands_are_valid(tmp_path):
    options = argparse.Namespace(processes=2)
    for flags in (["--train-iters", 2000, "--exit-duration-in-mins", 2], ["--skip-train"]):
        words = DEMO["command"](options, tmp_path, flags)
        args = parse(expand_argv(words[words.index("--config") :]))
        check_arguments(args)
        assert (args.seq_length, args.global_batch_size) == (DEMO["SEQUENCE"], DEMO["BATCH"])
        assert args.mixer == "gated_deltanet" and args.layer_pattern == "LLLN" and args.mom_memories == 4


def test_iteration_of_the_last_checkpoint(tmp_path):
    assert DEMO["iteration"](tmp_path) == 0
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("17")
    assert DEMO["iteration"](tmp_path) == 17
