"""Megatron's figures of experts, in its HybridModels: as many on every pipeline stage, and averaged over the layers
that have experts. Megatron 0.19.2 makes the table as long as there are such layers on stages without one, and longer on
those with; summed over stages, the two do not fit.
"""

import functools

from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.training import get_args

from linear_moe.mcore.pattern import EXPERTS


def patch() -> None:
    """Idempotent."""
    original, count = MoEMetricsTracker.report, MoEMetricsTracker._count_moe_layers
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def report(self, *args, num_layers=None, **kwargs):
        return original(self, *args, num_layers=get_args().num_layers if _ours() else num_layers, **kwargs)

    @functools.wraps(count)
    def count_moe_layers(*args, **kwargs):
        return get_args().layers.count(EXPERTS) if _ours() else count(*args, **kwargs)

    MoEMetricsTracker.report = report
    MoEMetricsTracker._count_moe_layers = staticmethod(count_moe_layers)


def _ours() -> bool:
    return hasattr(get_args(), "layers")
