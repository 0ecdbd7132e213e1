"""Train a model: Megatron's flags and ours, which a configuration may set."""

import sys

from linear_moe.mcore.quiet import hush


def main(argv: list[str]) -> None:
    """Trains what the flags say; what is refused is said in one line, with exit status 1."""
    if "--verbose" not in argv:
        hush()
    from linear_moe.mcore.damage import Refused  # importing Megatron takes seconds, and warns
    from linear_moe.mcore.pretrain import leave, prepare, train

    try:
        args = prepare(argv)
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        train(args)
        leave()
    except Refused as error:
        sys.exit(f"error: {error}")
