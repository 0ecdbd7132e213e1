"""Fused parameters in sharded state dicts: one tensor for each of their sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from linear_moe.ssm.stored import Stored


@dataclass(frozen=True)
class Sections:
    """Megatron's ``build_fn``: each section is cut by heads, which the fused parameter as a whole is not; or none is.

    offsets: Megatron's sharded_offsets, of axes that the state dict puts in front.
    """

    parts: Sequence[Stored]
    offsets: tuple
    tp_group: torch.distributed.ProcessGroup

    @property
    def cut(self) -> bool:
        return self.parts[0].axis is not None

    def __call__(self, key: str, tensor: Tensor, replica_id, flattened_range) -> list[ShardedTensor]:
        if flattened_range is not None:
            raise ValueError(f"{key}: flattened optimizer shards are not supported; use a reshardable format")
        return [self._sharded(f"{key}.{s.section}", s, s.of(tensor).contiguous(), replica_id) for s in self.parts]

    def _sharded(self, key: str, stored: Stored, tensor: Tensor, replica_id) -> ShardedTensor:
        offsets, prepended = list(self.offsets), len(self.offsets)
        if self.cut:
            offsets.append((stored.axis + prepended, self.tp_group.rank(), self.tp_group.size()))
        return ShardedTensor.from_rank_offsets(key, tensor, *offsets, replica_id=replica_id, prepend_axis_num=prepended)


def by_section(whole: ShardedTensor, parts: Sequence[Stored], offsets: Sequence, tp_group) -> ShardedTensorFactory:
    """A fused parameter's entry as one tensor a section, ``<key>.<section>``."""
    build = Sections(parts, tuple(offsets), tp_group)
    return ShardedTensorFactory(whole.key, whole.data, build, lambda tensors: torch.cat(tensors, -2), whole.replica_id)
