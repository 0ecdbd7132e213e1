"""What tests share: one relative error, and seeds that a failing test shows."""

import os
import random

import torch


def rel_err(x, ref, scale=None):
    """||x - ref|| / ||scale|| in float64, scale being ref unless given; 0 when both are zero, inf when only that is."""
    x, ref = x.detach().double(), ref.detach().double()
    assert x.shape == ref.shape, f"shape {[*x.shape]} instead of {[*ref.shape]}"
    error, size = (x - ref).norm().item(), (ref if scale is None else scale).norm().item()
    return error / size if size else (0.0 if error == 0 else float("inf"))


def fresh_seed():
    """Seeds torch anew, and prints the seed, which pytest shows of a failing test: TEST_SEED=<seed> draws it again."""
    seed = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"TEST_SEED={seed}")
    torch.manual_seed(seed)
    return seed
