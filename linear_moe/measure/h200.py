"""The least time that work takes on an H200: what times are held against."""

from .timing import MODES

BANDWIDTH, FLOPS = 4.3e12, 790e12  # measured: bytes a second of a copy, bf16 operations a second of a product


def least_seconds(size, flops):
    """Of so many bytes moved and so many operations: the longer of the two."""
    return max(size / BANDWIDTH, flops / FLOPS)


def floor(inputs, do, flops):
    """{mode: least milliseconds on an H200}. flops: {mode: FLOPs}.

    Forward reads the inputs and writes the output; backward reads the inputs and the output's gradient and writes the
    inputs' gradients. FLOPs are those that our kernels execute (flops.py).
    """
    read = sum(x.nbytes for x in inputs)
    moved = {
        "forward": read + do.nbytes,
        "backward": read + do.nbytes + sum(x.nbytes for x in inputs if x.requires_grad),
    }
    moved["both"] = moved["forward"] + moved["backward"]
    return {mode: 1e3 * least_seconds(moved[mode], flops[mode]) for mode in MODES}
