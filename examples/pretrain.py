"""Train a hybrid linear model: python examples/pretrain.py --config tiny [any flag].

Under torchrun for several processes. The configuration's keys are Megatron's and linear_moe's flags; flags on the
command line override them. --help lists all.
"""

import sys

from linear_moe.mcore.pretrain import prepare, train

if __name__ == "__main__":  # checkpoint writers start this module again in processes of their own
    try:
        args = prepare(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    train(args)
