"""python -m linear_moe, and torchrun -m linear_moe: the command `linear-moe`."""

from linear_moe.commands import main

if __name__ == "__main__":
    main()
