"""What MoM's routers did, gathered without reading anything back to the host until it is logged."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch import Tensor


class Telemetry:
    """Sums of every MoM layer's routing figures since the last report, kept on the device."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}

    def record(self, layer_number: int, routing) -> None:
        """Add one microbatch's Routing of the layer (numbered from 1)."""
        figures = torch.stack([routing.entropy, routing.balance_loss, routing.z_loss, routing.entropy.new_ones(())])
        figures = torch.cat([routing.share, figures]).detach().float()
        self.sums[layer_number] = self.sums[layer_number] + figures if layer_number in self.sums else figures

    def report(self, memories: int, num_layers: int, device) -> list[dict[str, float]]:
        """Means over microbatches, data-parallel ranks and pipeline stages since the last report, and start anew.

        A collective call: every rank must make it, also those without a MoM layer. Returns one dict a layer of the
        model, empty for a layer that is not MoM: ``memory_<m>_share`` (of the routed rows), ``router_entropy`` (nats),
        ``balance_loss``, ``z_loss``, ``dead_memories`` (memories that received nothing at all).
        """
        table = torch.zeros(num_layers, memories + 4, device=device)
        for layer_number, figures in self.sums.items():
            table[layer_number - 1] = figures
        self.sums.clear()
        for group in (
            parallel_state.get_pipeline_model_parallel_group(),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
        ):
            torch.distributed.all_reduce(table, group=group)
        layers: list[dict[str, float]] = []
        for row in table.tolist():
            count, share = row[-1], row[:memories]
            if not count:
                layers.append({})
                continue
            figures = {f"memory_{m}_share": value / count for m, value in enumerate(share)}
            figures |= dict(zip(("router_entropy", "balance_loss", "z_loss"), (v / count for v in row[memories:-1])))
            figures["dead_memories"] = float(sum(value == 0 for value in share))
            layers.append(figures)
        return layers


telemetry = Telemetry()
