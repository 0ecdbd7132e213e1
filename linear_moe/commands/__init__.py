"""The command `linear-moe`: a module a subcommand, imported when it is called.

Megatron's checkpoint writer and the tokenizing processes import the main module again, and --help should not wait: so
nothing here imports torch or Megatron before it has to, which is after the arguments but for those that are named after
what is in there.
"""

import argparse
import sys
from importlib import import_module

from linear_moe import __version__

COMMANDS = {  # name -> what it does; its module is called alike, and has main(argv)
    "pretrain": "train a model; under torchrun in several processes",
    "preprocess": "turn text into Megatron's data files, and train a tokenizer for it",
    "configs": "list the configurations that --config knows by name",
    "mixers": "list the mixers: rules, papers, sizes of state, options",
    "generate": "write text with a checkpoint's model: prompts, files, or a chat",
    "evaluate": "train and score models on synthetic tasks",
    "benchmark": "time update rules, kernels, layers and decoding",
    "kernel-report": "compile all Triton kernels for all GPUs, without one",
    "gpu-report": "check and time everything on the GPU at hand",
}


def main(argv: list[str] | None = None) -> None:
    """Runs a subcommand and exits with its status.

    argv: the subcommand and its arguments (default: the command line's).
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    parser = argparse.ArgumentParser(
        prog="linear-moe", usage="%(prog)s COMMAND [arguments]", epilog="linear-moe COMMAND --help says more."
    )
    parser.add_argument("--version", action="version", version=f"linear-moe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command, summary in COMMANDS.items():
        commands.add_parser(command, help=summary, add_help=False)
    parser.parse_args([name])
    sys.argv = [f"linear-moe {name}", *rest]  # Megatron reads it, and names its parser after it
    sys.exit(import_module(f"{__name__}.{name.replace('-', '_')}").main(rest))
