"""Evaluations, one subcommand each: `linear-moe evaluate mqar` trains and scores associative recall."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

MODELS = ("gated_deltanet", "gated_deltanet+mom-single-kv", "gla", "gla+mom-single-kv", "softmax")


def add_mqar(commands):
    command = commands.add_parser(
        "mqar", help="multi-query associative recall (arXiv 2312.04927): accuracy against state size"
    )
    command.add_argument(
        "--models",
        nargs="+",
        default=MODELS,
        metavar="MODEL",
        help="[NAME=]BASE[{key: value}]: BASE a mixer, MIXER+mom, MIXER+mom-single-kv, softmax or a configuration's "
        "file or name; keys as in such a file. Default: %(default)s",
    )
    command.add_argument("--options", default="{}", metavar="YAML", help="{key: value} for all models")
    command.add_argument("--seq-length", type=int, default=64)
    command.add_argument("--pairs", type=int, nargs="+", default=[2, 8, 16], help="examples have these in turns")
    command.add_argument("--vocab-size", type=int, default=64, help="half keys, half values")
    command.add_argument("--power", type=float, default=0.01, help="of the queries' gaps; 1: uniform")
    command.add_argument(
        "--state-sizes", type=int, nargs="+", default=[], metavar="N", help="numbers a layer keeps of a sequence"
    )
    command.add_argument(
        "--equal-parameters",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="widen feed-forward layers until all models have the parameters of the largest",
    )
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--steps", type=int, default=2000)
    command.add_argument("--batch-size", type=int, default=32)
    command.add_argument("--lrs", type=float, nargs="+", default=[3e-3], help="the best on the validation set counts")
    command.add_argument("--examples", type=int, default=512, help="of the validation set, and of the test set")
    command.add_argument("--processes", type=int, default=1, help="of each run, by torchrun")
    command.add_argument("--jobs", type=int, default=1, help="runs at a time; GPUs are dealt out in turn")
    command.add_argument("--output", type=Path, required=True, help="folder; runs that have finished in it stay")
    command.set_defaults(run="linear_moe.evaluation.mqar:mqar")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="linear-moe evaluate", description=__doc__)
    add_mqar(parser.add_subparsers(required=True))
    arguments = vars(parser.parse_args(argv))
    module, function = arguments.pop("run").split(":")
    try:
        getattr(import_module(module), function)(**arguments)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
