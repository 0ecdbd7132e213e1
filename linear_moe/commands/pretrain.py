"""Train a model: Megatron's flags and ours, which a configuration may set."""

import sys


def main(argv: list[str]) -> None:
    from linear_moe.mcore.pretrain import prepare, train  # importing Megatron takes seconds

    try:
        args = prepare(argv)
    except ValueError as error:
        sys.exit(f"error: {error}")
    train(args)
