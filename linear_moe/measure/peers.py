"""A peer's autotuning, made short enough for a visit: split over processes that share Triton's disk cache."""

import triton.testing
from triton.runtime.autotuner import Autotuner

WARM_UP, REPEATS = 3, 12  # milliseconds that one configuration is tried for


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
