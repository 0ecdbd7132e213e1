"""Training as a program. Imports nothing heavy: the processes that Megatron starts import it again."""

import sys

from linear_moe.mcore.quiet import hush


def run(argv: list[str]) -> None:
    """Train what the flags say; what is refused is said in one line, with exit status 1."""
    if "--verbose" not in argv:
        hush()
    from linear_moe.mcore.damage import Refused
    from linear_moe.mcore.pretrain import prepare, train

    try:
        args = prepare(argv)
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        train(args)
    except Refused as error:
        sys.exit(f"error: {error}")
