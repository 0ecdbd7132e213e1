"""Train a hybrid linear model: python examples/pretrain.py --config examples/configs/x.yaml [any flag].

Under torchrun for several processes. The configuration's keys are Megatron's and linear_moe's flags; flags on the
command line override them. --help lists all.
"""

import sys

from linear_moe.mcore.run import run

if __name__ == "__main__":  # processes that write checkpoints import this module again
    run(sys.argv[1:])
