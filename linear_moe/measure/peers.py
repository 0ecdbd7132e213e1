"""A peer's functions; and its autotuning, made short enough for a visit: split over processes that share Triton's disk
cache."""

import importlib
import os

import triton.testing
from triton.runtime.autotuner import Autotuner

WARM_UP, REPEATS = 3, 12  # milliseconds that one configuration is tried for


def load(path, peer):
    """The peer's function "module:name"; ImportError that names the extra when it is not installed."""
    module, name = path.split(":")
    if peer == "fla":  # itself, not what else it finds installed
        os.environ |= {"FLA_FLASH_QLA": "0", "FLA_FLASH_KDA": "0", "FLA_TILELANG": "0"}
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        extra = "gpu-peers" if peer == "flash-qla" else "peers"
        raise ImportError(f"--peer {peer} needs it installed: pip install 'linear-moe[{extra}]' ({error})") from error


def shorten_tuning():
    """Makes every later autotuning of this process try a configuration for a few milliseconds."""
    bench = triton.testing.do_bench

    def short(function, warmup=WARM_UP, rep=REPEATS, **options):
        return bench(function, warmup=WARM_UP, rep=REPEATS, **options)

    if bench.__name__ != short.__name__:
        triton.testing.do_bench = short


def keep_share(share, shares):
    """Makes every later autotuning of this process try only every shares-th configuration, beginning with `share`.

    So `shares` processes compile all of them, and one that then tries all finds them in the cache. For a process of its
    own: a process keeps what it found best of its share.
    """
    prune = Autotuner.prune_configs

    def some(self, *args, **options):
        found = prune(self, *args, **options)
        return found[share::shares] or found[:1]

    Autotuner.prune_configs = some
