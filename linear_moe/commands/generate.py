"""Write text with the model of a Megatron checkpoint: behind prompts, behind those of a file, or in a chat."""

import argparse
import sys
from pathlib import Path

from linear_moe.mcore.quiet import hush


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="linear-moe generate", description=__doc__)
    parser.add_argument("--load", required=True, type=Path, metavar="CHECKPOINT", help="a run's --save folder")
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="iteration (default: the last)")
    parser.add_argument("--tokenizer", metavar="DIR_OR_NAME", help="Hugging Face tokenizer (default: the checkpoint's)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", action="append", metavar="TEXT", help="repeat for several; without it or --input: a chat"
    )
    source.add_argument("--input", type=Path, metavar="FILE", help='lines of JSON: {"prompt": TEXT}')
    parser.add_argument("--output", type=Path, metavar="FILE", help='the lines of --input, each with a "completion"')
    parser.add_argument(
        "--batch-size", type=int, default=16, help="prompts of --input at a time (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token (default)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0: all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest that together have this")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 against repetition")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end behind these tokens; repeat")
    parser.add_argument("--seed", type=int, help="of the sampling (default: another each time)")
    options = parser.parse_args(argv)
    if (options.input is None) != (options.output is None):
        parser.error("--input and --output go together")

    hush()
    from linear_moe.inference.text import write  # importing Megatron takes seconds

    try:
        write(options)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
